"""From a circuit to a plan: integers and names only, so that its cost is known before any folding.

What is live or constant is left to ``liveness.py``, how sums share work to ``streams.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vitcut.circuit import Circuit
from vitcut.compact.plan import BlockPlan, MlpPlan, OutputPlan, Plan, StreamPlan, ViTShape
from vitcut.compiler.attention import draft_attention
from vitcut.compiler.cost import CostModel
from vitcut.compiler.joining import Joins
from vitcut.compiler.liveness import find_liveness
from vitcut.compiler.reads import EMBED_BIT, Reads
from vitcut.compiler.streams import Stream, StreamBuilder, stream_plan, table_rows
from vitcut.errors import CircuitError


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A plan, and what folding needs besides."""

    plan: Plan
    reads: Reads
    streams: dict[str, Stream]
    """By name, what each stream adds up."""
    biases: dict[str, str]
    """Per product the stream whose constants its bias holds, if any."""
    unbiased: frozenset[str]
    """Products without a bias: the table of their only reader holds it, or another product."""


def plan_circuit(shape: ViTShape, circuit: Circuit, costs: CostModel | None = None) -> Plan:
    """The plan of a circuit's compact model.

    Args:
        shape: The model's sizes.
        circuit: What to keep.
        costs: Decides between ways to compute the same; the shipped costs if None.

    Raises:
        CircuitError: The circuit is of another graph, or its cut edges carry no constants.
    """
    return draft_circuit(shape, circuit, costs).plan


def draft_circuit(shape: ViTShape, circuit: Circuit, costs: CostModel | None = None) -> Draft:
    """The plan of a circuit's compact model, and what folding needs besides.

    Raises:
        CircuitError: The circuit is of another graph, or its cut edges carry no constants.
    """
    _require_compilable(shape, circuit)
    over_groups = split_circuit(shape, circuit)
    # The maps of a fill over whole tokens are the same for all groups.
    differ = circuit.ablation == "linear" and bool(circuit.graph.kinds)
    reads = Reads.of(over_groups, shape.hidden, maps_differ=differ)
    return _Drafter(shape, reads, costs or CostModel()).draft()


def split_circuit(shape: ViTShape, circuit: Circuit) -> Circuit:
    """The same circuit over the token kinds of a model.

    Raises:
        CircuitError: It has other token kinds.
    """
    return circuit.split(tuple(shape.kind_rows), shape.readout)


def _require_compilable(shape: ViTShape, circuit: Circuit) -> None:
    graph = circuit.graph
    if (graph.num_layers, graph.num_heads) != (shape.num_layers, shape.num_heads):
        raise CircuitError(
            f"the circuit is of a model with {graph.num_layers} blocks of {graph.num_heads} heads, "
            f"this one has {shape.num_layers} of {shape.num_heads}: use the model it was found in"
        )
    if circuit.neurons is not None and circuit.neurons.shape[2] != shape.hidden:
        raise CircuitError(
            f"the circuit is of a model with {circuit.neurons.shape[2]} neurons per MLP, this one "
            f"has {shape.hidden}: use the model it was found in"
        )
    if circuit.ablation == "resample":
        raise CircuitError(
            "a circuit under 'resample' ablation cannot be compiled, its cut edges differ by "
            "image: re-measure under mean or zero first: circuit.with_ablation('mean')"
        )


class _Drafter:
    """Walks the blocks from the first to the classifier."""

    def __init__(self, shape: ViTShape, reads: Reads, costs: CostModel) -> None:
        self.shape = shape
        self.reads = reads
        self.liveness = find_liveness(reads)
        self.joins = Joins(reads, self.liveness)
        self.builder = StreamBuilder(
            shape=shape, reads=reads, liveness=self.liveness, joins=self.joins, costs=costs
        )

    def draft(self) -> Draft:
        graph, builder = self.reads.graph, self.builder
        halves = [
            (draft_attention(builder, layer), self._mlps(layer))
            for layer in range(graph.num_layers)
        ]
        readout = self._readout()
        tables = {stream.name: table_rows(stream) for stream in builder.streams}
        biases, unbiased = _place_biases(builder.streams, tables)

        def plan_of(stream: Stream) -> StreamPlan:
            return stream_plan(stream, self.shape, table_rows=tables[stream.name])

        blocks = [
            BlockPlan(
                attention=attention
                and replace(
                    attention.plan(map(plan_of, attention.streams)),
                    outputs=self._outputs(layer, unbiased),
                ),
                mlps=tuple(
                    MlpPlan(
                        name=name,
                        stream=plan_of(stream),
                        hidden=hidden,
                        bias=name not in unbiased,
                    )
                    for name, stream, hidden in mlps
                ),
            )
            for layer, (attention, mlps) in enumerate(halves)
        ]
        plan = Plan(
            shape=self.shape,
            embeds=any(needed & EMBED_BIT for needed in self.liveness.needed),
            blocks=tuple(blocks),
            readout=tuple(map(plan_of, readout)),
        )
        streams = {stream.name: stream for stream in builder.streams}
        return Draft(plan=plan, reads=self.reads, streams=streams, biases=biases, unbiased=unbiased)

    def _mlps(self, layer: int) -> list[tuple[str, Stream, int]]:
        """The MLPs of a block: name, stream and neurons of each."""
        block = self.reads.blocks[layer]
        runs = self.joins.written.get(block.mlp_source, ())
        found: list[tuple[str, Stream, int]] = []
        for number, run in enumerate(runs):
            name = f"mlp.{layer}" if len(runs) == 1 else f"mlp.{layer}.{number}"
            stream = self.builder.build(block.mlp_target, run)
            found.append((name, stream, self.reads.hidden[layer][run[0]]))
        for (name, *_), run in zip(found, runs, strict=True):
            self.builder.add_mlp(layer, run, name)
        return found

    def _readout(self) -> list[Stream]:
        target = self.reads.graph.classifier
        runs = [(group, group) for group in self.reads.readout]
        return [self.builder.build(target, run) for run in runs if self.joins.live(target, run)]

    def _outputs(self, layer: int, unbiased: frozenset[str]) -> tuple[OutputPlan, ...]:
        return tuple(
            OutputPlan(
                name=item.name,
                head_set=item.head_set,
                heads=item.heads,
                rows=item.rows,
                bias=item.name not in unbiased,
            )
            for item in self.builder.products.get(layer, ())
            if item.head_set >= 0
        )


def _place_biases(
    streams: Iterable[Stream], tables: dict[str, int]
) -> tuple[dict[str, str], frozenset[str]]:
    """Decide which products have a bias: one less is an addition less.

    A product that one stream alone reads is computed onto that stream's sum. The stream's table
    holds its bias; where no table with a row per token is needed, one product's bias holds all.

    Args:
        streams: All of a model.
        tables: Rows of each stream's table; those that go are set to 0.

    Returns:
        Per product the stream whose constants its bias holds, and the products without a bias.
    """
    biases: dict[str, str] = {}
    unbiased: set[str] = set()
    for stream in streams:
        alone = [
            product.name
            for product in stream.products
            if product.readers == 1 and product.rows == stream.rows
        ]
        if tables[stream.name] <= 1 and alone:
            biases[alone.pop()] = stream.name
            tables[stream.name] = 0
        unbiased |= set(alone)
    return biases, frozenset(unbiased)
