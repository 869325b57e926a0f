"""Rounds of cutting: score the model as cut so far, cut some more, fit a fill, and again."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch

from vitcut.circuit import Circuit
from vitcut.discovery.controls import magnitude_scores, random_scores
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.masked.fill import zero_fill
from vitcut.masked.fitting import Fitter
from vitcut.masked.part_model import PartModel
from vitcut.metrics import coarse_log_probs
from vitcut.model.weights import ViTWeights
from vitcut.names import Ablation
from vitcut.progress import Meter
from vitcut.selection.greedy import Additive, Alive, Cost, Scorer, by_site, cut_down
from vitcut.selection.joint import Joint
from vitcut.selection.responses import trace_sites
from vitcut.selection.settings import Budget
from vitcut.shapes import Float, Int, Tensor

_BATCH = 32
"""Images per forward pass of the uncut model."""


class Selection:
    """The parts of one model that are left, round by round."""

    def __init__(
        self,
        weights: ViTWeights,
        budget: Budget,
        *,
        ablation: Ablation,
        pixels: Float[Tensor, "images channels y x"],
        group_of_class: Int[Tensor, "classes"],
        fitter: Fitter,
        cost: Cost,
    ) -> None:
        """Start with every part that has a path to the classifier.

        Args:
            weights: The model, in the precision to compute with.
            budget: How parts are chosen.
            ablation: What stands in for cut parts: ``mean``, ``zero`` or ``linear``.
            pixels: Normalised images that parts are scored on.
            group_of_class: The group number of each class of the model.
            fitter: Fits a fill to the model as cut so far.
            cost: The cost of a circuit's compact model.
        """
        self.graph = weights.graph_of(budget.tokens)
        self._weights = weights
        self._budget = budget
        self._ablation: Ablation = ablation
        self._pixels = pixels
        self._group_of_class = group_of_class
        self._num_groups = int(group_of_class.max()) + 1
        self._fitter = fitter
        self._cost = cost
        # A control scores heads and neurons alone.
        self._num_patches = (
            len(weights.positions) if budget.positions and budget.scores == "fisher" else None
        )
        self.restart()
        self._scorer: Scorer | None = None
        self.smallest = smallest_cost(self.graph, weights.num_neurons, cost, self._num_patches)

    def resume(self, circuit: Circuit) -> None:
        """Go on from the circuit of an earlier round.

        Raises:
            CircuitError: The circuit belongs to another model, or has other token kinds.
        """
        neurons, patches = self._alive.neurons.shape, (len(self._weights.positions),)
        if (
            circuit.graph != self.graph
            or (circuit.neurons is not None and circuit.neurons.shape != neurons)
            or (circuit.positions is not None and circuit.positions.shape != patches)
        ):
            raise CircuitError(
                "the circuit has other blocks, heads, neurons, patches or token kinds than this "
                f"selection of {self.graph.num_layers} blocks, {self.graph.num_heads} heads, "
                f"{neurons[2]} neurons, {patches[0]} patches and {self.graph.num_kinds} kinds: use "
                "the model and --tokens that it was found with"
            )
        if not self._budget.rescore and self._scorer is None:
            self._scorer = self._score()
        self.restart()
        self._alive.keep_live(circuit)

    def restart(self) -> None:
        """Go back to the uncut model."""
        self._alive = Alive.useful(self.graph, self._weights.num_neurons, self._num_patches)

    @property
    def circuit(self) -> Circuit:
        """What is left."""
        return self._alive.circuit(self.graph, self._ablation)

    def cost(self) -> float:
        """The cost of what is left."""
        return self._cost(self.circuit)

    def cut_to(self, target: float) -> None:
        """Run one round: cut down to a target cost.

        Raises:
            CircuitError: The target cannot be met; nothing is cut then.
        """
        if target < self.smallest:
            raise CircuitError(
                f"the budget of {target:.4g} cannot be met: the smallest model that still sees the "
                f"image costs {self.smallest:.4g}"
            )
        before = self.cost()
        if before <= target:
            return
        if self._scorer is None or self._budget.rescore:
            self._scorer = self._score()
        # Cut in a copy: a round that fails halfway leaves everything as it was.
        alive = self._alive.copy()
        cuts = cut_down(
            self.graph, alive, self._scorer, self._cost, budget=target, ablation=self._ablation
        )
        with Meter("cutting", 100, unit="%") as meter:
            done = 0
            for number, left in enumerate(cuts, start=1):
                now = min(100, round(100 * (before - left) / (before - target)))
                meter.advance(now - done, note=f"{number} cuts")
                done = now
        self._alive = alive
        if self._budget.rescore:
            self._scorer = None  # Frees activations and gradients before the next fit.

    @cached_property
    def _full_log_probs(self) -> Float[Tensor, "images groups"]:
        """The task distribution of the uncut model."""
        weights = self._weights
        uncut = PartModel(weights, Circuit.full(weights.graph, ablation="zero"), zero_fill(weights))
        batches = self._pixels.split(_BATCH)
        with torch.inference_mode():
            logits = [
                uncut.run(batch.to(weights.device, weights.dtype)).logits for batch in batches
            ]
        return coarse_log_probs(torch.cat(logits), self._group_of_class, self._num_groups)

    def _score(self) -> Scorer:
        """Score every part of the model as cut so far."""
        budget, weights = self._budget, self._weights
        if budget.scores != "fisher":
            scores = (
                magnitude_scores(weights, self.graph)
                if budget.scores == "magnitude"
                else random_scores(self.graph, weights.num_neurons, seed=budget.seed)
            )
            return Additive(by_site(scores.heads, scores.neurons))
        fitted = self._fitter.take(self.circuit)
        fill = fitted.fill.like(weights.patch_weight)
        statistics = None if fitted.statistics is None else dict(fitted.statistics)
        del fitted  # Each covariance is freed as soon as its inverse is there.
        if statistics is not None and not budget.refresh_fraction:
            # Without covariances no part predicts another: each is scored as if it got its mean.
            statistics = {
                place: replace(site, covariance=site.covariance.diagonal().diag())
                for place, site in statistics.items()
            }
        sites, objective = trace_sites(
            weights,
            self._pixels,
            self._group_of_class,
            self.circuit,
            fill,
            alive=self._alive,
            log_p=self._full_log_probs,
            statistics=statistics,
            seed=budget.seed,
        )
        refresh_fraction = 0.0 if statistics is None else budget.refresh_fraction
        joint = Joint(
            sites,
            objective,
            refresh_fraction=refresh_fraction,
            shrink_over=len(self._pixels) if budget.shrink else None,
        )
        return joint if budget.joint else Additive(joint.alone())


def smallest_cost(
    graph: Graph, num_neurons: int, cost: Cost, num_patches: int | None = None
) -> float:
    """The cost of the cheapest model that sees the image.

    Nothing is kept where the classifier reads patches, otherwise one head that writes to what it
    reads, in the block where that is cheapest; and a single patch, if positions may be cut.
    """
    alive = Alive.useful(graph, num_neurons, num_patches)
    alive.heads[:] = alive.neurons[:] = False
    if alive.positions is not None:
        alive.positions[1:] = False
    if "patch" in graph.readout:
        return cost(alive.circuit(graph, "mean"))
    costs: list[float] = []
    for layer in range(graph.num_layers):
        alive.heads[:] = False
        alive.heads[layer, 0, graph.kind_number(graph.targets[graph.classifier])] = True
        costs.append(cost(alive.circuit(graph, "mean")))
    return min(costs)


def geometric(start: float, end: float, rounds: int) -> Iterator[float]:
    """Budgets from one cost to another, each the same fraction of the one before."""
    for number in range(1, rounds + 1):
        yield start * (end / start) ** (number / rounds)
