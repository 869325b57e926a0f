"""Stream merging: brings edges back so that targets read the same again, where that saves time.

From a circuit to a circuit, before it is planned:

    attn.1.0.q keeps embed a b         attn.1.0.q keeps embed a b c
    attn.1.0.k keeps embed a   c  ->   attn.1.0.k keeps embed a b c     one sum instead of three
    attn.1.0.v keeps embed   b c       attn.1.0.v keeps embed a b c

The merged circuit computes something else, so its KL divergence has to be measured again.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import NamedTuple

import numpy as np

from vitcut.circuit import Circuit
from vitcut.compact.operations import describe
from vitcut.compact.plan import Plan, ViTShape
from vitcut.compiler.cost import CostModel
from vitcut.compiler.liveness import Mask, first_sources, masks_of, union
from vitcut.compiler.planning import plan_circuit, split_circuit
from vitcut.names import LETTERS

Change = tuple[tuple[int, Mask], ...]
"""Targets, and the sources of its own token kind that each of them then reads."""

MERGES = "merges"
"""The key of a merged circuit's provenance."""

_NEAREST = 4
"""How many of the most similar streams at the same place a stream is tried to become one with."""
_NEAREST_BEFORE = 2
"""The same, for streams of earlier places, that it could build on."""
_PLACES_BEFORE = 2
_LEAST_SAVING = 0.01
"""As a fraction of the cost: less is more than a prediction can tell, and the KL may rise."""


def num_streams(plan: Plan) -> int:
    """How many sums with a LayerNorm a compact model has."""
    return sum(row.streams for row in describe(plan))


def merge_streams(circuit: Circuit, shape: ViTShape, costs: CostModel) -> Circuit:
    """Let targets read the same sources again, wherever that saves more than it costs.

    Greedy: of all changes, the one that saves most predicted time is made, of equal ones the one
    that brings fewest edges back, until none saves. First, whole sets of targets come to read alike
    where that needs no source that was not needed before, as nothing is lost by not going step by
    step. Then two streams become one, or one comes to build on another. Last come whole sets
    whatever they need, as some sums pay only when the last that differs is gone. No edge, head or
    neuron is cut.

    Args:
        circuit: A circuit under an ablation that can be compiled.
        shape: The model's sizes.
        costs: Predicts the latency, for the batch size that time is to be saved at.

    Returns:
        The circuit itself where nothing saves. Else a new one whose provenance lists under "merges"
        the parent's fingerprint, how many edges came back, and the predicted milliseconds before
        and after. Its KL has to be measured again and a linear fill fitted again.

    Raises:
        CircuitError: The circuit is of another model, or its ablation cannot be compiled.
    """
    search = _Search(circuit, shape, costs)
    before = search.cost
    while (
        search.merge(search.needing_nothing_new(_whole_sets(search.state)))
        or search.merge(_pairs(search.state))
        or search.merge(_whole_sets(search.state))
    ):
        pass
    merged = search.state.circuit
    restored = int((merged.kept & ~circuit.kept).sum())
    if not restored:
        return circuit
    entry = {
        "parent": circuit.fingerprint,
        "edges_restored": restored,
        "cost_before": before,
        "cost_after": search.cost,
    }
    earlier = circuit.provenance.get(MERGES, [])
    return replace(merged, provenance={**circuit.provenance, MERGES: [*earlier, entry]})


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Targets of a token kind that can share one sum: those between the same two writers."""

    number: int
    """Place in the order of reading: two per block, then the classifier."""
    kind: int
    num_written: int
    """Sources written before."""
    alike: dict[Mask, tuple[int, ...]]
    """By what they read, the targets that matter, in the order of the graph."""

    @property
    def targets(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(target for targets in self.alike.values() for target in targets)


class _State:
    """A circuit on its way, and what each of its targets reads."""

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.graph = graph = circuit.graph
        self._kinds = tuple(map(graph.kind_number, graph.targets))
        # Rows [kind::kinds] of a column are the sources of the target's own kind.
        by_kind = [masks_of(circuit.kept[kind :: graph.num_kinds]) for kind in set(self._kinds)]
        self.masks = tuple(by_kind[kind][target] for target, kind in enumerate(self._kinds))

    @cached_property
    def places(self) -> tuple[_Place, ...]:
        """Where there is something to sum up, in the order of reading."""
        kept = self.circuit.kept
        live, _ = self.graph.find_live(kept)
        reads = (kept & self.circuit.reached_sources[:, None]).any(axis=0)
        found: dict[tuple[int, int], dict[Mask, list[int]]] = {}
        for target in np.flatnonzero(live & reads).tolist():
            item = self.graph.targets[target]
            key = 2 * item.layer + (item.role == "mlp"), self._kinds[target]
            found.setdefault(key, {}).setdefault(self.masks[target], []).append(target)
        return tuple(
            _Place(
                number=number,
                kind=kind,
                num_written=self.graph.num_written(next(iter(alike.values()))[0]),
                alike={mask: tuple(targets) for mask, targets in alike.items()},
            )
            for (number, kind), alike in sorted(found.items())
        )

    def change(self, wanted: Iterable[tuple[int, Mask]]) -> Change:
        """What is new in what targets are to read as well; what they cannot read is left out."""
        found: dict[int, Mask] = {}
        for target, mask in wanted:
            own = self.masks[target]
            readable = first_sources(self.graph.num_written(target))
            total = found.get(target, own) | mask & readable
            if total != own:
                found[target] = total
        return tuple(sorted(found.items()))

    def changed(self, change: Change) -> Circuit:
        """The circuit after a change."""
        kept, num_kinds = self.circuit.kept.copy(), self.graph.num_kinds
        for target, mask in change:
            column = kept[self._kinds[target] :: num_kinds, target]
            packed = mask.to_bytes((len(column) + 7) // 8, "little")
            bits = np.unpackbits(
                np.frombuffer(packed, dtype=np.uint8), count=len(column), bitorder="little"
            )
            column |= bits.astype(np.bool_)
        return replace(self.circuit, kept=kept)


class _Trial(NamedTuple):
    """What a change did when it was last tried."""

    saving: float
    cost: float
    """The predicted cost after it."""
    version: int
    """How many changes had been made before."""


class _Search:
    """A circuit that grows; remembers what changes saved, and tries again those that look best."""

    def __init__(self, circuit: Circuit, shape: ViTShape, costs: CostModel) -> None:
        self._shape = shape
        self._costs = costs
        self._version = 0
        self._tried: dict[Change, _Trial] = {}
        self.cost = self._cost_of(circuit)
        self.state = _State(circuit)

    def merge(self, candidates: Iterable[Change]) -> bool:
        """Make the change that saves most; returns whether one saves anything."""
        changes = [change for change in dict.fromkeys(candidates) if change]
        for change in changes:
            if change not in self._tried:
                self._try(change)
        order = count()
        heap = [self._entry(change, next(order)) for change in changes]
        heapq.heapify(heap)
        # Savings of earlier versions only order the heap. The best is tried anew before it is made.
        while heap:
            *_, number, change = heapq.heappop(heap)
            trial = self._tried[change]
            if trial.version < self._version:
                self._try(change)
                heapq.heappush(heap, self._entry(change, number))
            elif trial.saving > _LEAST_SAVING * abs(self.cost):
                self.state = _State(self.state.changed(change))
                self.cost = trial.cost
                self._version += 1
                return True
        return False

    def needing_nothing_new(self, changes: Iterable[Change]) -> Iterator[Change]:
        """Those that make no source matter, in any token kind, that did not before."""

        def num_active(circuit: Circuit) -> int:
            split = split_circuit(self._shape, circuit)
            return int((split.live_sources & split.reached_sources).sum())

        before = num_active(self.state.circuit)
        for change in dict.fromkeys(changes):
            if change and num_active(self.state.changed(change)) == before:
                yield change

    def _cost_of(self, circuit: Circuit) -> float:
        return self._costs.latency_ms(plan_circuit(self._shape, circuit, self._costs))

    def _try(self, change: Change) -> None:
        cost = self._cost_of(self.state.changed(change))
        self._tried[change] = _Trial(self.cost - cost, cost, self._version)

    def _entry(self, change: Change, number: int) -> tuple[float, int, int, Change]:
        """A heap entry: the most saving first, then the fewest edges, then the first found."""
        masks = self.state.masks
        restored = sum((mask & ~masks[target]).bit_count() for target, mask in change)
        return -self._tried[change].saving, restored, number, change


def _pairs(state: _State) -> Iterator[Change]:
    """Two streams become one, or one comes to read all that an earlier one does, to build on it."""
    for position, place in enumerate(state.places):
        for mask, targets in place.alike.items():
            for other in _nearest(mask, place.alike, _NEAREST):
                both = (*targets, *place.alike[other])
                yield state.change((target, mask | other) for target in both)
            for before in state.places[:position]:
                if before.number < place.number - _PLACES_BEFORE:
                    continue
                written = mask & first_sources(before.num_written)
                for other in _nearest(written, before.alike, _NEAREST_BEFORE):
                    later = [(target, other) for target in targets]
                    yield state.change(later)
                    # Or both come to read the union, as far as the earlier can.
                    earlier = [(target, mask) for target in before.alike[other]]
                    yield state.change([*earlier, *later])


def _nearest(mask: Mask, others: Iterable[Mask], many: int) -> list[Mask]:
    """The masks that differ least from one; of equals the first."""
    return heapq.nsmallest(
        many, (other for other in others if other != mask), key=lambda x: (x ^ mask).bit_count()
    )


def _whole_sets(state: _State) -> Iterator[Change]:
    """Sets of targets come to read alike: letters, places, blocks, all before or after one."""

    def alike(targets: Sequence[int]) -> Change:
        total = union(state.masks[target] for target in targets)
        return state.change((target, total) for target in targets)

    for place in state.places:
        for letters in (*LETTERS, "qk", "kv"):
            yield alike([t for t in place.targets if state.graph.targets[t].role in letters])
    numbers = sorted({place.number for place in state.places})
    for first, last in (
        *((number, number + width) for number in numbers for width in (0, 1, 2)),
        *((0, number) for number in numbers),
        *((number, numbers[-1]) for number in numbers),
    ):
        chosen = [place for place in state.places if first <= place.number <= last]
        yield alike([target for place in chosen for target in place.targets])
        for kind in range(state.graph.num_kinds):
            own = [place for place in chosen if place.kind == kind]
            yield alike([target for place in own for target in place.targets])
