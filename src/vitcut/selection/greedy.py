"""Greedy cutting: repeatedly cut the candidate that raises the KL least per unit of cost saved.

A candidate is one head or neuron of a token kind; a position; a head in all of its kinds, since its
keys and values go only with their last reader; or all that is left of an attention, MLP or block in
one kind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph, SiteKey
from vitcut.names import Ablation

Cost = Callable[[Circuit], float]
"""What a circuit's compact model costs: MACs, or predicted milliseconds."""

Candidate = tuple[tuple[SiteKey, tuple[int, ...]], ...]
"""Parts that are cut together: for each site, the numbers of its heads or neurons."""

Array = TypeVar("Array", NDArray[np.bool_], NDArray[np.float64])

_BLOCK = 32
"""Parts that are chosen together, from one look at all candidates."""

_COSTED_UNDER: Ablation = "linear"
"""Linear fills have maps of their own per token kind, so kinds are computed apart from the start.
Under ``mean`` the first cut that tells two kinds apart would cost more than it saves, and greedy
cutting would never make it."""


@dataclass(kw_only=True)
class Alive:
    """The parts that are not cut. Changed in place."""

    heads: NDArray[np.bool_]
    """Shape [blocks, heads, kinds]."""
    neurons: NDArray[np.bool_]
    """Shape [blocks, kinds, neurons]."""
    positions: NDArray[np.bool_] | None = None
    """Shape [patches]; None if all are kept for good."""

    @classmethod
    def useful(cls, graph: Graph, num_neurons: int, num_patches: int | None = None) -> "Alive":
        """Every part with a path to the classifier.

        Args:
            graph: The model's graph.
            num_neurons: Neurons per MLP.
            num_patches: Positions that may be cut; None if none may.
        """
        blocks, kinds = graph.num_layers, graph.num_kinds
        alive = cls(
            heads=np.ones((blocks, graph.num_heads, kinds), dtype=np.bool_),
            neurons=np.ones((blocks, kinds, num_neurons), dtype=np.bool_),
            positions=None if num_patches is None else np.ones(num_patches, dtype=np.bool_),
        )
        alive.keep_live(Circuit.full(graph))
        return alive

    def copy(self) -> "Alive":
        """An independent copy."""
        positions = None if self.positions is None else self.positions.copy()
        return Alive(heads=self.heads.copy(), neurons=self.neurons.copy(), positions=positions)

    def at(self, site: SiteKey) -> NDArray[np.bool_]:
        """The parts of a site, shape [parts]; a view."""
        layer, parts, kind = site
        if parts == "positions" and self.positions is not None:
            return self.positions
        return self.heads[layer, :, kind] if parts == "heads" else self.neurons[layer, kind]

    def left(self, site: SiteKey) -> tuple[int, ...]:
        """The numbers of the parts of a site that are not cut."""
        return tuple(np.flatnonzero(self.at(site)).tolist())

    def cut(self, candidate: Candidate) -> None:
        """Cut a candidate."""
        for site, parts in candidate:
            self.at(site)[list(parts)] = False

    def without(self, candidate: Candidate) -> "Alive":
        """A copy with a candidate cut."""
        found = self.copy()
        found.cut(candidate)
        return found

    def keep_live(self, circuit: Circuit) -> None:
        """Cut what a circuit cuts, and what has no path to its classifier."""
        heads, mlps = circuit.graph.by_block(circuit.live_sources)
        self.heads &= heads
        self.neurons &= mlps[:, :, None]
        if circuit.neurons is not None:
            self.neurons &= circuit.neurons
        if circuit.positions is not None and self.positions is not None:
            self.positions &= circuit.positions

    def circuit(self, graph: Graph, ablation: Ablation) -> Circuit:
        """The circuit that keeps what is alive."""
        return Circuit.of_parts(
            graph,
            heads=self.heads,
            neurons=self.neurons,
            positions=self.positions,
            ablation=ablation,
        )

    @property
    def sites(self) -> Iterator[SiteKey]:
        """All places with parts that may be cut."""
        blocks, kinds = self.neurons.shape[:2]
        yield from product(range(blocks), ("heads", "neurons"), range(kinds))
        if self.positions is not None:
            yield 0, "positions", kinds - 1


def by_site(heads: Array, neurons: Array) -> dict[SiteKey, Array]:
    """Values of heads and neurons as one array per site, shape [parts]; views.

    Args:
        heads: Shape [blocks, heads, kinds].
        neurons: Shape [blocks, kinds, neurons].
    """
    found: dict[SiteKey, Array] = {}
    for layer, kind in np.ndindex(neurons.shape[:2]):
        found[layer, "heads", kind] = heads[layer, :, kind]
        found[layer, "neurons", kind] = neurons[layer, kind]
    return found


@runtime_checkable
class Scorer(Protocol):
    """Predicts how much a cut raises the KL, given everything cut so far."""

    def rises(self, site: SiteKey) -> NDArray[np.float64]:
        """The rise in nats from cutting each part of a site alone, shape [parts]."""
        ...

    def rise(self, candidate: Candidate) -> float:
        """The rise in nats from cutting several parts together."""
        ...

    def mutual(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """How much more every two candidates cost together than one by one, in nats."""
        ...

    def cut(self, candidate: Candidate) -> None:
        """Record that a candidate was cut."""
        ...

    def settle(self, site: SiteKey) -> bool:
        """Bring a site up to date with earlier cuts; return whether its rises changed."""
        ...


class Additive:
    """Scores that add up: each part has its own, whatever else is cut."""

    def __init__(self, scores: Mapping[SiteKey, NDArray[np.float64]]) -> None:
        self._scores = scores

    def rises(self, site: SiteKey) -> NDArray[np.float64]:
        """The scores of the parts."""
        return self._scores[site]

    def rise(self, candidate: Candidate) -> float:
        """The sum of the scores."""
        return float(sum(self._scores[site][list(parts)].sum() for site, parts in candidate))

    def mutual(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """Zeros."""
        return np.zeros((len(candidates), len(candidates)))

    def cut(self, candidate: Candidate) -> None:
        """Do nothing: no score depends on the cuts."""

    def settle(self, site: SiteKey) -> bool:
        """Do nothing: no score depends on the cuts."""
        del site
        return False


class Savings:
    """How much each candidate lowers the cost: the cost before the cut minus the cost after it.

    To cost a circuit it has to be planned, so differences are cached. A cut changes the
    differences of candidates in its own layers, whose plans read one another. It also changes
    those of candidates that empty a site: such a cut may leave parts of any other layer without a
    reader, and saves whatever those still cost.
    """

    def __init__(self, graph: Graph, cost: Cost, alive: Alive) -> None:
        self._graph = graph
        self._cost = cost
        self._alive = alive
        self._known: dict[Candidate, float] = {}
        self._per_one: dict[SiteKey, float] = {}
        self._stale = False
        self.total = self.measure()

    def measure(self) -> float:
        """The cost of what is alive."""
        return self._cost(self._alive.circuit(self._graph, _COSTED_UNDER))

    def of(self, candidate: Candidate) -> float:
        """How much cutting a candidate saves."""
        if candidate not in self._known:
            after = self._cost(self._alive.without(candidate).circuit(self._graph, _COSTED_UNDER))
            self._known[candidate] = self.total - after
        return self._known[candidate]

    def of_one(self, site: SiteKey) -> float:
        """How much cutting any one neuron, or position, of a site saves."""
        # Neurons of a site are alike, each a row or column of the same matrices: one difference
        # serves them all, and the next ones after a cut. Only with the last neuron goes what the
        # whole MLP needs: its operations, and any norm over its hidden units. Positions are alike
        # too, each a row of everything.
        if self._alive.at(site).sum() == 1:
            return self.of(((site, self._alive.left(site)),))
        if site not in self._per_one:
            first = self._alive.left(site)[:1]
            self._per_one[site] = self.of(((site, first),))
        return self._per_one[site]

    def settle(self) -> None:
        """Drop all differences if positions were cut: every operation has fewer rows now."""
        if self._stale:
            self._known, self._per_one, self._stale = {}, {}, False

    def cut(self, candidate: Candidate) -> None:
        """Update the total, and drop the differences that a cut made stale.

        Call this once the candidate is cut, and everything that lost its last reader with it.
        """
        [(site, parts), *others] = candidate
        layers = {layer for (layer, _, _), _ in candidate}
        if site[1] == "positions":
            # All savings shrink a little. They are told apart well enough until the next look.
            self._stale = True
        elif not all(self._alive.left(place) for place, _ in candidate):
            # A site is empty: parts of other layers may reach nothing now, or read constants.
            self._known, self._per_one = {}, {}
        elif site in self._per_one and len(parts) == 1 and not others:
            # One neuron of many: the cost falls by the known difference, nothing is planned anew.
            saved = self._per_one[site]
            self.total -= saved
            known, self._known = self._known, {}
            for item, saving in known.items():
                numbers = dict(item).get(site)
                if numbers is None:
                    self._known[item] = saving
                elif len(numbers) > 1:
                    # This candidate takes all neurons of the site. It leaves the same model
                    # behind as before, so it saves one neuron less.
                    rest = tuple(
                        (place, tuple(n for n in left if (place, n) != (site, parts[0])))
                        for place, left in item
                    )
                    self._known[rest] = saving - saved
            return
        else:
            self._known = {
                item: saving
                for item, saving in self._known.items()
                if not any(
                    layer in layers or len(numbers) >= len(self._alive.left((layer, which, kind)))
                    for (layer, which, kind), numbers in item
                )
            }
            self._per_one = {
                place: saving for place, saving in self._per_one.items() if place[0] not in layers
            }
        self.total = self.measure()


def cut_down(
    graph: Graph,
    alive: Alive,
    scorer: Scorer,
    cost: Cost,
    *,
    budget: float,
    ablation: Ablation = "linear",
    block: int = _BLOCK,
) -> Iterator[float]:
    """Cut the candidate with the least rise per saving until the cost is within the budget.

    Candidates are looked at in blocks: the best single parts, with the exact cost of every two of
    them together. A block ends when its best falls behind the best outside it, as that was when the
    block was chosen. With ``block=1`` every cut is chosen among all candidates.

    Parts that lose their last path to the classifier go too. The last head that shows the image to
    the class token stays.

    Args:
        graph: The model's graph, per token kind or over whole tokens.
        alive: What is left; changed in place.
        scorer: Predicts the rise of the KL.
        cost: The cost of a circuit.
        budget: The cost to reach, in the unit of ``cost``.
        ablation: The ablation under which the circuit has to be within the budget.
        block: Most parts that are cut between two looks at all candidates.

    Yields:
        The cost after each cut.

    Raises:
        CircuitError: Nothing is left to cut and the cost is still above the budget.
    """
    savings = Savings(graph, cost, alive)

    def is_met() -> bool:
        return bool(savings.total <= budget and cost(alive.circuit(graph, ablation)) <= budget)

    while not is_met():
        choice = _choose(graph, alive, scorer, savings, block)
        if not choice.candidates:
            raise CircuitError(
                f"the budget of {budget:.4g} cannot be met: with every part cut that saves "
                f"anything, {savings.measure():.4g} is left"
            )
        for candidate in _in_order(choice, scorer, savings):
            # Scores of a site go stale as its parts are cut. The summed list settles every site; if
            # any rise changed, another candidate may be cheaper now, so all are looked at again.
            if sum([scorer.settle(site) for site, _ in candidate]):
                break
            alive.cut(candidate)
            scorer.cut(candidate)
            emptied = not all(alive.left(site) for site, _ in candidate)
            if emptied:
                alive.keep_live(alive.circuit(graph, "mean"))
            savings.cut(candidate)
            yield savings.total
            # Cutting a head changes what others of its layer save.
            if emptied or candidate[0][0][1] == "heads" or is_met():
                break


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The candidates of a block, the one with the least rise per saving first."""

    candidates: Sequence[Candidate]
    rises: NDArray[np.float64]
    outside: float
    """The least rise per saving of the other candidates."""


def _in_order(choice: _Choice, scorer: Scorer, savings: "Savings") -> Iterator[Candidate]:
    """Candidates of a block as they are to be cut, until one outside the block is cheaper."""
    rises, mutual = choice.rises.copy(), None
    left = np.ones(len(rises), dtype=np.bool_)
    sites = [candidate[0][0] for candidate in choice.candidates]
    yield choice.candidates[0]
    chosen = 0
    while True:
        left[chosen] = False
        if not left.any():
            return
        if mutual is None:
            mutual = scorer.mutual(choice.candidates)
        rises += mutual[chosen]
        of_site = {site: savings.of_one(site) for site in set(sites)}
        ratios = np.where(left, rises / [of_site[site] for site in sites], np.inf)
        chosen = int(ratios.argmin())
        if ratios[chosen] > choice.outside:
            return
        yield choice.candidates[chosen]


def _choose(graph: Graph, alive: Alive, scorer: Scorer, savings: Savings, block: int) -> _Choice:
    """The next block: one head, parts of one candidate of several, or the best single parts."""
    savings.settle()
    classifiers = [graph.kind_number(graph.targets[target]) for target in graph.classifiers]

    def leaves_sight(candidate: Candidate) -> bool:
        # The classifier reads patches, or some head still writes to a kind that it reads.
        left = alive.without(candidate)
        return "patch" in graph.readout or bool(left.heads[:, :, classifiers].any())

    # (rise per saving, rise, candidate)
    found: list[tuple[float, float, Candidate]] = []
    for site in alive.sites:
        parts = np.flatnonzero(alive.at(site))
        most = block + 1
        if site[1] == "positions":
            most = min(most, len(parts) - 1)  # One is left, or nothing of the image is.
        if not len(parts) or not most:
            continue
        rises = scorer.rises(site)[parts]
        if site[1] != "heads":
            gained = np.full(len(parts), savings.of_one(site))
        else:
            gained = np.array([savings.of(((site, (part,)),)) for part in parts.tolist()])
        ratios = np.full(len(parts), np.inf)
        np.divide(rises, gained, out=ratios, where=gained > 0)
        for at in np.argsort(ratios, kind="stable")[:most].tolist():
            candidate: Candidate = ((site, (int(parts[at]),)),)
            if ratios[at] < np.inf and (site[1] != "heads" or leaves_sight(candidate)):
                found.append((float(ratios[at]), float(rises[at]), candidate))
    for candidate in _of_several_parts(graph, alive):
        gained = savings.of(candidate)
        if gained > 0 and leaves_sight(candidate):
            rise = scorer.rise(candidate)
            found.append((rise / gained, rise, candidate))
    found.sort(key=lambda item: item[0])
    # The first candidate, and as many single parts after it as no other candidate comes before.
    size = 1
    if found and _is_single(found[0][2]):
        single = (_is_single(item[2]) for item in found[:block])
        size = sum(1 for _ in takewhile(bool, single))
    return _Choice(
        candidates=[item[2] for item in found[:size]],
        rises=np.array([item[1] for item in found[:size]]),
        outside=found[size][0] if len(found) > size else np.inf,
    )


def _is_single(candidate: Candidate) -> bool:
    """Whether it is one neuron or position, which changes little of what others save."""
    [((_, which, _), parts), *others] = candidate
    return which != "heads" and len(parts) == 1 and not others


def _of_several_parts(graph: Graph, alive: Alive) -> Iterator[Candidate]:
    """A head in all of its kinds; an attention, an MLP or both, in one kind."""
    for layer in range(graph.num_layers):
        for head in range(graph.num_heads):
            kinds = np.flatnonzero(alive.heads[layer, head]).tolist()
            if len(kinds) > 1:
                yield tuple(((layer, "heads", kind), (head,)) for kind in kinds)
        for kind in range(graph.num_kinds):
            sites: Sequence[SiteKey] = ((layer, "heads", kind), (layer, "neurons", kind))
            whole = [(site, left) for site in sites if (left := alive.left(site))]
            yield from ((item,) for item in whole if len(item[1]) > 1)
            if len(whole) > 1:
                yield tuple(whole)
