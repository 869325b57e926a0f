"""Incremental masked forward: what one more cut edge changes, and nothing else is computed.

ACDC visits targets from the classifier backwards, so while an edge into a target is tested,
everything upstream of that target is still clean: the change ``ablated - clean`` of a source is
fixed, and a change runs only along kept edges downstream. Which edges are cut is left to ``acdc``.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.errors import ConfigError
from vitcut.intervention.forward import (
    attend,
    classify,
    normalise,
    output_bias,
    project_head,
    run_mlp,
    write_head,
)
from vitcut.intervention.masking import full_run
from vitcut.intervention.oracle import Oracle
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.names import LETTERS
from vitcut.shapes import Float, Tensor
from vitcut.vits.weights import ViTWeights

_TRACE_CHUNK = 32
_READOUT = slice(0, 1)
_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Activations that stay fixed during a discovery, one row per pair; serves any tau.

    Source values are kept at stream width: sums over sources are what the search spends its
    time on. ``pairs`` stands for images under ``mean`` and ``zero``.
    """

    change: Float[Tensor, "sources pairs tokens width"]
    """Ablated minus clean value of every source."""
    ablated: Float[Tensor, "sources pairs tokens width"]
    """Ablated value of every source; expanded, not copied, under ``mean`` and ``zero``."""
    full_log_probs: Float[Tensor, "pairs groups"]
    """Task distribution of the uncut model, float64."""

    @property
    def precision(self) -> str:
        """``float32`` or ``float64``."""
        return str(self.change.dtype).removeprefix("torch.")

    @classmethod
    def build(
        cls, weights: ViTWeights, oracle: Oracle, *, memory_gib: float, dtype: torch.dtype
    ) -> "Cache":
        """Trace the clean and the corrupted images.

        Raises:
            ConfigError: The activations would not fit into ``memory_gib``.
        """
        examples = oracle.examples
        _check_memory(weights, len(examples.clean), memory_gib, dtype)
        shape = (len(weights.graph.sources), len(examples.clean), weights.num_tokens, weights.width)
        change = torch.empty(shape, dtype=dtype, device=weights.device)
        table = None if oracle.fill is None else oracle.fill.sources
        if table is None:
            ablated = torch.empty_like(change)
        else:
            ablated = table.to(dtype)[:, None].expand(shape)
        pixels = examples.pixels.to(weights.device, dtype)
        low = weights.to(dtype)
        for pairs in torch.arange(shape[1]).split(_TRACE_CHUNK):
            span = slice(int(pairs[0]), int(pairs[-1]) + 1)
            if table is None:
                ablated[:, span] = _traced(low, pixels[examples.corrupted[span]])
            change[:, span] = ablated[:, span] - _traced(low, pixels[examples.clean[span]])
        full = oracle.full_log_probs[torch.from_numpy(examples.clean)]
        return cls(change=change, ablated=ablated, full_log_probs=full)


@dataclass(kw_only=True)
class Values:
    """Current values of the live part of a circuit; also holds a pending change of some of them."""

    inputs: dict[int, Float[Tensor, "pairs rows width"]] = field(default_factory=dict)
    """Per target: its input before the LayerNorm."""
    letters: dict[int, Float[Tensor, "pairs rows head_dim"]] = field(default_factory=dict)
    """Per q, k or v target: what is computed from its input."""
    patterns: dict[int, Float[Tensor, "pairs queries keys"]] = field(default_factory=dict)
    """Per head source: its attention pattern."""
    outputs: dict[int, Float[Tensor, "pairs rows features"]] = field(default_factory=dict)
    """Per source: z of a head (before its output projection), what an MLP writes."""

    def update(self, other: "Values") -> None:
        """Take over every value that ``other`` holds."""
        self.inputs.update(other.inputs)
        self.letters.update(other.letters)
        self.patterns.update(other.patterns)
        self.outputs.update(other.outputs)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One more edge cut, not yet accepted."""

    kl: float
    """Mean KL(full || circuit) with that edge cut, in nats."""
    pending: Values


class Propagation:
    """The state of a search: a circuit whose targets before a frontier are all uncut."""

    def __init__(self, weights: ViTWeights, cache: Cache, oracle: Oracle) -> None:
        """Call ``rebuild`` before the first trial."""
        self._weights = weights.to(cache.change.dtype)
        self._graph = weights.graph
        self._cache = cache
        self._examples = oracle.examples
        self._values = Values()
        self._readers: dict[int, list[int]] = {}
        self._rows: dict[int, slice] = {}
        self._streams: dict[int, Tensor] = {}
        self._evaluations = 0
        self._rebuilt: tuple[bytes, int] | None = None
        self._rebuilt_kl = 0.0

    def take_evaluations(self) -> int:
        """Sources recomputed since the last call, rebuilding included."""
        count, self._evaluations = self._evaluations, 0
        return count

    def is_live(self, target: int) -> bool:
        """Whether what is computed from a target can reach the classifier by kept edges."""
        return target in self._rows

    @torch.no_grad()
    def rebuild(self, kept: NDArray[np.bool_], frontier: int) -> float:
        """Compute the state of a circuit afresh.

        Args:
            kept: True where an edge is kept, shape [sources, targets].
            frontier: A block; every edge into the blocks before it is kept.

        Returns:
            Mean KL(full || circuit) in nats.
        """
        state = (kept.tobytes(), frontier)
        if state == self._rebuilt:
            return self._rebuilt_kl
        self._find_live(kept)
        self._values = Values()
        first = self._graph.head_source(frontier, 0)
        for source in range(first, len(self._graph.sources)):
            targets = self._graph.targets_of(source)
            if targets[0] in self._rows:
                inputs = {item: self._summed_input(kept, item, first) for item in targets}
                self._compute(source, inputs, self._values)
        readout = self._summed_input(kept, self._graph.classifier, first)
        self._values.inputs[self._graph.classifier] = readout
        self._rebuilt, self._rebuilt_kl = state, self._kl(readout)
        return self._rebuilt_kl

    @torch.no_grad()
    def try_cut(self, source: int, target: int) -> Trial:
        """Cut one more edge and follow the change along kept edges.

        Args:
            source: A clean source, upstream of every cut edge's target but this one's.
            target: A live target.
        """
        pending = Values()
        changed = {target: self._cache.change[source][:, self._rows[target]]}
        first = len(self._graph.sources)
        if target != self._graph.classifier:
            first = self._graph.sources_of(target)[0]
        for node in range(first, len(self._graph.sources)):
            inputs = {
                item: self._values.inputs[item] + changed.pop(item)
                for item in self._graph.targets_of(node)
                if item in changed
            }
            if inputs:
                change = self._compute(node, inputs, pending)
                self._spread(node, change, changed)
        readout = self._values.inputs[self._graph.classifier]
        if self._graph.classifier in changed:
            readout = readout + changed[self._graph.classifier]
        pending.inputs[self._graph.classifier] = readout
        return Trial(kl=self._kl(readout), pending=pending)

    def accept(self, trial: Trial) -> None:
        """Make a trial's values the current ones."""
        self._values.update(trial.pending)
        self._rebuilt = None

    def _spread(self, source: int, change: Tensor, changed: dict[int, Tensor]) -> None:
        for reader in self._readers[source]:
            seen = change[:, self._rows[reader]]
            changed[reader] = changed[reader] + seen if reader in changed else seen

    def _compute(self, source: int, inputs: dict[int, Tensor], into: Values) -> Tensor:
        """Recompute a source from new inputs; returns what it writes more than before."""
        self._evaluations += 1
        into.inputs.update(inputs)
        if self._graph.sources[source].kind == "mlp":
            return self._compute_mlp(source, inputs, into)
        return self._compute_head(source, inputs, into)

    def _compute_mlp(self, source: int, inputs: dict[int, Tensor], into: Values) -> Tensor:
        block = self._weights.blocks[self._graph.sources[source].layer]
        (stream,) = inputs.values()
        written = run_mlp(block.mlp, normalise(block.mlp_norm, stream))
        into.outputs[source] = written
        before = self._values.outputs.get(source)
        return written if before is None else written - before

    def _compute_head(self, source: int, inputs: dict[int, Tensor], into: Values) -> Tensor:
        item = self._graph.sources[source]
        block = self._weights.blocks[item.layer]
        targets = self._graph.targets_of(source)
        for letter, target in zip(LETTERS, targets, strict=True):
            if target in inputs:
                normed = normalise(block.attn_norm, inputs[target])
                into.letters[target] = project_head(block.attn, letter, item.head, normed)
        q, k, v = (
            into.letters[target] if target in into.letters else self._values.letters[target]
            for target in targets
        )
        if targets[0] in inputs or targets[1] in inputs:
            into.patterns[source] = attend(q, k, block.attn.scale)
            pattern = into.patterns[source]
        else:
            pattern = self._values.patterns[source]
        z = pattern @ v
        into.outputs[source] = z
        before = self._values.outputs.get(source)
        return write_head(block.attn, item.head, z if before is None else z - before)

    def _summed_input(self, kept: NDArray[np.bool_], target: int, first: int) -> Tensor:
        """A target's input from scratch; sources before ``first`` are clean."""
        rows = self._rows[target]
        readable = self._graph.num_written(target)
        read = np.flatnonzero(kept[:readable, target]).tolist()
        if len(read) == readable and readable <= first:
            return self._stream(target, clean=True)[:, rows]
        total = self._stream(target, clean=False)[:, rows].clone()
        for source in read:
            if source < first:
                total -= self._cache.change[source][:, rows]
            else:
                total += self._written(source, rows) - self._cache.ablated[source][:, rows]
        return total

    def _written(self, source: int, rows: slice) -> Tensor:
        item = self._graph.sources[source]
        value = self._values.outputs[source][:, rows]
        if item.kind == "mlp":
            return value
        return write_head(self._weights.blocks[item.layer].attn, item.head, value)

    def _stream(self, target: int, *, clean: bool) -> Tensor:
        """All ablated (or all clean) values that a target can read, with output biases."""
        readable = self._graph.num_written(target)
        key = readable if clean else -readable
        if key not in self._streams:
            total = self._cache.ablated[:readable].sum(0)
            if clean:
                total -= self._cache.change[:readable].sum(0)
            self._streams[key] = total + output_bias(self._weights, readable)
        return self._streams[key]

    def _kl(self, readout: Tensor) -> float:
        logits = classify(self._weights, readout[:, 0]).double()
        examples = self._examples
        log_probs = coarse_log_probs(logits, examples.group_of_class, examples.num_groups)
        return float(kl_divergence(self._cache.full_log_probs, log_probs).mean())

    def _find_live(self, kept: NDArray[np.bool_]) -> None:
        """Which targets matter, which of their token rows, and who reads each source."""
        self._rows = {self._graph.classifier: _READOUT}
        self._readers = {}
        for source in reversed(range(len(self._graph.sources))):
            readers = [int(u) for u in np.flatnonzero(kept[source]) if u in self._rows]
            self._readers[source] = readers
            if readers:
                all_rows = any(self._rows[reader] == _ALL for reader in readers)
                self._set_rows(source, _ALL if all_rows else _READOUT)

    def _set_rows(self, source: int, rows: slice) -> None:
        """Queries and MLPs need the rows that are read of their source; keys and values all."""
        for target in self._graph.targets_of(source):
            keys_or_values = self._graph.targets[target].kind in {"k", "v"}
            self._rows[target] = _ALL if keys_or_values else rows


def _traced(weights: ViTWeights, pixels: Tensor) -> Float[Tensor, "sources pairs tokens width"]:
    with torch.no_grad():
        return torch.stack(full_run(weights, pixels).sources)


def _check_memory(weights: ViTWeights, pairs: int, memory_gib: float, dtype: torch.dtype) -> None:
    graph = weights.graph
    tensors = 2 * len(graph.sources) + 2 * len(graph.targets)
    values = tensors * pairs * weights.num_tokens * weights.width
    needed = values * torch.finfo(dtype).bits / 8 / 2**30
    if needed > memory_gib:
        raise ConfigError(
            f"{pairs} pairs need about {needed:.1f} GiB of cached activations, memory-gib allows "
            f"{memory_gib:g}: use fewer images, or raise memory-gib"
        )
