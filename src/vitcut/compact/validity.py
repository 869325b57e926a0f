"""Whether a plan that was read from a file can be computed, and means one thing only.

The check walks a plan as the forward passes of its modules do, with ranges of tokens in place of
tensors. Afterwards no index, name or range of the plan is out of place.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from vitcut.compact.plan import (
    EMBED,
    AttentionPlan,
    BlockPlan,
    HeadSetPlan,
    Plan,
    Rows,
    StreamPlan,
    ViTShape,
)
from vitcut.names import LETTERS, Letter

_MOST = 1 << 20
"""Above any size or number in a ViT; products of a few such numbers still fit into 64 bits."""


def find_fault(plan: Plan) -> str | None:
    """What is wrong with a plan, in a few words; None if nothing is."""
    return next(_faults(plan), None)


def _faults(plan: Plan) -> Iterator[str]:
    # Each check relies on the earlier ones, so only the first fault is told.
    shape = plan.shape
    yield from _faults_of_shape(shape)
    if len(plan.blocks) != shape.num_layers:
        yield f"it has {len(plan.blocks)} blocks, its shape says {shape.num_layers}"
    walk = _Walk(plan)
    for layer, block in enumerate(plan.blocks):
        yield from (f"block {layer}: {fault}" for fault in walk.block(block))
    kinds = [shape.kind_rows[kind] for kind in shape.readout]
    read = [stream.rows for stream in plan.readout]
    if read != [rows for rows in kinds if rows in read]:
        yield "the classifier reads other tokens than its readout, or in another order"
    for stream in plan.readout:
        pooled = shape.patch_readout == "mean" and stream.rows == shape.patch_rows
        yield from (f"readout: {fault}" for fault in walk.stream(stream, written=not pooled))
        if not stream.terms:
            yield f"readout: {stream.name} is the same for every image"
    for name in walk.biasless.keys() - walk.read.keys():
        yield f"nothing reads {name}, so that nothing holds its bias"


def _faults_of_shape(shape: ViTShape) -> Iterator[str]:
    least = {"num_prefix": 0, "num_read": 0}
    for name, value in vars(shape).items():
        if type(value) is int and not least.get(name, 1) <= value <= _MOST:
            yield f"{name} must be from {least.get(name, 1)} to {_MOST}, got {value}"
    if not 0 < shape.eps < 1:
        yield f"eps must be between 0 and 1, got {shape.eps}"
    if shape.image_size % shape.patch_size:
        yield f"patches of {shape.patch_size} pixels do not fill {shape.image_size} pixels"
    if shape.num_read > shape.num_prefix or not shape.readout:
        yield f"the classifier reads {shape.num_read} of {shape.num_prefix} prefix tokens"
    kept = shape.kept_patches
    if kept is not None and not (
        kept and list(kept) == sorted(set(kept)) and 0 <= kept[0] <= kept[-1] < shape.grid_size**2
    ):
        yield f"the kept patches are not rising numbers of {shape.grid_size**2} patches"
    if shape.rotary and shape.head_dim % 2:
        yield f"heads of {shape.head_dim} features cannot be rotated"


class _Walk:
    """What has been written so far, and what is read of it."""

    def __init__(self, plan: Plan) -> None:
        self._shape = plan.shape
        self.written: dict[str, Rows] = {EMBED: plan.shape.patch_rows} if plan.embeds else {}
        self.biasless: dict[str, Rows] = {}
        """Products without a bias, which are computed onto the sum of their only reader."""
        self.read: Counter[str] = Counter()

    def rows(self, rows: Rows) -> Iterator[str]:
        if not 0 <= rows.first < rows.end <= self._shape.num_tokens:
            yield f"tokens {rows.first} to {rows.end} of {self._shape.num_tokens}"

    def write(self, name: str, rows: Rows, *, bias: bool = True) -> Iterator[str]:
        if name in self.written:
            yield f"{name} is written twice"
        self.written[name] = rows
        if not bias:
            self.biasless[name] = rows

    def stream(self, plan: StreamPlan, *, written: bool = True) -> Iterator[str]:
        yield from self.rows(plan.rows)
        allowed = {1, plan.rows.count} if not plan.terms else {0, 1, plan.rows.count}
        if plan.table_rows not in allowed:
            yield f"{plan.name} has a table of {plan.table_rows} rows for {plan.rows.count} tokens"
        if len({term.name for term in plan.terms}) < len(plan.terms):
            yield f"{plan.name} adds a term twice"
        for term in plan.terms:
            if self.written.get(term.name) != term.rows:
                yield f"{plan.name} adds {term.name}, which was not written before for its tokens"
            if term.rows.first >= plan.rows.end or plan.rows.first >= term.rows.end:
                yield f"{plan.name} adds {term.name}, which has none of its tokens"
            self.read[term.name] += 1
            if term.name in self.biasless and (term.rows != plan.rows or self.read[term.name] > 1):
                yield f"{plan.name} cannot hold the bias of {term.name}"
        if plan.terms and written:
            yield from self.write(plan.name, plan.rows)

    def block(self, plan: BlockPlan) -> Iterator[str]:
        if plan.attention is not None:
            yield from self.attention(plan.attention)
        for mlp in plan.mlps:
            yield from self.stream(mlp.stream)
            if not mlp.stream.terms:
                yield f"{mlp.name} reads what is the same for every image"
            if not 1 <= mlp.hidden <= self._shape.hidden:
                yield f"{mlp.name} has {mlp.hidden} of {self._shape.hidden} neurons"
            yield from self.write(mlp.name, mlp.stream.rows, bias=mlp.bias)

    def attention(self, plan: AttentionPlan) -> Iterator[str]:
        for stream in plan.streams:
            yield from self.stream(stream)
        for item in plan.projections:
            yield from self.rows(item.rows)
            yield from self.joined(plan, item.streams, item.rows)
            for heads in (item.q, item.k, item.v):
                yield from self.heads(heads)
            if not item.num_columns:
                yield "a projection computes nothing"
            if (item.k or item.v) and item.rows != self._shape.all_rows:
                yield "keys or values of some tokens only"
        if not (plan.head_sets and plan.outputs):
            yield "an attention without heads or outputs"
        for item in plan.head_sets:
            yield from self.head_set(plan, item)
        used = {(letter, head) for item in plan.head_sets for letter, head in _computed(item)}
        for item in plan.projections:
            made = {(letter, head) for letter in LETTERS for head in getattr(item, letter)}
            if not made & used:
                yield "a projection that no head reads"
        outputs: set[tuple[int, tuple[int, ...]]] = set()
        for item in plan.outputs:
            yield from self.rows(item.rows)
            if not 0 <= item.head_set < len(plan.head_sets):
                yield f"{item.name} is of head set {item.head_set} of {len(plan.head_sets)}"
            head_set = plan.head_sets[item.head_set]
            order = [head_set.heads.index(head) for head in item.heads if head in head_set.heads]
            ordered = order == sorted(set(order)) and len(order) == len(item.heads) > 0
            if not ordered or (item.head_set, item.heads) in outputs:
                yield f"{item.name} is of heads {list(item.heads)} of {list(head_set.heads)}"
            outputs.add((item.head_set, item.heads))
            if not head_set.rows.covers(item.rows):
                yield f"{item.name} is of more tokens than its heads"
            yield from self.write(item.name, item.rows, bias=item.bias)

    def heads(self, heads: Sequence[int]) -> Iterator[str]:
        if len(set(heads)) < len(heads) or not set(heads) <= set(range(self._shape.num_heads)):
            yield f"heads {list(heads)} of {self._shape.num_heads}"

    def joined(self, plan: AttentionPlan, streams: Sequence[int], rows: Rows) -> Iterator[str]:
        """Streams whose tokens are put one after the other, and the tokens that are taken."""
        if not streams or not set(streams) <= set(range(len(plan.streams))):
            yield f"streams {list(streams)} of {len(plan.streams)}"
        own = [plan.streams[number] for number in streams]
        gaps = any(one.rows.end != other.rows.first for one, other in zip(own, own[1:]))  # noqa: B905, RUF007
        if gaps or not plan.rows_of(streams).covers(rows):
            yield f"streams {list(streams)} lack tokens {rows.first} to {rows.end}"
        if not any(stream.terms for stream in own):
            yield f"streams {list(streams)} are the same for every image"

    def head_set(self, plan: AttentionPlan, item: HeadSetPlan) -> Iterator[str]:
        yield from self.rows(item.rows)
        yield from self.heads(item.heads)
        everything = self._shape.all_rows
        constant = tuple(letter for letter in LETTERS if letter in item.constant)
        if not item.heads or item.constant != constant or set(constant) == set(LETTERS):
            yield f"heads {list(item.heads)} with constant {', '.join(item.constant)}"
        absorbs = {"q": item.queries, "k": item.keys, "v": item.values}
        for letter, streams in absorbs.items():
            if streams and letter in item.constant:
                yield f"{letter} is constant and absorbed"
            if streams:
                yield from self.joined(plan, streams, item.rows if letter == "q" else everything)
        if len(item.queries) > 1 or (item.queries and not item.keys):
            yield "merged queries without keys"
        if (item.keys and self._shape.needs_keys) or (item.merged_values and not item.values):
            yield "keys or values that cannot be absorbed"
        if item.keys and item.fixed_pattern:
            yield "keys of a fixed pattern"
        for letter, head in _computed(item):
            needed = item.rows if letter == "q" else everything
            if not any(
                head in getattr(one, letter) and one.rows.covers(needed) for one in plan.projections
            ):
                yield f"no projection computes {letter} of head {head}"


def _computed(item: HeadSetPlan) -> Iterator[tuple[Letter, int]]:
    """The letters and heads that projections compute for a head set."""
    absorbed: dict[Letter, tuple[int, ...]] = {"q": item.queries, "k": item.keys, "v": item.values}
    for letter in LETTERS:
        if letter not in item.constant and not absorbed[letter]:
            for head in item.heads:
                yield letter, head
