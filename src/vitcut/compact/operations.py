"""What a compact model computes, operation by operation.

``operations`` walks a plan as the forward passes of its modules do. MACs, the table that shows a
plan, and predicted latencies are sums over it. A forward pass that changes must change here, too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vitcut.compact.plan import (
    AttentionPlan,
    HeadSetPlan,
    MlpPlan,
    OutputPlan,
    Plan,
    Rows,
    StreamPlan,
    ViTShape,
)

Kind = Literal[
    "patch embedding",
    "product",
    "product per image",
    "sum",
    "sum in product",
    "copy",
    "norm",
    "softmax",
    "activation",
]
"""A product is one with weights; a product per image multiplies two matrices of each image and
head. A sum in a product is not an operation of its own: the product is computed onto the sum."""


class Operation(NamedTuple):
    """One operation, for one image: [heads, rows, inputs] by [heads, inputs, outputs]."""

    part: str
    """``embed``, ``block 0``, ``block 1``, ..., ``classifier``."""
    tokens: Rows
    """The tokens it serves: those that ask, in an attention, or that have an MLP of their own."""
    kind: Kind
    rows: int
    outputs: int
    """Columns of the result."""
    inputs: int = 1
    """Columns of the first factor; 1 unless the operation is a product."""
    heads: int = 1
    """Products of these sizes that are computed side by side, each with its own second factor."""

    @property
    def size(self) -> int:
        """Elements of the result; for a product its multiply-accumulates."""
        return self.heads * self.rows * self.inputs * self.outputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.size if self.kind in _PRODUCTS else 0


_PRODUCTS = ("patch embedding", "product", "product per image")


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One line of the table that shows a plan: a part of the model, for some tokens."""

    part: str
    """``embed``, ``block 0``, ..., ``classifier``."""
    tokens: str = ""
    """The token kinds that it computes, such as ``cls`` or ``cls + patch``."""
    streams: int = 0
    """Sums, nearly always with a LayerNorm each."""
    heads: int = 0
    query_rows: int = 0
    """Tokens that ask; 1 or 2 where only those do that the classifier reads."""
    absorbed: int = 0
    """How many of the heads compute no keys or no values, because few tokens ask."""
    neurons: int = 0
    """Neurons that are kept; under a norm over neurons all are computed."""
    mlp_rows: int = 0
    """Tokens that the MLP computes."""
    macs: int = 0
    """Multiply-accumulates per image."""


def operations(plan: Plan, *, smooth: bool = False) -> Iterator[Operation]:
    """All operations of a compact model, part by part.

    Args:
        plan: The compact model.
        smooth: Whether to include what the first cut of its kind adds, so that it costs no more
            than the next one: every stream has a table, so no product has a bias, and neurons that
            are not read are left out after a norm.
    """
    walk = _Walk(plan.shape, smooth=smooth)
    if plan.embeds:
        yield from walk.embed()
    for number, block in enumerate(plan.blocks):
        walk.part = f"block {number}"
        if block.attention is not None:
            yield from walk.attention(block.attention)
        for mlp in block.mlps:
            yield from walk.mlp(mlp)
    if plan.readout:
        walk.part = "classifier"
        yield from walk.classifier(plan.readout)


def head_set_operations(
    shape: ViTShape, head_set: HeadSetPlan, *, ends: bool = False
) -> Iterator[Operation]:
    """The operations of one head set, to compare ways to compute the same heads.

    Args:
        shape: The model's sizes.
        head_set: The heads.
        ends: Whether to include the product to their queries and the one back to the stream, as
            if no other head shared these. Products to keys and values are never included.
    """
    walk = _Walk(shape)
    num_heads, rows = len(head_set.heads), head_set.rows
    if ends and not head_set.queries and "q" not in head_set.constant:
        columns = num_heads * shape.head_dim
        yield walk.make("product", rows.count, columns, inputs=shape.width)
    yield from walk.head_set(head_set)
    if ends:
        output = OutputPlan(name="", head_set=0, heads=head_set.heads, rows=rows, bias=True)
        yield from walk.output(head_set, output)


def count_macs(plan: Plan) -> int:
    """Multiply-accumulates per image of a compact model.

    Every matrix product counts: patch embedding, projections, attention's two, MLPs, classifier.
    """
    return sum(operation.macs for operation in operations(plan))


def head_set_macs(shape: ViTShape, head_set: HeadSetPlan) -> int:
    """Multiply-accumulates of a head set: all between its projections and its outputs."""
    return sum(operation.macs for operation in head_set_operations(shape, head_set))


def dense_macs(shape: ViTShape) -> int:
    """Multiply-accumulates per image of the original model, which computes every token to the end.

    The plan of a full circuit has fewer: its last block computes only what the classifier reads.
    """
    heads_width = shape.num_heads * shape.head_dim
    patches = shape.num_patches * shape.width * shape.channels * shape.patch_size**2
    attention = 4 * shape.width * heads_width + 2 * shape.num_tokens * heads_width
    mlp = (3 if shape.gated else 2) * shape.width * shape.hidden
    features = (shape.num_read + (shape.patch_readout != "none")) * shape.width
    blocks = shape.num_layers * shape.num_tokens * (attention + mlp)
    return patches + blocks + features * shape.num_classes


def describe(plan: Plan) -> tuple[PlanRow, ...]:
    """A plan as lines of a table: the embedding, the tokens of each block, the classifier.

    A block has a line for each range of tokens that ask or have an MLP of their own.
    """
    shape = plan.shape
    macs: Counter[tuple[str, Rows]] = Counter()
    for operation in operations(plan):
        macs[operation.part, operation.tokens] += operation.macs
    found = [PlanRow(part="embed", macs=macs["embed", shape.patch_rows])]
    for number, block in enumerate(plan.blocks):
        part, attention = f"block {number}", block.attention
        head_sets = attention.head_sets if attention else ()
        streams = [_asking(attention, item.rows) for item in attention.streams] if attention else []
        ranges = {item.rows for item in head_sets} | {mlp.stream.rows for mlp in block.mlps}
        for rows in sorted(ranges, key=lambda rows: (rows.first, rows.end)):
            own = [item for item in head_sets if item.rows == rows]
            mlps = [mlp for mlp in block.mlps if mlp.stream.rows == rows]
            row = PlanRow(
                part=part,
                tokens=shape.name_of(rows),
                streams=streams.count(rows) + len(mlps),
                heads=len({head for item in own for head in item.heads}),
                query_rows=rows.count if own else 0,
                absorbed=len(
                    {head for item in own if item.keys or item.values for head in item.heads}
                ),
                neurons=sum(mlp.hidden for mlp in mlps),
                mlp_rows=rows.count * len(mlps),
                macs=macs[part, rows],
            )
            found.append(row)
        if not ranges:
            found.append(PlanRow(part=part))
    tokens = " + ".join(shape.name_of(stream.rows) for stream in plan.readout)
    read = macs["classifier", shape.all_rows]
    found.append(PlanRow(part="classifier", tokens=tokens, streams=len(plan.readout), macs=read))
    return tuple(found)


def _asking(attention: AttentionPlan, rows: Rows) -> Rows:
    """The queries that a range of tokens serves: its own, or else those it has most tokens of."""

    def common(own: Rows) -> int:
        return min(own.end, rows.end) - max(own.first, rows.first)

    asking = [head_set.rows for head_set in attention.head_sets]
    return rows if rows in asking else max(asking, key=common, default=rows)


class _Walk:
    """Walks along a compact model and yields its operations."""

    def __init__(self, shape: ViTShape, *, smooth: bool = False) -> None:
        self.shape = shape
        self.smooth = smooth
        self.part = "embed"
        self.tokens = shape.patch_rows
        self.in_sums: set[str] = set()
        """Products that their only reader computes onto its sum: those without a bias."""

    def make(
        self, kind: Kind, rows: int, outputs: int, *, inputs: int = 1, heads: int = 1
    ) -> Operation:
        """An operation of the part and the tokens at hand."""
        return Operation(self.part, self.tokens, kind, rows, outputs, inputs, heads)

    def embed(self) -> Iterator[Operation]:
        """The patch embedding: of all patches a convolution, of some a product."""
        shape, pixels = self.shape, self.shape.channels * self.shape.patch_size**2
        if shape.kept_patches is None:
            # Moved from [width, patches] to [patches, width].
            yield self.make("patch embedding", shape.num_patches, shape.width, inputs=pixels)
            yield self.make("copy", shape.num_patches, shape.width)
        else:
            # All are cut out of the image, then some chosen.
            yield self.make("copy", shape.grid_size**2, pixels)
            yield self.make("copy", shape.num_patches, pixels)
            yield self.make("product", shape.num_patches, shape.width, inputs=pixels)
        if shape.embed_norm:
            yield self.make("sum", shape.num_patches, shape.width)
            yield self.make("norm", shape.num_patches, shape.width)

    def classifier(self, streams: Sequence[StreamPlan]) -> Iterator[Operation]:
        """What is read, pooled if it is patches, and the product."""
        shape, self.tokens = self.shape, self.shape.all_rows
        for stream in streams:
            normalised = stream.rows.count
            if stream.rows == shape.patch_rows:
                yield self.make("sum", stream.rows.count, shape.width)
                # "mean" pools before the norm, "normed_mean" after it.
                normalised = 1 if shape.patch_readout == "mean" else normalised
            yield from self.stream(stream, normalised=normalised if shape.final_norm else 0)
        features = sum(shape.num_features(stream.rows) for stream in streams)
        if len(streams) > 1:
            yield self.make("copy", 1, features)
        yield self.make("product", 1, shape.num_classes, inputs=features)

    def stream(self, plan: StreamPlan, *, normalised: int) -> Iterator[Operation]:
        """A sum, and the LayerNorm of so many rows. Without terms both are constants."""
        if not plan.terms:
            return
        rows, width = plan.rows.count, self.shape.width
        for position, term in enumerate(plan.terms):
            if term.rows != plan.rows:
                yield self.make("copy", rows, width)
            if term.name in self.in_sums:
                yield self.make("sum in product", rows, width)
            elif position:
                yield self.make("sum", rows, width)
        if plan.table_rows or self.smooth:
            yield self.make("sum", rows, width)
        if normalised:
            yield self.make("norm", normalised, width)

    def attention(self, plan: AttentionPlan) -> Iterator[Operation]:
        """Streams, projections, head sets and outputs of a block."""
        shape = self.shape
        for stream in plan.streams:
            self.tokens = _asking(plan, stream.rows)
            yield from self.stream(stream, normalised=stream.rows.count)
        # Tokens of several streams are put into one matrix, once for all that read the same.
        read = [streams for item in plan.head_sets for streams in (item.keys, item.values)]
        read += [projection.streams for projection in plan.projections]
        for streams in dict.fromkeys(read):
            if len(streams) > 1:
                rows = sum(plan.streams[number].rows.count for number in streams)
                yield self.make("copy", rows, shape.width)
        for projection in plan.projections:
            self.tokens, rows = _asking(plan, projection.rows), projection.rows.count
            if plan.rows_of(projection.streams) != projection.rows:
                yield self.make("copy", rows, shape.width)
            columns = projection.num_columns * shape.head_dim
            yield self.make("product", rows, columns, inputs=shape.width)
            if rows > 1:
                # [rows, heads x head_dim] to [heads, rows, head_dim]; then into q, k and v.
                yield self.make("copy", rows, columns)
                yield self.make("copy", rows, columns)
        for head_set in plan.head_sets:
            self.tokens = head_set.rows
            yield from self.head_set(head_set)
        for output in plan.outputs:
            head_set = plan.head_sets[output.head_set]
            self.tokens = head_set.rows
            yield from self.output(head_set, output)

    def head_set(self, plan: HeadSetPlan) -> Iterator[Operation]:
        """All between the projections and the outputs."""
        shape, heads, rows = self.shape, len(plan.heads), plan.rows.count
        tokens, width, head_dim = shape.num_tokens, shape.width, shape.head_dim
        for letter, placed in (("q", rows), ("k", tokens)):
            if letter not in plan.constant:
                yield from self._place(heads * placed)
        if not plan.fixed_pattern:
            if plan.queries:
                yield self.make("product", rows, heads * width, inputs=width)
            elif plan.keys and "q" not in plan.constant:
                yield from self._each_head(heads, rows, head_dim, width)
            if plan.keys and "q" in plan.constant:
                # Constant queries that have absorbed the keys are weights: [heads x rows, width].
                yield self.make("product", tokens, heads * rows, inputs=width)
                yield self.make("copy", tokens, heads * rows)
            elif plan.keys:
                # All heads meet the same tokens, as one matrix per image.
                yield self.make("product per image", heads * rows, tokens, inputs=width)
            else:
                yield self.make("product per image", rows, tokens, inputs=head_dim, heads=heads)
            yield self.make("softmax", heads * rows, tokens)
        if plan.values:
            yield self.make("product per image", heads * rows, width, inputs=tokens)
        else:
            yield self.make("product per image", rows, head_dim, inputs=tokens, heads=heads)
        if plan.values and not plan.merged_values:
            yield from self._each_head(heads, rows, width, head_dim)

    def output(self, head_set: HeadSetPlan, plan: OutputPlan) -> Iterator[Operation]:
        """A product from heads to the stream."""
        shape, rows = self.shape, plan.rows.count
        inputs = len(plan.heads) * (shape.width if head_set.merged_values else shape.head_dim)
        if rows > 1:
            # [heads, rows, head_dim] to [rows, heads x head_dim].
            yield self.make("copy", rows, inputs)
        if set(plan.heads) != set(head_set.heads):
            yield self.make("copy", rows, inputs)
        yield self.make("product", rows, shape.width, inputs=inputs)
        self._write(plan.name, bias=plan.bias)

    def mlp(self, plan: MlpPlan) -> Iterator[Operation]:
        """A stream, two products, and what stands between them."""
        shape, self.tokens, rows = self.shape, plan.stream.rows, plan.stream.rows.count
        computed = shape.num_computed(plan.hidden)
        yield from self.stream(plan.stream, normalised=rows)
        yield self.make("product", rows, (1 + shape.gated) * computed, inputs=shape.width)
        if shape.gated:
            yield self.make("copy", rows, 2 * computed)
            yield self.make("sum", rows, computed)
        yield self.make("activation", rows, computed)
        if shape.neuron_norm:
            yield self.make("norm", rows, computed)
            if plan.hidden < computed or self.smooth:
                yield self.make("copy", rows, plan.hidden)
        yield self.make("product", rows, shape.width, inputs=plan.hidden)
        self._write(plan.name, bias=plan.bias)

    def _place(self, rows: int) -> Iterator[Operation]:
        """The norm and the rotation of queries or keys."""
        head_dim = self.shape.head_dim
        if self.shape.head_norm:
            yield self.make("norm", rows, head_dim)
        if self.shape.rotary:
            yield self.make("copy", rows, head_dim)
            yield self.make("sum", rows, 3 * head_dim)

    def _each_head(self, heads: int, rows: int, inputs: int, outputs: int) -> Iterator[Operation]:
        """A product of its own for each head, of all images at once, and back into images."""
        yield self.make("product", rows, outputs, inputs=inputs, heads=heads)
        yield self.make("copy", heads * rows, outputs)

    def _write(self, name: str, *, bias: bool) -> None:
        if not bias or self.smooth:
            self.in_sums.add(name)
