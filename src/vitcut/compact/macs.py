"""What a plan costs: multiply-accumulates of every matrix product, per image, part by part."""

from dataclasses import dataclass

from vitcut.compact.plan import AttentionPlan, BlockPlan, MlpPlan, Plan, ViTShape


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One line of the table that shows a plan to a person."""

    part: str
    """``embed``, ``block 0``, ..., ``classifier``."""
    streams: int
    """Sums with a LayerNorm each."""
    heads: int
    query_rows: int
    """Tokens that ask, at most; 1 where only the class token does."""
    neurons: int
    mlp_rows: int
    """Tokens that the MLP computes."""
    macs: int
    """Multiply-accumulates per image."""


def count_macs(plan: Plan) -> int:
    """Multiply-accumulates per image of a compact model.

    Every matrix product counts: patch embedding, projections, attention's two, MLPs, classifier.
    """
    return sum(row.macs for row in describe(plan))


def describe(plan: Plan) -> tuple[PlanRow, ...]:
    """A plan as lines of a table: the embedding, each block, the classifier."""
    shape = plan.shape
    rows = [_row("embed", macs=_embed_macs(shape) if plan.embeds else 0)]
    rows += [_describe_block(shape, i, block) for i, block in enumerate(plan.blocks)]
    if plan.classifier is None:
        return (*rows, _row("classifier", macs=0))
    return (*rows, _row("classifier", macs=shape.width * shape.num_classes, streams=1))


def dense_macs(shape: ViTShape) -> int:
    """Multiply-accumulates per image of the untouched model."""
    blocks = shape.num_layers * _dense_block_macs(shape)
    return _embed_macs(shape) + blocks + shape.width * shape.num_classes


def _describe_block(shape: ViTShape, number: int, block: BlockPlan) -> PlanRow:
    attention, mlp = block.attention, block.mlp
    groups = attention.groups if attention else ()
    macs = _attention_macs(shape, attention) if attention else 0
    macs += _mlp_macs(shape, mlp) if mlp else 0
    return PlanRow(
        part=f"block {number}",
        streams=(len(attention.streams) if attention else 0) + (mlp is not None),
        heads=sum(len(group.heads) for group in groups),
        query_rows=max((shape.num_rows(group.rows) for group in groups), default=0),
        neurons=mlp.hidden if mlp else 0,
        mlp_rows=shape.num_rows(mlp.stream.rows) if mlp else 0,
        macs=macs,
    )


def _row(part: str, *, macs: int, streams: int = 0) -> PlanRow:
    return PlanRow(
        part=part, streams=streams, heads=0, query_rows=0, neurons=0, mlp_rows=0, macs=macs
    )


def _embed_macs(shape: ViTShape) -> int:
    return shape.num_patches * shape.width * shape.channels * shape.patch_size**2


def _attention_macs(shape: ViTShape, plan: AttentionPlan) -> int:
    width, head_dim = shape.width, shape.head_dim
    total = 0
    for projection in plan.projections:
        total += shape.num_rows(projection.rows) * projection.num_columns * width * head_dim
    for group in plan.groups:
        products = 1 if group.fixed_pattern else 2
        pairs = shape.num_rows(group.rows) * shape.num_tokens
        total += products * pairs * len(group.heads) * head_dim
    for output in plan.outputs:
        total += shape.num_rows(output.rows) * len(output.heads) * width * head_dim
    return total


def _mlp_macs(shape: ViTShape, plan: MlpPlan) -> int:
    return 2 * shape.num_rows(plan.stream.rows) * shape.width * plan.hidden


def _dense_block_macs(shape: ViTShape) -> int:
    heads_width = shape.num_heads * shape.head_dim
    projections = 4 * shape.width * heads_width
    attention = 2 * shape.num_tokens * heads_width
    mlp = 2 * shape.width * shape.hidden
    return shape.num_tokens * (projections + attention + mlp)
