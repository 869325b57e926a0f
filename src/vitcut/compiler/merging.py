"""Stream merging: brings edges back so that targets read the same again, where that saves time.

What a circuit costs is handed in as a function; measuring the KL again is left to the caller.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import count
from operator import or_

import numpy as np
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.compact.plan import ViTShape
from vitcut.compiler.planning import split_circuit
from vitcut.names import LETTERS

Cost = Callable[[Circuit], float]
"""What a circuit's compact model costs: predicted milliseconds."""

Change = tuple[tuple[int, int], ...]
"""Targets, and what each of them then reads: bit n stands for source n of its own token kind."""

MERGES = "merges"
"""The key of a merged circuit's provenance."""

_NEAREST = 4
"""With how many others that read most like it what reads alike is tried, at the same place."""
_NEAREST_BEFORE = 2
"""The same, for streams of the places before, that it could build on."""
_PLACES_BEFORE = 2
_LEAST_SAVING = 0.01
"""As a fraction of the cost: less is more than a prediction can tell, and the KL may rise."""


def merge_streams(circuit: Circuit, cost: Cost, shape: ViTShape) -> Circuit:
    """Let targets read the same sources again, wherever that saves more than it costs.

    Greedy: the change that saves most is made, of equal ones that which brings fewest edges back,
    until none saves. First whole sets of targets come to read alike where that needs no source that
    was not needed before: nothing is then lost by not going step by step. Then pairs of streams
    become one, or one comes to build on the other. Last come whole sets whatever they need: some
    sums pay only when the last that differs is gone. Nothing is cut; neurons stay as they are.

    Args:
        circuit: Under an ablation that can be compiled.
        cost: Of a circuit. That an edge brings a dead source back to life is for it to see.
        shape: The model's sizes.

    Returns:
        The circuit itself where nothing saves; else a new one whose provenance lists under "merges"
        the parent's fingerprint, how many edges came back, and the cost before and after. The KL in
        its provenance is still that of the search, and a linear fill of the parent does not fit it:
        both have to be found again.
    """
    search = _Search(circuit, cost, shape)
    before = search.cost_now
    while (
        search.merge(filter(search.state.needs_nothing_new, dict.fromkeys(_wholes(search.state))))
        or search.merge(_pairs(search.state))
        or search.merge(_wholes(search.state))
    ):
        pass
    restored = int((search.circuit.kept & ~circuit.kept).sum())
    if not restored:
        return circuit
    entry = {
        "parent": circuit.fingerprint,
        "edges_restored": restored,
        "cost_before": before,
        "cost_after": search.cost_now,
    }
    earlier = circuit.provenance.get(MERGES, [])
    return replace(search.circuit, provenance={**circuit.provenance, MERGES: [*earlier, entry]})


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Targets of a token kind that can share one sum: those between the same two writers."""

    number: int
    """Place in the order of reading: two per block, then the classifier."""
    group: int
    num_written: int
    """Sources written before."""
    alike: dict[int, tuple[int, ...]]
    """By what they read, the targets that matter, in the order of the graph."""

    @property
    def targets(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(target for targets in self.alike.values() for target in targets)


class _State:
    """What each target of a circuit reads, as bit masks."""

    def __init__(self, circuit: Circuit, shape: ViTShape) -> None:
        self.graph = circuit.graph
        self._shape = shape
        self._groups = tuple(map(self.graph.kind_number, self.graph.targets))
        self.masks = tuple(_mask_of(column) for column in self._columns(circuit.kept))
        self._circuit = circuit

    @cached_property
    def places(self) -> tuple[_Place, ...]:
        """Where there is something to sum up, in the order of reading."""
        live, _ = self.graph.find_live(self._circuit.kept)
        reads = (self._circuit.kept & self._circuit.reached_sources[:, None]).any(axis=0)
        found: dict[tuple[int, int], dict[int, list[int]]] = {}
        for target in np.flatnonzero(live & reads).tolist():
            item = self.graph.targets[target]
            key = 2 * item.layer + (item.role == "mlp"), self._groups[target]
            found.setdefault(key, {}).setdefault(self.masks[target], []).append(target)
        return tuple(
            _Place(
                number=number,
                group=group,
                num_written=self.graph.num_written(next(iter(alike.values()))[0]),
                alike={mask: tuple(targets) for mask, targets in alike.items()},
            )
            for (number, group), alike in sorted(found.items())
        )

    def change(self, wanted: Iterable[tuple[int, int]]) -> Change:
        """What is new of what targets are to read besides; what they cannot read is left out."""
        found: dict[int, int] = {}
        for target, mask in wanted:
            own = self.masks[target]
            total = found.get(target, own) | mask & _first(self.graph.num_written(target))
            if total != own:
                found[target] = total
        return tuple(sorted(found.items()))

    def num_restored(self, change: Change) -> int:
        """How many edges a change brings back."""
        return sum((mask & ~self.masks[target]).bit_count() for target, mask in change)

    def needs_nothing_new(self, change: Change) -> bool:
        """Whether a change makes no source matter, in any token kind, that did not before."""
        return bool(change) and self._count(self.circuit_with(change)) == self._active

    @cached_property
    def _active(self) -> int:
        return self._count(self._circuit)

    def _count(self, circuit: Circuit) -> int:
        """How many sources and token kinds depend on the image and reach the classifier."""
        split = split_circuit(self._shape, circuit)
        return int((split.live_sources & split.reached_sources).sum())

    def circuit_with(self, change: Change) -> Circuit:
        """The circuit after a change."""
        kept = self._circuit.kept.copy()
        for target, mask in change:
            column = kept[self._groups[target] :: self.graph.num_kinds, target]
            column |= _bits_of(mask, len(column))
        return replace(self._circuit, kept=kept)

    def _columns(self, kept: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
        many = self.graph.num_kinds
        return (kept[group::many, target] for target, group in enumerate(self._groups))


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a change saved when it was last tried."""

    after: float
    """The cost after it."""
    saving: float
    version: int
    """How many changes had been made."""


class _Search:
    """A circuit that grows; remembers what changes saved, and tries those again that look best."""

    def __init__(self, circuit: Circuit, cost: Cost, shape: ViTShape) -> None:
        self.circuit = circuit
        self.cost_now = cost(circuit)
        self.state = _State(circuit, shape)
        self._shape = shape
        self._cost = cost
        self._version = 0
        self._known: dict[Change, _Known] = {}

    def merge(self, candidates: Iterable[Change]) -> bool:
        """Make the change that saves most; returns whether one saves anything."""
        changes = [change for change in dict.fromkeys(candidates) if change]
        for change in changes:
            if change not in self._known:
                self._try(change)
        order = count()
        heap = [self._entry(change, next(order)) for change in changes]
        heapq.heapify(heap)
        while heap:
            *_, number, change = heapq.heappop(heap)
            known = self._known[change]
            if known.version < self._version:
                self._try(change)
                heapq.heappush(heap, self._entry(change, number))
            elif known.saving > _LEAST_SAVING * abs(self.cost_now):
                self._make(change)
                return True
        return False

    def _entry(self, change: Change, number: int) -> tuple[float, int, int, Change]:
        return -self._known[change].saving, self.state.num_restored(change), number, change

    def _try(self, change: Change) -> None:
        after = self._cost(self.state.circuit_with(change))
        saving = self.cost_now - after
        self._known[change] = _Known(after=after, saving=saving, version=self._version)

    def _make(self, change: Change) -> None:
        self.circuit = self.state.circuit_with(change)
        self.state = _State(self.circuit, self._shape)
        self.cost_now = self._known[change].after
        self._version += 1


def _pairs(state: _State) -> Iterator[Change]:
    """Two streams that become one, or of which the later comes to build on the earlier."""
    for position, place in enumerate(state.places):
        for mask, targets in place.alike.items():
            for other in _nearest(mask, place.alike, _NEAREST):
                both = (*targets, *place.alike[other])
                yield state.change((target, mask | other) for target in both)
            before = [
                item
                for item in state.places[:position]
                if item.number >= place.number - _PLACES_BEFORE
            ]
            for item in before:
                yield from _nested(state, item, mask, targets)


def _nested(state: _State, before: _Place, mask: int, targets: Sequence[int]) -> Iterator[Change]:
    """Targets that come to read all that earlier ones, or those of another group, read."""
    written = mask & _first(before.num_written)
    for other in _nearest(written, before.alike, _NEAREST_BEFORE):
        later = [(target, other) for target in targets]
        earlier = [(target, mask) for target in before.alike[other]]
        yield state.change(later)
        yield state.change([*earlier, *later])


def _nearest(mask: int, others: Iterable[int], many: int) -> list[int]:
    """The masks that differ least from one; of equals the first."""
    return heapq.nsmallest(
        many, (other for other in others if other != mask), key=lambda x: (x ^ mask).bit_count()
    )


def _wholes(state: _State) -> Iterator[Change]:
    """Sets of targets that come to read alike: letters, places, blocks, all before or after one."""
    for place in state.places:
        kinds = [{letter} for letter in LETTERS]
        for chosen in (*kinds, {"q", "k"}, {"k", "v"}):
            own = [t for t in place.targets if state.graph.targets[t].role in chosen]
            yield _alike(state, own)
    numbers = sorted({place.number for place in state.places})
    for first, last in (
        *((number, number + width) for number in numbers for width in (0, 1, 2)),
        *((0, number) for number in numbers),
        *((number, numbers[-1]) for number in numbers),
    ):
        chosen = [place for place in state.places if first <= place.number <= last]
        yield _alike(state, [target for place in chosen for target in place.targets])
        for group in range(state.graph.num_kinds):
            own = [place for place in chosen if place.group == group]
            yield _alike(state, [target for place in own for target in place.targets])


def _alike(state: _State, targets: Sequence[int]) -> Change:
    total = reduce(or_, (state.masks[target] for target in targets), 0)
    return state.change((target, total) for target in targets)


def _first(many: int) -> int:
    return (1 << many) - 1


def _mask_of(column: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(column, bitorder="little").tobytes(), "little")


def _bits_of(mask: int, many: int) -> NDArray[np.bool_]:
    packed = np.frombuffer(mask.to_bytes((many + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=many, bitorder="little").astype(np.bool_)
