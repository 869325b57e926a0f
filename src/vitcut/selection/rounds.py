"""Rounds of cutting: score the model as cut so far, cut a share of the budget, fill, and again.

What one round chooses is left to ``greedy.py``; measuring and saving what comes out to the caller.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.discovery.controls import PartScores, magnitude_scores, random_scores
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import SiteStatistics
from vitcut.model.weights import ViTWeights
from vitcut.names import Ablation, SiteKey
from vitcut.progress import Meter
from vitcut.selection.greedy import Additive, Alive, Cost, Scorer, cut_down
from vitcut.selection.joint import Joint
from vitcut.selection.settings import Budget
from vitcut.selection.sites import trace_sites
from vitcut.settings import require_memory
from vitcut.shapes import Float, Int, Tensor


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What parts are scored on, and what fills them."""

    score_pixels: Float[Tensor, "images channels y x"]
    """Normalised images whose gradients are taken."""
    group_of_class: Int[Tensor, "classes"]
    """The group number of each class of the model."""
    fill: Callable[[Circuit], tuple[Fill, Mapping[SiteKey, SiteStatistics] | None]]
    """What stands in for what a circuit cuts, and the statistics of a linear fill."""
    memory_gib: float = 16.0
    """Most memory that activations and gradients may take, in GiB."""


class Selection:
    """The parts of one model that are left, round by round."""

    def __init__(
        self,
        weights: ViTWeights,
        calibration: Calibration,
        cost: Cost,
        config: Budget,
        ablation: Ablation,
    ) -> None:
        """Start with everything; parts that reach nothing are cut at once.

        Args:
            weights: The model, in the precision to compute with.
            calibration: Images.
            cost: Of a circuit's compact model.
            config: How to choose.
            ablation: ``mean``, ``zero`` or ``linear``.
        """
        self._weights = weights
        self._calibration = calibration
        self._cost = cost
        self._config = config
        self._ablation: Ablation = ablation
        self.graph = weights.graph_of(config.tokens)
        self._alive = useful_parts(self.graph, weights.num_neurons)
        self._scorer: Scorer | None = None
        self.smallest = smallest_cost(self.graph, weights.num_neurons, cost)

    def resume(self, circuit: Circuit) -> None:
        """Go on from the circuit of an earlier round.

        Raises:
            CircuitError: It is a circuit of another model, or of other token kinds.
        """
        neurons = self._alive.neurons.shape
        if circuit.graph != self.graph or (
            circuit.neurons is not None and circuit.neurons.shape != neurons
        ):
            raise CircuitError(
                "the circuit has other blocks, heads, neurons or token kinds than this "
                f"selection of {self.graph.num_layers} blocks, {self.graph.num_heads} heads, "
                f"{neurons[2]} neurons and {self.graph.num_kinds} kinds: use the model and "
                "--tokens that it was found with"
            )
        alive = self._alive.copy()
        if not self._config.rescore and self._scorer is None:
            self._scorer = self._score()
        alive.keep_live(circuit)
        self._alive = alive

    @property
    def circuit(self) -> Circuit:
        """What is left."""
        return self._alive.circuit(self.graph, self._ablation)

    def cost(self) -> float:
        """Of what is left."""
        return self._cost(self.circuit)

    def cut_to(self, budget: float) -> None:
        """One round: cut down to a budget in the unit of the cost.

        Raises:
            CircuitError: The budget cannot be met; nothing is cut then.
        """
        if budget < self.smallest:
            raise CircuitError(
                f"the budget of {budget:.4g} cannot be met: the smallest model that still sees the "
                f"image costs {self.smallest:.4g}"
            )
        before = self.cost()
        if before <= budget:
            return
        if self._scorer is None or self._config.rescore:
            self._scorer = self._score()
        alive = self._alive.copy()
        cuts = cut_down(
            self.graph,
            alive,
            self._scorer,
            self._cost,
            budget=budget,
            ablation=self._ablation,
        )
        with Meter("cutting", 100, unit="%") as meter:
            done = 0
            for number, left in enumerate(cuts, start=1):
                now = min(100, round(100 * (before - left) / (before - budget)))
                meter.advance(now - done, note=f"{number} cuts")
                done = now
        self._alive = alive

    def _score(self) -> Scorer:
        config, calibration = self._config, self._calibration
        if config.scores != "fisher":
            return Additive(by_site(self._control()))
        require_memory(
            f"scoring on {len(calibration.score_pixels)} images",
            needed_gib=self._gradients_gib(),
            memory_gib=calibration.memory_gib,
        )
        fill, statistics = calibration.fill(self.circuit)
        if statistics is not None and not config.refresh_fraction:
            statistics = {place: uncorrelated(site) for place, site in statistics.items()}
        sites, objective = trace_sites(
            self._weights,
            calibration.score_pixels,
            calibration.group_of_class,
            (self.circuit, fill.like(self._weights.patch_weight)),
            alive=(self._alive.heads, self._alive.neurons),
            statistics=statistics,
        )
        refresh_fraction = 0.0 if statistics is None else config.refresh_fraction
        joint = Joint(sites, objective, refresh_fraction=refresh_fraction)
        return joint if config.joint else Additive(joint.alone())

    def _gradients_gib(self) -> float:
        """Of one activation and a gradient per coarse class of every head and neuron."""
        weights, calibration = self._weights, self._calibration
        attended = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
        features = len(weights.blocks) * (attended + weights.num_neurons)
        values = len(calibration.score_pixels) * weights.num_tokens * features
        classes = int(calibration.group_of_class.max()) + 1
        return values * (1 + classes) * torch.finfo(weights.dtype).bits / 8 / 2**30

    def _control(self) -> PartScores:
        weights, config = self._weights, self._config
        if config.scores == "magnitude":
            return magnitude_scores(weights, self.graph)
        return random_scores(self.graph, weights.num_neurons, seed=config.seed)


def by_site(scores: PartScores) -> dict[SiteKey, NDArray[np.float64]]:
    """Scores of heads and neurons by layer, parts and token kind."""
    blocks, _, kinds = scores.heads.shape
    places = list(product(range(blocks), range(kinds)))
    heads: dict[SiteKey, NDArray[np.float64]] = {
        (layer, "heads", kind): scores.heads[layer, :, kind] for layer, kind in places
    }
    return heads | {(layer, "neurons", kind): scores.neurons[layer, kind] for layer, kind in places}


def useful_parts(graph: Graph, num_neurons: int) -> Alive:
    """Every part from which the classifier can be reached."""
    alive = Alive.everything(graph, num_neurons)
    alive.keep_live(Circuit.full(graph))
    return alive


def uncorrelated(site: SiteStatistics) -> SiteStatistics:
    """The same site, as if no part said anything of another: cut ones get their mean."""
    return replace(site, covariance=site.covariance.diagonal().diag())


def smallest_cost(graph: Graph, num_neurons: int, cost: Cost) -> float:
    """The cost of the cheapest model that sees the image.

    Everything is cut where the classifier reads patches, else all but one head of the readout.
    """
    alive = Alive.everything(graph, num_neurons)
    alive.heads[:] = alive.neurons[:] = False
    if "patch" in graph.readout:
        return cost(alive.circuit(graph, "mean"))
    costs: list[float] = []
    for layer in range(graph.num_layers):
        alive.heads[:] = False
        alive.heads[layer, 0, graph.kind_number(graph.targets[graph.classifier])] = True
        costs.append(cost(alive.circuit(graph, "mean")))
    return min(costs)


def geometric(start: float, end: float, rounds: int) -> Iterator[float]:
    """Budgets from a cost to another, in equal ratios."""
    for number in range(1, rounds + 1):
        yield start * (end / start) ** (number / rounds)
