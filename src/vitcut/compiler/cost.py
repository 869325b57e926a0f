"""What a plan costs in time: its operations counted by kind, and how long each kind takes.

How long is calibrated against a runtime (``calibration.py``); MACs alone are counted in
``compact/macs.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from vitcut.compact.plan import (
    AttentionPlan,
    HeadSetPlan,
    MlpPlan,
    OutputPlan,
    Plan,
    ProjectionPlan,
    Rows,
    StreamPlan,
    ViTShape,
)
from vitcut.store import sha256_json

Unit = Literal[
    "call",
    "operation",
    "product",
    "weight",
    "small_product",
    "small_mac",
    "added",
    "moved",
    "normalised",
    "exponential",
    "activated",
    "patch_mac",
]
"""What takes time: the call itself; an operation of any kind; a MAC of a product with weights, its
columns rounded up to whole panels; a weight that is read; a product of two matrices per image and
head, and its MACs; elements that are added, copied, normalised, in a softmax, in an activation; a
MAC of the patch embedding."""
Counts = dict[Unit, float]


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Nanoseconds per unit, on one thread of some machine in some runtime."""

    nanoseconds: dict[Unit, float] = field(default_factory=lambda: dict(_DEFAULT))
    batch: int = 64
    """Images per call."""
    origin: str = "shipped"
    """Where the costs are from."""
    smooth: bool = False
    """For choices between small parts: each saves its share of what is saved only once several are
    cut. Columns count one by one, not in panels; every stream has a table, and so no product has a
    bias, though the first cut alone makes that so."""

    @property
    def fingerprint(self) -> str:
        """Tells costs apart: where they are from, and a hash of the numbers."""
        return f"{self.origin} {sha256_json(sorted(self.nanoseconds.items()))[:12]}"

    def latency_ms(self, plan: Plan) -> float:
        """The predicted latency of a compact model for one call, in ms."""
        return self._time(count_operations(plan, self)) / 1e6

    def latency_by_part(self, plan: Plan) -> dict[str, float]:
        """The same for the embedding, each block and the classifier, in ms."""
        parts = {"embed": replace(plan, blocks=(), readout=())}
        for number, block in enumerate(plan.blocks):
            parts[f"block {number}"] = replace(plan, embeds=False, blocks=(block,), readout=())
        parts["classifier"] = replace(plan, embeds=False, blocks=())
        call = self.nanoseconds["call"] / 1e6
        return {name: self.latency_ms(part) - call for name, part in parts.items()}

    def prefers(self, shape: ViTShape, one: HeadSetPlan, other: HeadSetPlan) -> bool:
        """Whether a head set with its own queries and outputs is faster than another."""
        counts = [_Counter(shape, self).whole_set(head_set) for head_set in (one, other)]
        return self._time(counts[0]) < self._time(counts[1])

    def _time(self, counts: Counts) -> float:
        return sum(self.nanoseconds[unit] * number for unit, number in counts.items())


_PANEL = 16
"""Columns of a product that CPU kernels compute together: fewer take as long."""

_DEFAULT: dict[Unit, float] = {
    "call": 3000.0,
    "operation": 1000.0,
    "product": 0.021,
    "weight": 0.05,
    "small_product": 500.0,
    "small_mac": 0.03,
    "added": 0.17,
    "moved": 0.12,
    "normalised": 0.4,
    "exponential": 0.55,
    "activated": 0.65,
    "patch_mac": 0.019,
}
"""ONNX Runtime 1.31 on one core of an AMD EPYC with AVX-512, from its operations timed alone."""


def count_operations(plan: Plan, costs: CostModel) -> Counts:
    """What a compact model does in one call, as a cost model sees it."""
    counter = _Counter(plan.shape, costs)
    counter.counts["call"] = 1
    if plan.embeds:
        counter.embed()
    for block in plan.blocks:
        if block.attention is not None:
            counter.attention(block.attention)
        for mlp in block.mlps:
            counter.mlp(mlp)
    counter.classifier(plan.readout)
    return counter.counts


class _Counter:
    """Counts along the modules of ``compact/``, operation by operation."""

    def __init__(self, shape: ViTShape, costs: CostModel) -> None:
        self.shape = shape
        self.batch = costs.batch
        self.smooth = costs.smooth
        self.panel = 1 if costs.smooth else _PANEL
        self.counts: Counts = dict.fromkeys(get_args(Unit), 0.0)
        self.onto: set[str] = set()
        """Products that their only reader computes onto its sum."""

    def add(self, unit: Unit, per_image: float) -> None:
        """One operation that handles so many elements of each image."""
        self.counts["operation"] += 1
        self.counts[unit] += per_image * self.batch

    def product(self, rows: int, inputs: int, outputs: int) -> None:
        """A product of so many rows of each image with weights."""
        self.add("product", rows * inputs * self._columns(outputs))
        self.counts["weight"] += inputs * outputs

    def per_head(self, heads: int, rows: int, inputs: int, outputs: int) -> None:
        """A product of two matrices for each head of each image."""
        self.add("small_product", heads)
        self.counts["small_mac"] += self.batch * heads * rows * inputs * outputs

    def embed(self) -> None:
        shape = self.shape
        patch = shape.channels * shape.patch_size**2
        self.add("patch_mac", shape.num_patches * shape.width * patch)
        self.add("moved", shape.num_patches * shape.width)
        if shape.embed_norm:
            self.add("added", shape.num_patches * shape.width)
            self.add("normalised", shape.num_patches * shape.width)

    def classifier(self, streams: Sequence[StreamPlan]) -> None:
        """What is read, pooled where it is patches, and the product."""
        shape = self.shape
        for stream in streams:
            rows = stream.rows.count
            if stream.rows == shape.patch_rows:
                self.add("added", rows * shape.width)
                rows = 1 if shape.patch_readout == "mean" else rows
            self.stream(stream, normalised=rows if shape.final_norm else 0)
        features = sum(shape.num_features(stream.rows) for stream in streams)
        if len(streams) > 1:
            self.add("moved", features)
        if streams:
            self.product(1, features, shape.num_classes)

    def stream(self, plan: StreamPlan, *, normalised: int | None = None) -> None:
        """A sum and the LayerNorm of its rows, or of so many."""
        size = plan.rows.count * self.shape.width
        if not plan.terms:
            return
        for term in plan.terms:
            if term.rows != plan.rows:
                self.add("moved", size)
        for position, term in enumerate(plan.terms):
            if term.name in self.onto:
                self.counts["moved"] += size * self.batch
            elif position:
                self.add("added", size)
        if plan.table_rows or self.smooth:
            self.add("added", size)
        if normalised != 0:
            self.add("normalised", (normalised or plan.rows.count) * self.shape.width)

    def mlp(self, plan: MlpPlan) -> None:
        rows, width = plan.stream.rows.count, self.shape.width
        computed = self.shape.num_computed(plan.hidden)
        self.stream(plan.stream)
        if self.shape.gated:
            self.product(rows, width, 2 * computed)
            self.add("moved", 2 * rows * computed)
            self.add("added", rows * computed)
        else:
            self.product(rows, width, computed)
        self.add("activated", rows * computed)
        if self.shape.neuron_norm:
            self.add("normalised", rows * computed)
            # Smooth costs know no steps: the first neuron that is cut saves what the next one does.
            if plan.hidden < computed or self.smooth:
                self.add("moved", rows * plan.hidden)
        self.product(rows, plan.hidden, width)
        self._write(plan.name, bias=plan.bias)

    def attention(self, plan: AttentionPlan) -> None:
        for stream in plan.streams:
            self.stream(stream)
        joined = {
            streams for head_set in plan.head_sets for streams in (head_set.keys, head_set.values)
        }
        joined |= {projection.streams for projection in plan.projections}
        for streams in joined:
            if len(streams) > 1:
                rows = sum(plan.streams[number].rows.count for number in streams)
                self.add("moved", rows * self.shape.width)
        for projection in plan.projections:
            self._projection(plan, projection)
        for head_set in plan.head_sets:
            self.head_set(head_set)
        for output in plan.outputs:
            self.output(plan.head_sets[output.head_set], output)

    def head_set(self, plan: HeadSetPlan) -> None:
        """What a head set computes itself."""
        shape, heads, rows = self.shape, len(plan.heads), plan.rows.count
        tokens = shape.num_tokens
        computed = {"q": heads * rows, "k": heads * tokens}
        for letter in computed.keys() - set(plan.constant):
            self._placed(computed[letter] * shape.head_dim)
        if not plan.fixed_pattern:
            if plan.queries:
                self.product(rows, shape.width, heads * shape.width)
            elif plan.keys and "q" not in plan.constant:
                self._each_head(heads, rows, shape.head_dim, shape.width)
            if plan.keys and "q" in plan.constant:
                self.product(tokens, shape.width, heads * rows)
                self.add("moved", heads * rows * tokens)
            elif plan.keys:
                self.per_head(1, heads * rows, shape.width, tokens)
            else:
                self.per_head(heads, rows, shape.head_dim, tokens)
            self.add("exponential", heads * rows * tokens)
        if plan.values:
            self.per_head(1, heads * rows, tokens, shape.width)
        else:
            self.per_head(heads, rows, tokens, shape.head_dim)
        if plan.values and not plan.merged_values:
            self._each_head(heads, rows, shape.width, shape.head_dim)

    def output(self, head_set: HeadSetPlan, plan: OutputPlan) -> None:
        """A product from heads to the stream."""
        shape, rows = self.shape, plan.rows.count
        inputs = len(plan.heads) * (shape.width if head_set.merged_values else shape.head_dim)
        if rows > 1:
            self.add("moved", rows * inputs)
        if set(plan.heads) != set(head_set.heads):
            self.add("moved", rows * inputs)
        self.product(rows, inputs, shape.width)
        self._write(plan.name, bias=plan.bias)

    def whole_set(self, plan: HeadSetPlan) -> Counts:
        """What a head set costs with its own queries and output."""
        shape, heads = self.shape, len(plan.heads)
        if not plan.queries and "q" not in plan.constant:
            self.product(plan.rows.count, shape.width, heads * shape.head_dim)
        self.head_set(plan)
        self.output(
            plan, OutputPlan(name="", head_set=0, heads=plan.heads, rows=plan.rows, bias=True)
        )
        return self.counts

    def _projection(self, attention: AttentionPlan, plan: ProjectionPlan) -> None:
        shape, rows = self.shape, plan.rows
        own = [attention.streams[number].rows for number in plan.streams]
        if Rows(first=own[0].first, end=own[-1].end) != rows:
            self.add("moved", rows.count * shape.width)
        columns = plan.num_columns * shape.head_dim
        self.product(rows.count, shape.width, columns)
        if rows.count > 1:
            self.add("moved", rows.count * columns)
            self.add("moved", rows.count * columns)

    def _placed(self, size: int) -> None:
        """What queries or keys pass between their product and the attention."""
        if self.shape.head_norm:
            self.add("normalised", size)
        if self.shape.rotary:
            self.add("moved", size)
            self.add("added", 3 * size)

    def _each_head(self, heads: int, rows: int, inputs: int, outputs: int) -> None:
        """A product of its own for each head, for all images at once."""
        self.add("product", heads * rows * inputs * self._columns(outputs))
        self.add("moved", heads * rows * outputs)
        self.counts["weight"] += heads * inputs * outputs

    def _columns(self, outputs: int) -> int:
        return self.panel * -(-outputs // self.panel)

    def _write(self, name: str, *, bias: bool) -> None:
        if not bias or self.smooth:
            self.onto.add(name)
