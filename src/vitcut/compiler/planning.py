"""From a circuit to a plan: integers and names only, so that its cost is known before any folding.

What is live or constant is left to ``liveness.py``, how sums share work to ``streams.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from vitcut.circuit import Circuit
from vitcut.compact.plan import (
    AttentionPlan,
    BlockPlan,
    HeadGroupPlan,
    Letter,
    MlpPlan,
    Plan,
    ProjectionPlan,
    Rows,
    StreamPlan,
    ViTShape,
)
from vitcut.compiler.liveness import Liveness, find_liveness
from vitcut.compiler.streams import (
    EMBED_SOURCE,
    Items,
    Stream,
    StreamBuilder,
    stream_plan,
)
from vitcut.errors import CircuitError, UnsupportedModelError
from vitcut.names import LETTERS
from vitcut.vits.weights import ViTWeights

T = TypeVar("T")

Read = tuple[Letter, int]
"""A letter and a head of the block at hand."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A plan, and which constants its tables are made of."""

    plan: Plan
    tables: dict[str, Items]
    """The constants that each stream adds, by its name."""


def plan_circuit(shape: ViTShape, circuit: Circuit) -> Plan:
    """The plan of a circuit's compact model.

    Raises:
        CircuitError: The circuit is of another graph, or its cut edges carry no constants.
    """
    return draft_circuit(shape, circuit).plan


def draft_circuit(shape: ViTShape, circuit: Circuit) -> Draft:
    """The plan of a circuit's compact model, and what folding needs besides.

    Raises:
        CircuitError: The circuit is of another graph, or its cut edges carry no constants.
    """
    _require_compilable(shape, circuit)
    return _Drafter(shape, circuit).draft()


def shape_of(weights: ViTWeights) -> ViTShape:
    """The sizes of a model.

    Raises:
        UnsupportedModelError: Its blocks differ in MLP width, activation or LayerNorm epsilon.
    """
    mlps = [block.mlp for block in weights.blocks]
    norms = [norm for block in weights.blocks for norm in (block.attn_norm, block.mlp_norm)]
    return ViTShape(
        image_size=weights.image_size,
        channels=weights.channels,
        patch_size=weights.patch_size,
        num_prefix=weights.num_prefix,
        width=weights.width,
        num_layers=len(weights.blocks),
        num_heads=weights.num_heads,
        head_dim=weights.blocks[0].attn.q_weight.shape[1],
        hidden=_same("MLP width", (mlp.in_weight.shape[0] for mlp in mlps)),
        activation=_same("activation", (mlp.activation for mlp in mlps)),
        eps=_same("LayerNorm epsilon", (norm.eps for norm in [*norms, weights.norm])),
        num_classes=weights.num_classes,
    )


def _same(what: str, values: Iterable[T]) -> T:
    first, *others = values
    if any(other != first for other in others):
        found = ", ".join(map(str, [first, *others]))
        raise UnsupportedModelError(f"every block must have the same {what}, got {found}")
    return first


def _require_compilable(shape: ViTShape, circuit: Circuit) -> None:
    graph = circuit.graph
    if (graph.num_layers, graph.num_heads) != (shape.num_layers, shape.num_heads):
        raise CircuitError(
            f"the circuit is of a model with {graph.num_layers} blocks of {graph.num_heads} heads, "
            f"this one has {shape.num_layers} of {shape.num_heads}: use the model it was found in"
        )
    if circuit.ablation == "resample":
        raise CircuitError(
            "a circuit under 'resample' ablation cannot be compiled, its cut edges differ by "
            "image: re-measure under mean or zero first: circuit.with_ablation('mean')"
        )


class _Drafter:
    """Walks the blocks from the first to the classifier."""

    def __init__(self, shape: ViTShape, circuit: Circuit) -> None:
        self.shape = shape
        self.graph = circuit.graph
        self.kept = circuit.kept
        self.liveness: Liveness = find_liveness(circuit)
        self.builder = StreamBuilder(circuit=circuit, liveness=self.liveness)

    def draft(self) -> Draft:
        graph = self.graph
        halves = [(self._attention(i), self._mlp(i)) for i in range(graph.num_layers)]
        classifier = None
        if graph.classifier not in self.liveness.constant_targets:
            classifier = self._stream_plan(self.builder.build(graph.classifier, "readout"))
        blocks = [
            BlockPlan(attention=attention and self._with_outputs(attention, layer), mlp=mlp)
            for layer, (attention, mlp) in enumerate(halves)
        ]
        plan = Plan(
            shape=self.shape,
            embeds=self.liveness.needed[EMBED_SOURCE] != "none",
            blocks=tuple(blocks),
            classifier=classifier,
        )
        return Draft(plan=plan, tables={item.name: item.added for item in self.builder.streams})

    def _attention(self, layer: int) -> AttentionPlan | None:
        """A block's attention, yet without its outputs: later streams decide on them."""
        graph = self.graph
        heads = [
            head
            for head in range(graph.num_heads)
            if self.liveness.needed[graph.head_source(layer, head)] != "none"
        ]
        if not heads:
            return None
        streams, reads = self._attention_streams(layer, heads)
        groups = self._head_groups(layer, heads, reads)
        self.builder.groups[layer] = groups
        return AttentionPlan(
            streams=tuple(self._stream_plan(stream) for stream in streams),
            projections=_projections(groups, reads),
            groups=groups,
            outputs=(),
        )

    def _with_outputs(self, plan: AttentionPlan, layer: int) -> AttentionPlan:
        return replace(plan, outputs=self.builder.output_plans(layer))

    def _attention_streams(
        self, layer: int, heads: list[int]
    ) -> tuple[list[Stream], dict[Read, int]]:
        """A block's streams, and which of them each letter of each head reads."""
        alike: dict[bytes, list[Read]] = {}
        for letter in LETTERS:
            for head in heads:
                target = self.graph.head_target(layer, head, letter)
                if target not in self.liveness.constant_targets:
                    alike.setdefault(self.kept[:, target].tobytes(), []).append((letter, head))

        def size(members: list[Read]) -> int:
            return len(self.builder.live_sources(self._target(layer, members[0])))

        # Small sums first: larger ones of the same block can then build on them.
        streams: list[Stream] = []
        reads: dict[Read, int] = {}
        for members in sorted(alike.values(), key=size):
            reads |= dict.fromkeys(members, len(streams))
            needs = {self._input_rows(layer, *member) for member in members}
            rows: Rows = "all" if "all" in needs else "readout"
            streams.append(self.builder.build(self._target(layer, members[0]), rows))
        return streams, reads

    def _head_groups(
        self, layer: int, heads: list[int], reads: dict[Read, int]
    ) -> tuple[HeadGroupPlan, ...]:
        """Heads with the same query rows and the same constant inputs, in the order of streams."""
        members: dict[tuple[Rows, tuple[Letter, ...]], list[int]] = {}
        for head in heads:
            constant: tuple[Letter, ...] = tuple(
                letter for letter in LETTERS if (letter, head) not in reads
            )
            members.setdefault((self._input_rows(layer, "q", head), constant), []).append(head)

        def order(head: int) -> list[int]:
            return [*(reads.get((letter, head), -1) for letter in LETTERS), head]

        return tuple(
            HeadGroupPlan(
                heads=tuple(sorted(group, key=order)),
                rows=rows,
                constant=constant,
            )
            for (rows, constant), group in members.items()
        )

    def _mlp(self, layer: int) -> MlpPlan | None:
        source = self.graph.mlp_source(layer)
        if self.liveness.needed[source] == "none":
            return None
        stream = self.builder.build(self.graph.mlp_target(layer), self.liveness.rows(source))
        return MlpPlan(
            name=f"mlp.{layer}", stream=self._stream_plan(stream), hidden=self.shape.hidden
        )

    def _stream_plan(self, stream: Stream) -> StreamPlan:
        return stream_plan(stream, self.shape.num_tokens)

    def _target(self, layer: int, member: Read) -> int:
        letter, head = member
        return self.graph.head_target(layer, head, letter)

    def _input_rows(self, layer: int, letter: Letter, head: int) -> Rows:
        if letter != "q":
            return "all"
        return self.liveness.rows(self.graph.head_source(layer, head))


def _projections(
    groups: tuple[HeadGroupPlan, ...],
    reads: dict[Read, int],
) -> tuple[ProjectionPlan, ...]:
    """One product per stream, and one more where only some of its queries need all rows."""
    columns: dict[tuple[int, Rows], dict[str, list[int]]] = {}
    for letter in LETTERS:
        for group in groups:
            for head in group.heads if letter not in group.constant else ():
                stream = reads[letter, head]
                rows = group.rows if letter == "q" else "all"
                lists = columns.setdefault((stream, rows), {name: [] for name in LETTERS})
                lists[letter].append(head)
    return tuple(
        ProjectionPlan(
            stream=stream,
            rows=rows,
            q=tuple(lists["q"]),
            k=tuple(lists["k"]),
            v=tuple(lists["v"]),
        )
        for (stream, rows), lists in sorted(columns.items())
    )
