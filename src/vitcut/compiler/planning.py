"""From a circuit to a plan: integers and names only, so that its cost is known before any folding.

The passes, in their order. Sources and targets are those of the unsplit graph; each pass works per
token kind (cls, register, patch), or per run of adjacent kinds.

1. Constants, forwards (``liveness.py``). A source that reads only constants is a constant; the
   class token is one before its first attention, as is an MLP that keeps no neurons.

       embed.cls     constant -> mlp.0.cls    constant      (mlp.0.cls keeps embed.cls alone)
       embed.patch   varies   -> attn.0.0.cls varies        (keys and values mix the kinds)

2. Needs, backwards (``liveness.py``). A source is needed if a needed target reads it. Keys and
   values of all kinds are needed as soon as the query of any kind is.

       classifier <- mlp.1.cls <- attn.1.0.cls <- q.cls, k.cls + k.patch, v.cls + v.patch
       mlp.1.patch, attn.1.0.patch: nobody reads them, they are not computed

3. Joining (``liveness.py``). Adjacent kinds that read the same sources, written by the same
   products, stay one tensor: a run. The uncut circuit comes out as the plain residual stream.

       target keeps  cls: embed a b   patch: embed a b   ->   [cls patch]     one sum of all rows
       target keeps  cls: embed a b   patch: embed a     ->   [cls] [patch]   two sums

4. Streams (``streams.py``). Targets that read alike share one sum and its LayerNorm. A sum builds
   on the earlier one that leaves least to add, so nested sets of sources share their prefix.

       reads {embed, a}          stream.1 = embed + a
       reads {embed, a, b}       stream.2 = stream.1 + b
       reads {embed, a, b, c}    stream.3 = stream.2 + c

5. Head sets. Heads with the same query rows and the same constant letters go through one attention
   call. For few query rows, the weights of keys and values are absorbed: they are applied to the
   queries and to the mixtures of tokens, instead of to all tokens.

       many rows    q (x W_K)'                 a (x W_V) W_O        products over all tokens
       few rows     (q W_K') x'                (a x) W_V W_O        products over the query rows

6. Biases. A product that one stream alone adds is computed onto that stream's sum, without a bias:
   the stream's table holds it. Where there is no table, one product's bias holds what is constant.

       sum + x W + b,  then + table    ->    sum + x W,  then + (table + b)

What follows is folding (``emit.py``): the tensors of what has been planned. Stream merging
(``merging.py``) comes before all of this: it goes from a circuit to a circuit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitcut.circuit import Circuit
from vitcut.compact.operations import head_set_macs
from vitcut.compact.plan import (
    AttentionPlan,
    BlockPlan,
    HeadSetPlan,
    MlpPlan,
    OutputPlan,
    Plan,
    ProjectionPlan,
    Rows,
    StreamPlan,
    ViTShape,
)
from vitcut.compiler.cost import CostModel
from vitcut.compiler.liveness import EMBED, Joins, Mask, Reads, Run, find_liveness, union
from vitcut.compiler.streams import DraftProduct, DraftStream, StreamBuilder, covers
from vitcut.errors import CircuitError
from vitcut.names import LETTERS, Letter


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A plan, and what folding needs besides."""

    plan: Plan
    reads: Reads
    streams: dict[str, DraftStream]
    """By name, what each stream adds up."""
    biases: dict[str, str]
    """The products whose bias holds all constants of a stream, and that stream."""
    unbiased: frozenset[str]
    """Products without a bias: the table of their only reader, or another product, holds it."""


def plan_circuit(shape: ViTShape, circuit: Circuit, costs: CostModel | None = None) -> Plan:
    """Plan the compact model of a circuit.

    Args:
        shape: The model's sizes.
        circuit: What to keep.
        costs: Decides between ways to compute the same; the shipped costs if None.

    Raises:
        CircuitError: The circuit is of another model, or its ablation cannot be compiled.
    """
    return draft_circuit(shape, circuit, costs).plan


def split_circuit(shape: ViTShape, circuit: Circuit) -> Circuit:
    """The same circuit over the token kinds of a model.

    Raises:
        CircuitError: It has other token kinds.
    """
    return circuit.split(tuple(shape.kind_rows), shape.readout)


def draft_circuit(shape: ViTShape, circuit: Circuit, costs: CostModel | None = None) -> Draft:
    """Plan the compact model of a circuit, and gather what folding needs besides.

    Raises:
        CircuitError: The circuit is of another model, or its ablation cannot be compiled.
    """
    _require_compilable(shape, circuit)
    shape = shape.at(circuit.positions)
    # The maps of a linear fill over whole tokens are the same for all kinds.
    maps_differ = circuit.ablation == "linear" and bool(circuit.graph.kinds)
    reads = Reads.of(split_circuit(shape, circuit), shape.hidden, maps_differ=maps_differ)
    joins = Joins(reads, find_liveness(reads))
    builder = StreamBuilder(shape, joins)

    # From the first block to the classifier: streams build on those of earlier blocks.
    attentions: list[tuple[list[DraftStream], tuple[ProjectionPlan, ...]]] = []
    mlps: list[list[tuple[DraftProduct, DraftStream, int]]] = []
    for layer, block in enumerate(reads.blocks):
        attentions.append(_draft_attention(builder, layer, costs or CostModel()))
        runs = joins.written.get(block.mlp_source, ())
        mlps.append([])
        for number, run in enumerate(runs):
            name = f"mlp.{layer}" if len(runs) == 1 else f"mlp.{layer}.{number}"
            rows, bias = builder.rows(run), 2 * layer + 1
            product = DraftProduct(name=name, run=run, rows=rows, bias=bias)
            stream = builder.build(block.mlp_target, run)
            mlps[-1].append((product, stream, reads.hidden[layer][run.start]))
        builder.mlps[layer] += [product for product, *_ in mlps[-1]]
    classifier = reads.graph.classifier
    readout = [
        builder.build(classifier, range(kind, kind + 1))
        for kind in reads.readout
        if joins.live(classifier, range(kind, kind + 1))
    ]

    # All streams are built. Only now are the readers and rows of every product known.
    table_rows = {stream.name: stream.table_rows for stream in builder.streams}
    biases, unbiased = _place_biases(builder.streams, table_rows)

    def plan_of(stream: DraftStream) -> StreamPlan:
        return stream.plan(shape, table_rows=table_rows[stream.name])

    blocks: list[BlockPlan] = []
    for layer, (own_streams, projections) in enumerate(attentions):
        attention = None
        if builder.head_sets[layer]:
            attention = AttentionPlan(
                streams=tuple(map(plan_of, own_streams)),
                projections=projections,
                head_sets=tuple(head_set for _, head_set in builder.head_sets[layer]),
                outputs=tuple(
                    OutputPlan(
                        name=product.name,
                        head_set=number,
                        heads=heads,
                        rows=product.rows,
                        bias=product.name not in unbiased,
                    )
                    for (number, heads), product in builder.outputs[layer].items()
                ),
            )
        own = tuple(
            MlpPlan(
                name=product.name,
                stream=plan_of(stream),
                hidden=hidden,
                bias=product.name not in unbiased,
            )
            for product, stream, hidden in mlps[layer]
        )
        blocks.append(BlockPlan(attention=attention, mlps=own))
    plan = Plan(
        shape=shape,
        embeds=bool(union(joins.liveness.needed) & EMBED),
        blocks=tuple(blocks),
        readout=tuple(map(plan_of, readout)),
    )
    streams = {stream.name: stream for stream in builder.streams}
    return Draft(plan=plan, reads=reads, streams=streams, biases=biases, unbiased=unbiased)


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
            "a circuit under 'resample' ablation cannot be compiled, as its cut edges differ by "
            "image: re-measure it under mean or zero with circuit.with_ablation('mean')"
        )


def _place_biases(
    streams: Sequence[DraftStream], table_rows: dict[str, int]
) -> tuple[dict[str, str], frozenset[str]]:
    """Decide which products have a bias (pass 6): one less is one addition less.

    Sets the rows of a stream's table to 0 where a bias replaces it. Returns ``biases`` and
    ``unbiased`` of the draft.
    """
    biases: dict[str, str] = {}
    unbiased: set[str] = set()
    for stream in streams:
        alone = [
            product.name
            for product in stream.products
            if product.readers == 1 and product.rows == stream.rows
        ]
        # Without a row per token, one bias can hold all constants, and no table is needed.
        if table_rows[stream.name] <= 1 and alone:
            biases[alone.pop()] = stream.name
            table_rows[stream.name] = 0
        unbiased |= set(alone)
    return biases, frozenset(unbiased)


Want = tuple[Run, tuple[Mask, ...]]
"""A stream before it is built: its kinds, and the sources kept in each."""
Inputs = dict[tuple[Letter, int, Run], tuple[int, ...]]
"""For a letter, a head and a run of kinds that ask: numbers of the streams within the attention
whose tokens it reads, one after the other. Empty where it is constant."""


def _draft_attention(
    builder: StreamBuilder, layer: int, costs: CostModel
) -> tuple[list[DraftStream], tuple[ProjectionPlan, ...]]:
    """Build the streams and plan the projections of a block; give the builder its head sets."""
    joins, block = builder.joins, builder.reads.blocks[layer]
    asking = [(h, run) for h in block.heads for run in joins.written.get(h.source, ())]
    if not asking:
        return [], ()
    kinds = builder.reads.kinds

    # Which sums are wanted, and a target that reads each: first those of keys and values, which
    # need the tokens of all kinds, in as few pieces as joining allows.
    wants: dict[Want, int] = {}
    pieces: dict[tuple[Mask, ...], tuple[Want, ...]] = {}
    read: dict[tuple[Letter, int, Run], tuple[Want, ...]] = {}
    # Constant rows come beside the others after the LayerNorm, if no query needs them before.
    joined = any(run == kinds for _, run in asking)
    for head, run in asking:
        for letter in ("k", "v"):
            target = head.targets[letter]
            if not joins.live(target, kinds):
                continue
            kept = builder.kept(target, kinds)
            if kept not in pieces:
                varies = [bool(joins.live(target, range(kind, kind + 1))) for kind in kinds]
                alike = [joined or varies[pair] == varies[pair + 1] for pair in kinds[:-1]]
                pieces[kept] = tuple(
                    (piece, builder.kept(target, piece))
                    for piece in joins.runs(target, kinds, alike)
                )
            read[letter, head.number, run] = pieces[kept]
            for want in pieces[kept]:
                wants.setdefault(want, target)
    # Then those of queries, unless rows of one that is there already hold the same sums.
    for head, run in asking:
        target = head.targets["q"]
        if joins.live(target, run):
            want = run, builder.kept(target, run)
            for other, kept in sorted(wants, key=lambda one: (one[0].start, one[0].stop, one[1])):
                if covers(other, run) and kept[run.start - other.start :][: len(run)] == want[1]:
                    want = other, kept
                    break
            read["q", head.number, run] = (want,)
            wants.setdefault(want, target)

    # Small sums first: larger ones can then build on them.
    ordered = sorted(wants, key=lambda want: joins.live(wants[want], want[0]).bit_count())
    streams = [builder.build(wants[want], want[0]) for want in ordered]
    numbers = {want: number for number, want in enumerate(ordered)}
    inputs: Inputs = {
        (letter, head.number, run): tuple(
            numbers[want] for want in read.get((letter, head.number, run), ())
        )
        for letter in LETTERS
        for head, run in asking
    }

    # Heads with the same query rows and the same constant letters are one set, ordered by streams.
    # Then columns of one projection that a set reads are neighbours, and need no copy.
    members: dict[tuple[Run, tuple[Letter, ...]], list[int]] = {}
    for head, run in asking:
        constant: tuple[Letter, ...] = tuple(
            letter for letter in LETTERS if not inputs[letter, head.number, run]
        )
        members.setdefault((run, constant), []).append(head.number)
    head_sets: list[tuple[Run, HeadSetPlan]] = []
    for (run, constant), heads in members.items():
        order = {head: ([inputs[x, head, run] for x in LETTERS], head) for head in heads}
        plan = HeadSetPlan(
            heads=tuple(sorted(heads, key=order.__getitem__)),
            rows=builder.rows(run),
            constant=constant,
            queries=(),
            keys=(),
            values=(),
            merged_values=False,
        )
        head_sets.append((run, plan))
    _absorb(builder.shape, inputs, head_sets, costs)
    builder.head_sets[layer] = head_sets
    return streams, _plan_projections(builder.shape, inputs, head_sets)


def _absorb(
    shape: ViTShape, inputs: Inputs, head_sets: list[tuple[Run, HeadSetPlan]], costs: CostModel
) -> None:
    """Let sets of few queries do without keys or values, where that takes fewer MACs (pass 5).

    With n tokens, m query rows, width d and heads of size h: keys take n d h per head that no other
    set needs, absorbing them m d h for q W_K', and m n d instead of m n h for the scores.
    """
    product = shape.num_tokens * shape.width * shape.head_dim
    computed: dict[Letter, set[int]] = {"k": set(), "v": set()}
    # Most rows first: keys and values that many queries need anyway cost few queries nothing.
    for number in sorted(range(len(head_sets)), key=lambda one: -head_sets[one][1].rows.count):
        run, plan = head_sets[number]
        names: dict[Letter, str] = {"k": "keys", "v": "values"}
        for letter, name in names.items():
            # qk-norm and RoPE stand between the product of the keys and the queries.
            if letter in plan.constant or (letter == "k" and shape.needs_keys):
                continue
            own = set(plan.heads) - computed[letter]
            read = {inputs[letter, head, run] for head in plan.heads}
            absorbed = replace(plan, **{name: min(read)})
            saved = head_set_macs(shape, plan) + len(own) * product - head_set_macs(shape, absorbed)
            if len(read) == 1 and saved > 0:
                plan = absorbed
            else:
                computed[letter] |= own
        # Two products in a row with few numbers between them may be slower than one merged.
        asked = {inputs["q", head, run] for head in plan.heads}
        if plan.keys and "q" not in plan.constant and len(asked) == 1:
            merged = replace(plan, queries=min(asked))
            plan = merged if costs.prefers(shape, merged, plan) else plan
        if plan.values:
            merged = replace(plan, merged_values=True)
            plan = merged if costs.prefers(shape, merged, plan) else plan
        head_sets[number] = run, plan


def _plan_projections(
    shape: ViTShape, inputs: Inputs, head_sets: Sequence[tuple[Run, HeadSetPlan]]
) -> tuple[ProjectionPlan, ...]:
    """One product per input of an attention: the heads whose q, k and v it computes."""
    columns: dict[tuple[tuple[int, ...], Rows], dict[Letter, list[int]]] = {}
    # Keys and values first: queries of most rows are computed along with them.
    for letter in reversed(LETTERS):
        for run, plan in head_sets:
            absorbed = {"q": plan.queries, "k": plan.keys, "v": plan.values}[letter]
            if letter in plan.constant or absorbed:
                continue
            for head in plan.heads:
                streams = inputs[letter, head, run]
                rows = plan.rows if letter == "q" else shape.all_rows
                if letter == "q" and 2 * rows.count > shape.num_tokens:
                    for others, covered in columns:
                        if covered == shape.all_rows and set(streams) <= set(others):
                            streams, rows = others, covered
                            break
                own = columns.setdefault((streams, rows), {"q": [], "k": [], "v": []})
                if head not in own[letter]:
                    own[letter].append(head)
    return tuple(
        ProjectionPlan(
            streams=streams, rows=rows, q=tuple(own["q"]), k=tuple(own["k"]), v=tuple(own["v"])
        )
        for (streams, rows), own in sorted(
            columns.items(), key=lambda item: (item[0][0], item[0][1].first, item[0][1].end)
        )
    )
