"""Incremental masked forward: compute what one more cut edge changes, and nothing else.

ACDC visits targets from the classifier backwards, so while the edges into a target are tested, no
edge further upstream is cut. These shortcuts follow, all of them exact:

1. Everything upstream of the target is clean. Its values, and the change ``ablated - clean`` of the
   tested source, are the same in every circuit: they come from the cache.
2. A change reaches others only along kept edges: the input of each reader moves by the sum of its
   sources' changes, and only what reads a moved input is recomputed.
3. A target is dead if nothing computed from it reaches the classifier along kept edges; what is
   dead is not computed.
4. Of a head, a moved v input leaves the attention pattern as it is, a moved q or k input the
   values. Only the rows (tokens) that somebody reads are computed.

Inputs are updated by adding differences, whose rounding adds up. So the state is computed afresh
whenever the search enters a new stage, and the search checks how far it had drifted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.discovery.cache import Cache
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
    """Current values of the live part of a circuit, or the new values of a part that changes.

    A node is a source of the unsplit graph: a head or an MLP with its sources of all token kinds.
    """

    inputs: dict[int, Float[Tensor, "pairs rows width"]] = field(default_factory=dict)
    """Per target: its input before the LayerNorm."""
    queries: dict[int, Float[Tensor, "pairs rows head_dim"]] = field(default_factory=dict)
    """Per source of a head: its queries."""
    attended: dict[tuple[int, Letter], Float[Tensor, "pairs tokens head_dim"]] = field(
        default_factory=dict
    )
    """Per head node: its keys, and its values, of all token kinds."""
    patterns: dict[int, Float[Tensor, "pairs queries keys"]] = field(default_factory=dict)
    """Per source of a head: its attention pattern."""
    outputs: dict[int, Float[Tensor, "pairs rows features"]] = field(default_factory=dict)
    """Per source: z of a head (before its output projection), what an MLP writes."""

    def update(self, other: "Values") -> None:
        """Replace the values that ``other`` holds."""
        for name, values in vars(other).items():
            getattr(self, name).update(values)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One more edge cut, not yet accepted."""

    kl: float
    """Mean KL(full || circuit) with that edge cut, in nats."""
    pending: Values


class Propagation:
    """The state of a search: a circuit in which no edge upstream of a frontier is cut."""

    def __init__(self, weights: ViTWeights, cache: Cache, oracle: Oracle) -> None:
        """Call ``rebuild`` before the first trial."""
        graph = oracle.graph
        self._weights = weights.to(cache.change.dtype)
        self._graph = graph
        self._nodes = graph.unsplit.sources
        self._tokens = weights.rows_of(graph)
        self._cache = cache
        self._examples = oracle.examples
        # Per node, the targets that its sources of all kinds are computed from.
        many = graph.num_kinds
        reads = [graph.targets_of(source) for source in range(len(graph.sources))]
        self._reads = [
            tuple(dict.fromkeys(chain.from_iterable(reads[first : first + many])))
            for first in range(0, len(reads), many)
        ]
        self._values = Values()
        # Per source, the live targets that read it; per live target, which of its kind's tokens
        # matter. Both depend on what is kept.
        self._readers: dict[int, list[int]] = {}
        self._rows: dict[int, slice] = {}
        self._streams: dict[tuple[int, bool], Float[Tensor, "pairs tokens width"]] = {}
        self._evaluations = 0
        self._rebuilt: tuple[bytes, int] | None = None
        self._rebuilt_kl = 0.0

    def take_evaluations(self) -> int:
        """Sources recomputed since the last call, those of a rebuild included."""
        count, self._evaluations = self._evaluations, 0
        return count

    def is_live(self, target: int) -> bool:
        """Whether what is computed from a target can reach the classifier along kept edges."""
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
        self._rebuilt, self._rebuilt_kl = state, self._kl(Values())
        return self._rebuilt_kl

    @torch.no_grad()
    def try_cut(self, source: int, target: int) -> Trial:
        """Cut one more edge and follow the change along kept edges.

        Args:
            source: A clean source; no edge is cut upstream of ``target``.
            target: A live target.
        """
        pending = Values()
        # Per target, how far its input moves: [pairs, rows, width].
        changed = {target: self._seen(self._cache.change[self._node(source)], target)}

        def moved(targets: Sequence[int]) -> dict[int, Tensor]:
            """The new inputs of those targets whose input moves."""
            current = self._values.inputs
            return {item: current[item] + changed.pop(item) for item in targets if item in changed}

        fed = self._graph.sources_of(target)
        for node in range(self._node(fed[0]) if fed else len(self._nodes), len(self._nodes)):
            # All sources that a node reads come before it, so its inputs are complete by now.
            inputs = moved(self._reads[node])
            if not inputs:
                continue
            for written, change in self._compute(node, inputs, pending).items():
                for reader in self._readers[written]:
                    seen = change[:, self._rows[reader]]
                    changed[reader] = changed[reader] + seen if reader in changed else seen
        pending.inputs.update(moved(self._graph.classifiers))
        return Trial(kl=self._kl(pending), pending=pending)

    def accept(self, trial: Trial) -> None:
        """Make a trial's values the current ones."""
        self._values.update(trial.pending)
        self._rebuilt = None

    def _compute(self, node: int, inputs: dict[int, Tensor], into: Values) -> dict[int, Tensor]:
        """Recompute a node's sources from new inputs; returns by how much each writes more.

        New values go to ``into``; what is not recomputed keeps its current value. While the state
        is rebuilt both are the same, and a source's first value counts as its change.
        """
        into.inputs.update(inputs)
        item = self._nodes[node]
        changes: dict[int, Tensor] = {}
        if item.role == "head":
            changes = self._compute_head(node, inputs, into)
        else:
            block = self._weights.blocks[item.layer]
            for target, stream in inputs.items():
                (source,) = self._graph.sources_of(target)
                written = run_mlp(block.mlp, normalise(block.mlp_norm, stream))
                before = self._values.outputs.get(source)
                into.outputs[source] = written
                changes[source] = written if before is None else written - before
        self._evaluations += len(changes)
        return changes

    def _compute_head(
        self, node: int, inputs: dict[int, Tensor], into: Values
    ) -> dict[int, Tensor]:
        """Keys and values are shared by the head's sources of all kinds, queries are not."""
        now, graph, item = self._values, self._graph, self._nodes[node]
        kinds, attn = range(graph.num_kinds), self._weights.blocks[item.layer].attn
        shared: tuple[Letter, ...] = ("k", "v")
        for letter in shared:
            targets = [graph.head_target(item.layer, item.head, letter, kind) for kind in kinds]
            if any(target in inputs for target in targets):
                # Kinds whose input did not move keep their part of [pairs, tokens, head_dim].
                parts = [
                    self._project(letter, target, inputs[target])
                    if target in inputs
                    else now.attended[node, letter][:, tokens]
                    for target, tokens in zip(targets, self._tokens, strict=True)
                ]
                into.attended[node, letter] = _joined(parts)
        all_move = any((node, letter) in into.attended for letter in shared)
        changes: dict[int, Tensor] = {}
        for kind in kinds:
            query = graph.head_target(item.layer, item.head, "q", kind)
            source = graph.head_source(item.layer, item.head, kind)
            if query in inputs:
                into.queries[source] = self._project("q", query, inputs[query])
            elif not (all_move and self.is_live(query)):
                continue
            if query in inputs or (node, "k") in into.attended:
                q = _latest(source, into.queries, now.queries)
                k = _latest((node, "k"), into.attended, now.attended)
                into.patterns[source] = attend(q, k, attn.scale)
            pattern = _latest(source, into.patterns, now.patterns)
            z = pattern @ _latest((node, "v"), into.attended, now.attended)
            before = now.outputs.get(source)
            into.outputs[source] = z
            # The output projection is linear: W z - W before = W (z - before).
            changes[source] = write_head(attn, item.head, z if before is None else z - before)
        return changes

    def _project(self, letter: Letter, target: int, stream: Tensor) -> Tensor:
        """q, k or v of a head from the input of one target."""
        item = self._graph.targets[target]
        block = self._weights.blocks[item.layer]
        normed = normalise(block.attn_norm, stream)
        return project_head(block.attn, letter, item.head, normed, self._tokens_of(target))

    def _summed_input(self, kept: NDArray[np.bool_], target: int, first: int) -> Tensor:
        """A target's input from scratch; nodes before ``first`` are clean."""
        cache, rows = self._cache, self._rows[target]
        readable, written = self._graph.readable(target), self._graph.num_written(target)
        read = [source for source in readable if kept[source, target]]
        if len(read) == len(readable) and written <= first:
            return self._seen(self._stream(written, clean=True), target)
        # Start with everything cut, then put the kept sources back: value - ablated of each, which
        # is minus the cached change where the source is clean.
        total = self._seen(self._stream(written, clean=False), target).clone()
        for source in read:
            node = self._node(source)
            if node < first:
                total -= self._seen(cache.change[node], target)
                continue
            item, value = self._graph.sources[source], self._values.outputs[source][:, rows]
            if item.role == "head":
                value = write_head(self._weights.blocks[item.layer].attn, item.head, value)
            total += value - self._seen(cache.ablated[node], target)
        return total

    def _stream(self, readable: int, *, clean: bool) -> Float[Tensor, "pairs tokens width"]:
        """The sum of the first nodes' ablated (or clean) values, with the output biases."""
        key = (readable, clean)
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
        """The rows of a stream that a live target reads."""
        return values[:, self._tokens_of(target)]

    def _tokens_of(self, target: int) -> slice:
        """The tokens that a live target reads."""
        kind = self._graph.kind_number(self._graph.targets[target])
        tokens = range(self._weights.num_tokens)[self._tokens[kind]][self._rows[target]]
        return slice(tokens.start, tokens.stop)

    def _kl(self, pending: Values) -> float:
        """Mean KL(full || circuit) in nats, with the inputs of pending changes."""
        targets, current = self._graph.classifiers, self._values.inputs
        readout = _joined([_latest(item, pending.inputs, current) for item in targets])
        if not self._graph.kinds:
            # Whole tokens have registers among them; per kind there is nothing but what is read.
            readout = read_out(self._weights, readout)
        logits = classify(self._weights, readout).double()
        examples = self._examples
        log_probs = coarse_log_probs(logits, examples.group_of_class, examples.num_groups)
        return float(kl_divergence(self._cache.full_log_probs, log_probs).mean())

    def _find_live(self, kept: NDArray[np.bool_]) -> None:
        """Find which targets matter, which of their token rows, and who reads each source."""
        patches = self._weights.patch_readout != "none"
        read = _ALL if patches else slice(0, self._weights.num_read)
        self._rows = dict.fromkeys(self._graph.classifiers, read)
        self._readers = {}
        # Backwards: whoever reads a source comes after it.
        for source in reversed(range(len(self._graph.sources))):
            readers = [int(u) for u in np.flatnonzero(kept[source]) if u in self._rows]
            self._readers[source] = readers
            if not readers:
                continue
            rows = _ALL if any(self._rows[reader] == _ALL for reader in readers) else read
            for target in self._graph.targets_of(source):
                # Any query attends to the keys and values of all tokens.
                attended = self._graph.targets[target].role in {"k", "v"}
                self._rows[target] = _ALL if attended else rows


def _latest(key: K, pending: dict[K, Tensor], current: dict[K, Tensor]) -> Tensor:
    return pending[key] if key in pending else current[key]


def _joined(parts: list[Tensor]) -> Tensor:
    """The tokens of all kinds; those of a single kind without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
