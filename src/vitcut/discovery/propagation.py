"""Incremental masked forward: what one more cut edge changes, and nothing else is computed.

ACDC visits targets from the classifier backwards, so while an edge into a target is tested,
everything upstream of that target is still clean: the change ``ablated - clean`` of a source is
fixed, and a change runs only along kept edges downstream. Which edges are cut is left to ``acdc``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.discovery.cache import Cache
from vitcut.graph import Graph
from vitcut.masked.oracle import Oracle
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.model.forward import (
    attend,
    classify,
    normalise,
    output_bias,
    project_head,
    read_out,
    run_mlp,
    write_head,
)
from vitcut.model.weights import ViTWeights
from vitcut.names import Letter
from vitcut.shapes import Float, Tensor

K = TypeVar("K")

_ALL = slice(None)


@dataclass(kw_only=True)
class Values:
    """Current values of the live part of a circuit; also holds a pending change of some of them.

    A node is a source of the unsplit graph: a head or an MLP with its sources of all token kinds.
    """

    inputs: dict[int, Float[Tensor, "pairs rows width"]] = field(default_factory=dict)
    """Per target: its input before the LayerNorm."""
    queries: dict[int, Float[Tensor, "pairs rows head_dim"]] = field(default_factory=dict)
    """Per head source: what is computed from its q input."""
    attended: dict[tuple[int, Letter], Float[Tensor, "pairs tokens head_dim"]] = field(
        default_factory=dict
    )
    """Per head node: its keys, and its values, of all token kinds."""
    patterns: dict[int, Float[Tensor, "pairs queries keys"]] = field(default_factory=dict)
    """Per head source: its attention pattern."""
    outputs: dict[int, Float[Tensor, "pairs rows features"]] = field(default_factory=dict)
    """Per source: z of a head (before its output projection), what an MLP writes."""

    def update(self, other: "Values") -> None:
        """Take over every value that ``other`` holds."""
        self.inputs.update(other.inputs)
        self.queries.update(other.queries)
        self.attended.update(other.attended)
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
        self._graph = oracle.graph
        self._nodes = oracle.graph.unsplit.sources
        self._tokens = weights.rows_of(oracle.graph)
        self._reads = _inputs_of_nodes(oracle.graph)
        self._cache = cache
        self._examples = oracle.examples
        self._values = Values()
        self._readers: dict[int, list[int]] = {}
        self._rows: dict[int, slice] = {}
        """Per live target: which of its kind's tokens matter."""
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
        first = self._graph.unsplit.head_source(frontier, 0)
        for node in range(first, len(self._nodes)):
            live = [target for target in self._reads[node] if target in self._rows]
            if live:
                inputs = {target: self._summed_input(kept, target, first) for target in live}
                self._compute(node, inputs, self._values)
        for target in self._graph.classifiers:
            self._values.inputs[target] = self._summed_input(kept, target, first)
        self._rebuilt, self._rebuilt_kl = state, self._kl(self._readout(Values()))
        return self._rebuilt_kl

    @torch.no_grad()
    def try_cut(self, source: int, target: int) -> Trial:
        """Cut one more edge and follow the change along kept edges.

        Args:
            source: A clean source, upstream of every cut edge's target but this one's.
            target: A live target.
        """
        pending = Values()
        changed = {target: self._seen(self._cache.change[self._node(source)], target)}
        fed = self._graph.sources_of(target)
        for node in range(self._node(fed[0]) if fed else len(self._nodes), len(self._nodes)):
            inputs = self._moved(self._reads[node], changed)
            if inputs:
                for written, change in self._compute(node, inputs, pending).items():
                    self._spread(written, change, changed)
        pending.inputs.update(self._moved(self._graph.classifiers, changed))
        return Trial(kl=self._kl(self._readout(pending)), pending=pending)

    def accept(self, trial: Trial) -> None:
        """Make a trial's values the current ones."""
        self._values.update(trial.pending)
        self._rebuilt = None

    def _moved(self, targets: Sequence[int], changed: dict[int, Tensor]) -> dict[int, Tensor]:
        """The new inputs of those targets whose input changed."""
        return {
            target: self._values.inputs[target] + changed.pop(target)
            for target in targets
            if target in changed
        }

    def _spread(self, source: int, change: Tensor, changed: dict[int, Tensor]) -> None:
        for reader in self._readers[source]:
            seen = change[:, self._rows[reader]]
            changed[reader] = changed[reader] + seen if reader in changed else seen

    def _compute(self, node: int, inputs: dict[int, Tensor], into: Values) -> dict[int, Tensor]:
        """Recompute a node's sources from new inputs; returns what each writes more than before."""
        into.inputs.update(inputs)
        mlp = self._nodes[node].role == "mlp"
        changes = (self._compute_mlp if mlp else self._compute_head)(node, inputs, into)
        self._evaluations += len(changes)
        return changes

    def _compute_mlp(self, node: int, inputs: dict[int, Tensor], into: Values) -> dict[int, Tensor]:
        block = self._weights.blocks[self._nodes[node].layer]
        changes: dict[int, Tensor] = {}
        for target, stream in inputs.items():
            (source,) = self._graph.sources_of(target)
            written = run_mlp(block.mlp, normalise(block.mlp_norm, stream))
            before = self._values.outputs.get(source)
            into.outputs[source] = written
            changes[source] = written if before is None else written - before
        return changes

    def _compute_head(
        self, node: int, inputs: dict[int, Tensor], into: Values
    ) -> dict[int, Tensor]:
        """Keys and values are shared by the head's sources of all kinds, queries are not."""
        item, kinds = self._nodes[node], range(self._graph.num_kinds)
        shared = self._attend_to(node, "k", inputs, into), self._attend_to(node, "v", inputs, into)
        changes: dict[int, Tensor] = {}
        for kind in kinds:
            query = self._graph.head_target(item.layer, item.head, "q", kind)
            if query in inputs or (any(shared) and self.is_live(query)):
                source = self._graph.head_source(item.layer, item.head, kind)
                changes[source] = self._compute_group(source, inputs.get(query), into)
        return changes

    def _attend_to(
        self, node: int, letter: Letter, inputs: dict[int, Tensor], into: Values
    ) -> bool:
        """Recompute keys or values of those kinds whose input changed; whether any did."""
        item, kinds = self._nodes[node], range(self._graph.num_kinds)
        targets = [self._graph.head_target(item.layer, item.head, letter, g) for g in kinds]
        if not any(target in inputs for target in targets):
            return False
        block = self._weights.blocks[item.layer]
        parts: list[Tensor] = []
        for target, tokens in zip(targets, self._tokens, strict=True):
            if target in inputs:
                normed = normalise(block.attn_norm, inputs[target])
                rows = self._tokens_of(target)
                parts.append(project_head(block.attn, letter, item.head, normed, rows))
            else:
                parts.append(self._values.attended[node, letter][:, tokens])
        into.attended[node, letter] = _joined(parts)
        return True

    def _compute_group(self, source: int, query: Tensor | None, into: Values) -> Tensor:
        """A head's source of one kind: what it writes more than before."""
        now, node, item = self._values, self._node(source), self._graph.sources[source]
        block = self._weights.blocks[item.layer]
        if query is not None:
            normed = normalise(block.attn_norm, query)
            kind = self._graph.kind_number(item)
            rows = self._tokens_of(self._graph.head_target(item.layer, item.head, "q", kind))
            into.queries[source] = project_head(block.attn, "q", item.head, normed, rows)
        if query is not None or (node, "k") in into.attended:
            q = _latest(source, into.queries, now.queries)
            k = _latest((node, "k"), into.attended, now.attended)
            into.patterns[source] = attend(q, k, block.attn.scale)
        pattern = _latest(source, into.patterns, now.patterns)
        z = pattern @ _latest((node, "v"), into.attended, now.attended)
        before = now.outputs.get(source)
        into.outputs[source] = z
        return write_head(block.attn, item.head, z if before is None else z - before)

    def _summed_input(self, kept: NDArray[np.bool_], target: int, first: int) -> Tensor:
        """A target's input from scratch; nodes before ``first`` are clean."""
        rows, cache = self._rows[target], self._cache
        readable = self._graph.readable(target)
        written = self._graph.num_written(target)
        read = [source for source in readable if kept[source, target]]
        if len(read) == len(readable) and written <= first:
            return self._seen(self._stream(written, clean=True), target)
        total = self._seen(self._stream(written, clean=False), target).clone()
        for source in read:
            node = self._node(source)
            if node < first:
                total -= self._seen(cache.change[node], target)
            else:
                total += self._written(source, rows) - self._seen(cache.ablated[node], target)
        return total

    def _written(self, source: int, rows: slice) -> Tensor:
        item = self._graph.sources[source]
        value = self._values.outputs[source][:, rows]
        if item.role == "mlp":
            return value
        return write_head(self._weights.blocks[item.layer].attn, item.head, value)

    def _stream(self, readable: int, *, clean: bool) -> Tensor:
        """The sum of the first nodes' ablated (or clean) values, with output biases."""
        key = readable if clean else -readable
        if key not in self._streams:
            total = self._cache.ablated[:readable].sum(0)
            if clean:
                total -= self._cache.change[:readable].sum(0)
            self._streams[key] = total + output_bias(self._weights, readable)
        return self._streams[key]

    def _node(self, source: int) -> int:
        """The source of the unsplit graph that a source is a kind of."""
        return source // self._graph.num_kinds

    def _seen(self, values: Float[Tensor, "pairs tokens width"], target: int) -> Tensor:
        """Of a stream, the rows that a live target reads."""
        return values[:, self._tokens_of(target)]

    def _tokens_of(self, target: int) -> slice:
        """The tokens that a live target reads."""
        kind = self._graph.kind_number(self._graph.targets[target])
        tokens = range(self._weights.num_tokens)[self._tokens[kind]][self._rows[target]]
        return slice(tokens.start, tokens.stop)

    def _readout(self, pending: Values) -> Float[Tensor, "pairs read_tokens width"]:
        """What the classifier reads, of all its kinds."""
        targets = self._graph.classifiers
        found = _joined([_latest(item, pending.inputs, self._values.inputs) for item in targets])
        # Per kind there is nothing but what is read; of whole tokens the registers are left out.
        return found if self._graph.kinds else read_out(self._weights, found)

    def _kl(self, readout: Tensor) -> float:
        logits = classify(self._weights, readout).double()
        examples = self._examples
        log_probs = coarse_log_probs(logits, examples.group_of_class, examples.num_groups)
        return float(kl_divergence(self._cache.full_log_probs, log_probs).mean())

    def _find_live(self, kept: NDArray[np.bool_]) -> None:
        """Which targets matter, which of their token rows, and who reads each source."""
        patches = self._weights.patch_readout != "none"
        read = _ALL if patches else slice(0, self._weights.num_read)
        self._rows = dict.fromkeys(self._graph.classifiers, read)
        self._readers = {}
        for source in reversed(range(len(self._graph.sources))):
            readers = [int(u) for u in np.flatnonzero(kept[source]) if u in self._rows]
            self._readers[source] = readers
            if readers:
                all_rows = any(self._rows[reader] == _ALL for reader in readers)
                self._set_rows(source, _ALL if all_rows else read)

    def _set_rows(self, source: int, rows: slice) -> None:
        """Queries and MLPs need the rows that are read of their source; keys and values all."""
        for target in self._graph.targets_of(source):
            keys_or_values = self._graph.targets[target].role in {"k", "v"}
            self._rows[target] = _ALL if keys_or_values else rows


def _inputs_of_nodes(graph: Graph) -> list[tuple[int, ...]]:
    """Per source of the unsplit graph: the targets that its sources of all kinds read."""
    many = graph.num_kinds
    of_source = [graph.targets_of(source) for source in range(len(graph.sources))]
    return [
        tuple(dict.fromkeys(chain.from_iterable(of_source[first : first + many])))
        for first in range(0, len(of_source), many)
    ]


def _latest(key: K, pending: dict[K, Tensor], current: dict[K, Tensor]) -> Tensor:
    return pending[key] if key in pending else current[key]


def _joined(parts: list[Tensor]) -> Tensor:
    """The tokens of all kinds; one kind's without copying."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
