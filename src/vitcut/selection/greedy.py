"""Greedy cutting: always the candidate that costs the least KL per saving, down to a budget.

Candidates are single heads and neurons of a token kind, a head in all its kinds (keys and values
go only with their last reader), and what is left of an attention, an MLP or a block of a kind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph, SiteKey
from vitcut.names import Ablation

Cost = Callable[[Circuit], float]
"""What a circuit's compact model costs: MACs, or predicted milliseconds."""

_TOGETHER_EVERY = 8
"""Steps between looks at candidates of several parts, which change slowly and take long."""

_APART: Ablation = "linear"
"""Costs are those of token kinds that are computed apart, as under maps of their own: else the
first cut that tells two kinds apart would cost more than it saves, and none would follow."""

Candidate = tuple[tuple[SiteKey, tuple[int, ...]], ...]
"""What is cut together: per site the numbers of its heads or neurons."""


@dataclass(kw_only=True)
class Alive:
    """Which parts are not cut; changed in place."""

    heads: NDArray[np.bool_]
    """Shape [blocks, heads, kinds]."""
    neurons: NDArray[np.bool_]
    """Shape [blocks, kinds, neurons]."""

    @classmethod
    def everything(cls, graph: Graph, num_neurons: int) -> "Alive":
        """Every part."""
        blocks, kinds = graph.num_layers, graph.num_kinds
        return cls(
            heads=np.ones((blocks, graph.num_heads, kinds), dtype=np.bool_),
            neurons=np.ones((blocks, kinds, num_neurons), dtype=np.bool_),
        )

    def copy(self) -> "Alive":
        """A copy that may be changed."""
        return Alive(heads=self.heads.copy(), neurons=self.neurons.copy())

    def at(self, site: SiteKey) -> NDArray[np.bool_]:
        """The heads or neurons of a site; a view."""
        layer, parts, kind = site
        return self.heads[layer, :, kind] if parts == "heads" else self.neurons[layer, kind]

    def left(self, site: SiteKey) -> tuple[int, ...]:
        """The numbers of a site's parts that are not cut."""
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

    def circuit(self, graph: Graph, ablation: Ablation) -> Circuit:
        """The circuit that keeps what is alive."""
        return Circuit.of_parts(graph, heads=self.heads, neurons=self.neurons, ablation=ablation)


@runtime_checkable
class Scorer(Protocol):
    """How much the KL would rise, given what was cut so far."""

    def rises(self, site: SiteKey) -> NDArray[np.float64]:
        """In nats, of cutting each part of a site alone; shape [parts]."""
        ...

    def rise(self, candidate: Candidate) -> float:
        """In nats, of cutting several parts."""
        ...

    def cut(self, candidate: Candidate) -> None:
        """Take notice of a cut."""
        ...

    def settle(self, site: SiteKey) -> bool:
        """Bring a site up to date with earlier cuts; returns whether its rises changed."""
        ...


class Additive:
    """Scores that add up: each part's own, whatever else is cut."""

    def __init__(self, scores: Mapping[SiteKey, NDArray[np.float64]]) -> None:
        self._scores = scores

    def rises(self, site: SiteKey) -> NDArray[np.float64]:
        """The parts' own scores."""
        return self._scores[site]

    def rise(self, candidate: Candidate) -> float:
        """The sum of the parts' scores."""
        return float(sum(self._scores[site][list(parts)].sum() for site, parts in candidate))

    def cut(self, candidate: Candidate) -> None:
        """Nothing changes."""

    def settle(self, site: SiteKey) -> bool:
        """Nothing changes."""
        del site
        return False


class Savings:
    """What each candidate takes off the cost: the cost of the plan before minus the one after."""

    def __init__(self, graph: Graph, cost: Cost, alive: Alive) -> None:
        self._graph = graph
        self._cost = cost
        self._alive = alive
        self._known: dict[Candidate, float] = {}
        self._neurons: dict[SiteKey, float] = {}
        self.total = self.measure()

    def measure(self) -> float:
        """The cost of what is alive."""
        return self._cost(self._alive.circuit(self._graph, _APART))

    def of(self, candidate: Candidate) -> float:
        """What cutting a candidate saves."""
        if candidate not in self._known:
            after = self._cost(self._alive.without(candidate).circuit(self._graph, _APART))
            self._known[candidate] = self.total - after
        return self._known[candidate]

    def of_neuron(self, site: SiteKey) -> float:
        """What cutting one neuron of a site saves: the same for all but the last of them.

        With the last one goes what the whole MLP needs: operations, and under a norm over its
        neurons all of these.
        """
        if self._alive.at(site).sum() == 1:
            return self.of(((site, self._alive.left(site)),))
        if site not in self._neurons:
            first = self._alive.left(site)[:1]
            self._neurons[site] = self.of(((site, first),))
        return self._neurons[site]

    def cut(self, candidate: Candidate) -> None:
        """Take notice of a cut; neurons save what was predicted, the rest is measured anew."""
        [(site, parts), *others] = candidate
        layers = _layers(candidate)
        if not all(self._alive.left(place) for place, _ in candidate):
            # Other layers may now reach nothing, or be constant.
            self._forget(lambda _: True)
            self._neurons = {}
        elif site in self._neurons and len(parts) == 1 and not others:
            self.total -= self._neurons[site]
            self._lose_neuron(site, parts[0])
            return
        else:
            # What would empty a site saves what then reaches nothing, in whatever layer.
            self._forget(lambda item: not layers.isdisjoint(_layers(item)) or self._empties(item))
            self._neurons = {
                place: saving for place, saving in self._neurons.items() if place[0] not in layers
            }
        self.total = self.measure()

    def _lose_neuron(self, site: SiteKey, neuron: int) -> None:
        """What cuts all neurons of a site leaves the same behind, and so saves one neuron less."""
        saving, self._known = self._known, {}
        for item, saved in saving.items():
            if site not in dict(item):
                self._known[item] = saved
            elif len(dict(item)[site]) > 1:
                left = tuple(
                    (place, tuple(part for part in parts if (place, part) != (site, neuron)))
                    for place, parts in item
                )
                self._known[left] = saved - self._neurons[site]

    def _forget(self, stale: Callable[[Candidate], bool]) -> None:
        self._known = {item: saving for item, saving in self._known.items() if not stale(item)}

    def _empties(self, candidate: Candidate) -> bool:
        return any(len(parts) >= len(self._alive.left(site)) for site, parts in candidate)


def _layers(candidate: Candidate) -> set[int]:
    return {layer for (layer, _, _), _ in candidate}


def cut_down(
    graph: Graph,
    alive: Alive,
    scorer: Scorer,
    cost: Cost,
    *,
    budget: float,
    ablation: Ablation = "linear",
) -> Iterator[float]:
    """Cut the cheapest candidate per saving until the cost is within the budget.

    Parts that come to reach nothing go too; the last head that shows the class token the image
    stays.

    Args:
        graph: Of the model, per token kind or over whole tokens.
        alive: What is left; changed in place.
        scorer: Predicts rises of the KL.
        cost: Of a circuit.
        budget: In the unit of ``cost``.
        ablation: Under which the circuit has to be within it.

    Yields:
        The cost after each cut.

    Raises:
        CircuitError: With nothing left to cut the cost is still above the budget.
    """
    savings = Savings(graph, cost, alive)
    steps = count()
    while savings.total > budget or cost(alive.circuit(graph, ablation)) > budget:
        together = next(steps) % _TOGETHER_EVERY == 0
        candidate = _best(graph, alive, scorer, savings, together=together)
        if candidate is None and not together:
            continue
        if candidate is None:
            raise CircuitError(
                f"the budget of {budget:.4g} cannot be met: with every part cut that saves "
                f"anything, {savings.measure():.4g} is left"
            )
        if sum(scorer.settle(site) for site, _ in candidate):
            continue
        alive.cut(candidate)
        scorer.cut(candidate)
        if not all(alive.left(site) for site, _ in candidate):
            alive.keep_live(alive.circuit(graph, "mean"))
        savings.cut(candidate)
        yield savings.total


def _best(
    graph: Graph, alive: Alive, scorer: Scorer, savings: Savings, *, together: bool
) -> Candidate | None:
    best, least = None, np.inf
    for site in _sites(graph):
        parts = np.flatnonzero(alive.at(site))
        if not len(parts):
            continue
        rises = scorer.rises(site)[parts]
        if site[1] == "neurons":
            gained = np.full(len(parts), savings.of_neuron(site))
        else:
            gained = np.array([savings.of(((site, (part,)),)) for part in parts.tolist()])
        ratios = np.full(len(parts), np.inf)
        np.divide(rises, gained, out=ratios, where=gained > 0)
        chosen = int(ratios.argmin())
        candidate: Candidate = ((site, (int(parts[chosen]),)),)
        if ratios[chosen] < least and not _is_blind(graph, alive.without(candidate)):
            best, least = candidate, float(ratios[chosen])
    for candidate in _together(graph, alive) if together else ():
        gained = savings.of(candidate)
        if gained <= 0 or _is_blind(graph, alive.without(candidate)):
            continue
        if (ratio := scorer.rise(candidate) / gained) < least:
            best, least = candidate, ratio
    return best


def _is_blind(graph: Graph, alive: Alive) -> bool:
    """Whether the classifier reads neither patches nor a head that could tell it of them."""
    if "patch" in graph.readout:
        return False
    kinds = [graph.kind_number(graph.targets[target]) for target in graph.classifiers]
    return not alive.heads[:, :, kinds].any()


def _sites(graph: Graph) -> Iterator[SiteKey]:
    kinds = ("heads", "neurons")
    yield from product(range(graph.num_layers), kinds, range(graph.num_kinds))


def _together(graph: Graph, alive: Alive) -> Iterator[Candidate]:
    """Several parts at once: a head in all kinds, a whole attention, MLP or block of a kind."""
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
