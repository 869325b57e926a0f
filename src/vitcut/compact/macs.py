"""What a plan costs: multiply-accumulates of every matrix product, per image, part by part."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from vitcut.compact.plan import (
    AttentionPlan,
    BlockPlan,
    HeadSetPlan,
    OutputPlan,
    Plan,
    Rows,
    StreamPlan,
    ViTShape,
)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One line of the table that shows a plan to a person: a part of the model, for some tokens."""

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
    """Heads among them that compute no keys or no values, as few tokens ask."""
    neurons: int = 0
    """Those that are kept; under a norm over them all are computed."""
    mlp_rows: int = 0
    """Tokens that the MLP computes."""
    macs: int = 0
    """Multiply-accumulates per image."""


def count_macs(plan: Plan) -> int:
    """Multiply-accumulates per image of a compact model.

    Every matrix product counts: patch embedding, projections, attention's two, MLPs, classifier.
    """
    return sum(row.macs for row in describe(plan))


def describe(plan: Plan) -> tuple[PlanRow, ...]:
    """A plan as lines of a table: the embedding, the tokens of each block, the classifier."""
    shape = plan.shape
    rows = [PlanRow(part="embed", macs=_embed_macs(shape) if plan.embeds else 0)]
    for number, block in enumerate(plan.blocks):
        rows += _Block(shape, f"block {number}", block).rows()
    features = sum(shape.num_features(stream.rows) for stream in plan.readout)
    tokens = " + ".join(shape.name_of(stream.rows) for stream in plan.readout)
    macs = features * shape.num_classes
    return (
        *rows,
        PlanRow(part="classifier", tokens=tokens, streams=len(plan.readout), macs=macs),
    )


def dense_macs(shape: ViTShape) -> int:
    """Multiply-accumulates per image of the untouched model."""
    blocks = shape.num_layers * _dense_block_macs(shape)
    read = shape.num_read + (shape.patch_readout != "none")
    return _embed_macs(shape) + blocks + read * shape.width * shape.num_classes


def head_set_macs(shape: ViTShape, head_set: HeadSetPlan) -> int:
    """What a head set computes itself: all between its projections and its outputs."""
    each = head_set.rows.count * len(head_set.heads)
    small, large = shape.head_dim, shape.width
    total = 0
    if not head_set.fixed_pattern:
        total += each * shape.num_tokens * (large if head_set.keys else small)
    if head_set.queries:
        total += each * large * large
    elif head_set.keys and "q" not in head_set.constant:
        total += each * small * large
    total += each * shape.num_tokens * (large if head_set.values else small)
    if head_set.values and not head_set.merged_values:
        total += each * small * large
    return total


def output_macs(shape: ViTShape, head_set: HeadSetPlan, output: OutputPlan) -> int:
    """What a product from the heads of a head_set to the stream computes."""
    inputs = shape.width if head_set.merged_values else shape.head_dim
    return output.rows.count * len(output.heads) * inputs * shape.width


def mlp_macs(shape: ViTShape, hidden: int) -> int:
    """What an MLP computes for one token where so many of its neurons are kept."""
    first = (2 if shape.gated else 1) * shape.num_computed(hidden)
    return shape.width * (first + hidden)


@dataclass(kw_only=True)
class _Line:
    """What some tokens of a block compute."""

    heads: set[int] = field(default_factory=set[int])
    absorbed: set[int] = field(default_factory=set[int])
    row: PlanRow


class _Block:
    """Gathers the lines of a block: one per range of tokens that ask or have an own MLP."""

    def __init__(self, shape: ViTShape, part: str, plan: BlockPlan) -> None:
        self._shape = shape
        self._part = part
        self._plan = plan
        self._lines: dict[Rows, _Line] = {}

    def rows(self) -> Iterable[PlanRow]:
        if self._plan.attention is not None:
            self._attention(self._plan.attention)
        for mlp in self._plan.mlps:
            rows = mlp.stream.rows
            macs = rows.count * mlp_macs(self._shape, mlp.hidden)
            self._add(rows, streams=1, neurons=mlp.hidden, mlp_rows=rows.count, macs=macs)
        for rows, line in sorted(self._lines.items(), key=_place):
            asking = rows.count if line.heads else 0
            yield replace(
                line.row, heads=len(line.heads), absorbed=len(line.absorbed), query_rows=asking
            )
        if not self._lines:
            yield PlanRow(part=self._part)

    def _attention(self, plan: AttentionPlan) -> None:
        shape = self._shape
        for head_set in plan.head_sets:
            line = self._add(head_set.rows, macs=head_set_macs(shape, head_set))
            line.heads |= set(head_set.heads)
            line.absorbed |= set(head_set.heads if head_set.keys or head_set.values else ())
        for item in plan.projections:
            macs = item.rows.count * item.num_columns * shape.width * shape.head_dim
            self._add(self._asking(item.rows), macs=macs)
        for output in plan.outputs:
            head_set = plan.head_sets[output.head_set]
            self._add(head_set.rows, macs=output_macs(shape, head_set, output))
        for stream in plan.streams:
            self._stream(stream)

    def _stream(self, stream: StreamPlan) -> None:
        self._add(self._asking(stream.rows), streams=1)

    def _asking(self, rows: Rows) -> Rows:
        """The line of a range: its own, or that of the most tokens within it that ask."""
        if rows in self._lines or not self._lines:
            return rows
        return max(self._lines, key=lambda own: min(own.end, rows.end) - max(own.first, rows.first))

    def _add(self, rows: Rows, **counts: int) -> _Line:
        if rows not in self._lines:
            tokens = self._shape.name_of(rows)
            self._lines[rows] = _Line(row=PlanRow(part=self._part, tokens=tokens))
        line = self._lines[rows]
        sums = {name: getattr(line.row, name) + count for name, count in counts.items()}
        line.row = replace(line.row, **sums)
        return line


def _place(item: tuple[Rows, _Line]) -> tuple[int, int]:
    rows, _ = item
    return rows.first, rows.end


def _embed_macs(shape: ViTShape) -> int:
    return shape.num_patches * shape.width * shape.channels * shape.patch_size**2


def _dense_block_macs(shape: ViTShape) -> int:
    heads_width = shape.num_heads * shape.head_dim
    projections = 4 * shape.width * heads_width
    attention = 2 * shape.num_tokens * heads_width
    return shape.num_tokens * (projections + attention + mlp_macs(shape, shape.hidden))
