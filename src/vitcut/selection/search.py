"""The search for a circuit within a budget: rounds of selection, each saved, measured and resumed.

A budget in MACs is reached in a fixed number of rounds. A latency is predicted by the cost model
while parts are chosen and measured after each round; the next round corrects for the error.

Files of a run: ``path/NAME/circuit.json`` and ``path/NAME/step.json`` for each round, and
``path.json`` once the search is complete.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from vitcut import store
from vitcut.benchmark.evaluation import Evaluation, evaluate
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs, dense_macs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.planning import plan_circuit
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ArtefactError, CircuitError
from vitcut.images.load import Images, ImageSet, normalise
from vitcut.images.stratified import choose_evenly
from vitcut.masked.fitting import Fitter, fit_gib
from vitcut.model.model import Model
from vitcut.model.weights import ViTWeights
from vitcut.progress import say
from vitcut.runs import PATH_FILE, Run
from vitcut.selection.greedy import Alive
from vitcut.selection.responses import held_gib
from vitcut.selection.rounds import Selection, geometric, smallest_cost
from vitcut.selection.settings import Budget
from vitcut.settings import as_plain, require_memory

_FORMAT_VERSION = 1

_MOST_ROUNDS = 16
"""How many rounds a latency budget may take."""
_WORKING_GIB = 0.5
"""What intermediate results of single operations take, at most."""
_SLOWEST_STEP, _FASTEST_STEP = 0.97, 0.7
"""The largest and smallest ratio of one round's predicted latency to the last one's."""


@dataclass(frozen=True, kw_only=True)
class PathStep:
    """The model after one round of a selection, measured on val images."""

    name: str
    circuit: str
    """Path of the circuit, relative to the run directory."""
    macs: int
    macs_fraction: float
    """MACs as a fraction of the dense model's."""
    accuracy_coarse: float
    kl: float
    """Mean KL(dense || cut) on the task distribution, in nats."""
    heads_kept: int
    neurons_kept_fraction: float
    latency_fraction: float | None
    """Latency as a fraction of the dense model's, in the runtime and at the batch size of a latency
    budget; None where it is not measured."""

    def save(self, path: Path) -> None:
        """Write the step atomically: its latency is measured once, and decides the next round."""
        store.save(path, self, version=_FORMAT_VERSION)

    @classmethod
    def load(cls, path: Path) -> "PathStep":
        """Read a step.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        return store.load(path, cls, kind="step", version=_FORMAT_VERSION)


@dataclass(frozen=True, kw_only=True)
class SearchPath:
    """The steps of a search that is complete, from the first round to the last."""

    steps: tuple[PathStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ArtefactError("it has no steps")

    def save(self, path: Path) -> None:
        """Write ``path.json`` atomically."""
        store.save(path, self, version=_FORMAT_VERSION)

    @classmethod
    def load(cls, path: Path) -> "SearchPath":
        """Read ``path.json``.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        return store.load(path, cls, kind="path", version=_FORMAT_VERSION)


def budget_point(
    budget: Budget, settings: CutSettings, circuit: Circuit
) -> tuple[str | None, dict[str, Any] | None]:
    """The name of a budget's point, and what was asked for."""
    if not budget.is_given:
        return None, None
    if budget.target_macs is not None:
        asked: dict[str, Any] = {"macs": budget.target_macs}
    else:
        asked = {"latency": budget.target_latency, "runtime": budget.runtime}
        asked["batch"] = settings.batch
    kind, target = next(iter(asked.items()))
    return f"{budget.scores}-{circuit.ablation}-{kind}-{target:g}", asked


def print_path(steps: Sequence[PathStep]) -> None:
    """Print a table with one line per round."""
    timed = any(step.latency_fraction is not None for step in steps)
    table = Table(title="the path, on val images")
    table.add_column("point")
    for header in ("MACs", *(("latency",) if timed else ()), "coarse", "KL", "heads", "neurons"):
        table.add_column(header, justify="right")
    for step in steps:
        latency = "-" if step.latency_fraction is None else f"{step.latency_fraction:.1%}"
        table.add_row(
            step.name,
            f"{step.macs_fraction:.1%}",
            *((latency,) if timed else ()),
            f"{step.accuracy_coarse:.1%}",
            f"{step.kl:z.4f}",
            str(step.heads_kept),
            f"{step.neurons_kept_fraction:.1%}",
        )
    table.caption = "MACs and latency as parts of the dense model's" if timed else None
    Console().print(table)


def require_possible(weights: ViTWeights, budget: Budget, costs: CostModel) -> None:
    """Refuse MACs that no circuit has. A latency has to be measured first.

    Raises:
        CircuitError: The target is below the smallest model or above the uncut one.
    """
    target = budget.target_macs
    if target is None:
        return
    graph, dense = weights.graph_of(budget.tokens), dense_macs(weights.shape)

    def macs(circuit: Circuit) -> float:
        return count_macs(plan_circuit(weights.shape, circuit, costs))

    least = smallest_cost(graph, weights.num_neurons, macs) / dense
    most = macs(Alive.useful(graph, weights.num_neurons).circuit(graph, "mean")) / dense
    if target < least:
        raise CircuitError(
            f"target-macs {target:g} cannot be met: the smallest model that still sees the image "
            f"has {least:.3f} of the dense model's MACs"
        )
    if target > most:
        raise CircuitError(
            f"target-macs {target:g} leaves nothing to cut: compiled and uncut the model has "
            f"{most:.3f} of the dense model's MACs"
        )


def search(
    model: Model,
    images: Images,
    budget: Budget,
    settings: CutSettings,
    fitter: Fitter,
    costs: CostModel,
    run: Run,
    *,
    threads: int = 1,
    fractions: Sequence[float] | None = None,
) -> Circuit:
    """Search for a circuit within a budget, or go on with a search that was interrupted.

    Args:
        model: The dense model.
        images: The images of the task.
        budget: What to reach, and how to choose parts.
        settings: The ablation of the cut, on how many images fills are fitted (parts are scored
            on others), the memory that scoring may take, and the seed for drawing images.
        fitter: Fits the fills.
        costs: The costs that plans are chosen by, at the batch size that latency is measured with.
        run: Where the rounds are saved.
        threads: CPU threads that a latency is measured with.
        fractions: Predicted latencies to walk down to, one round each, as falling fractions of the
            uncut compact model's. Nothing is timed. The budget must have a ``target_latency``,
            whose value is then ignored.

    Returns:
        The circuit of the last round.

    Raises:
        CircuitError: The budget cannot be met.
    """

    def find() -> SearchPath:
        _require_room(model, images, budget, settings)
        timed = fractions is None
        rounds = _Rounds(model, images, budget, settings, fitter, costs, run, threads, timed)
        dense = dense_macs(model.weights.shape)
        if fractions is not None:
            costed = {
                f"predicted-{fraction:.4f}": fraction * rounds.uncut for fraction in fractions
            }
        elif budget.target_macs is not None:
            # Fractions that round to one name are one round, cut to the smallest of them.
            falling = geometric(rounds.uncut / dense, budget.target_macs, budget.rounds)
            costed = {f"macs-{fraction:.4f}": fraction * dense for fraction in falling}
        else:
            return SearchPath(steps=tuple(rounds.until_fast(budget.target_latency or 1.0)))
        return SearchPath(steps=tuple(rounds.make(name, cost) for name, cost in costed.items()))

    path = run.once(PATH_FILE, find, SearchPath.load)
    return Circuit.load(run.path / path.steps[-1].circuit)


def _require_room(model: Model, images: Images, budget: Budget, settings: CutSettings) -> None:
    """Refuse a search that would take more memory than is allowed, before anything is computed.

    Raises:
        ConfigError: It would take more.
    """
    weights, task = model.weights, images.task
    fitted, scored = min(settings.images, len(images.train)), 0
    needed = 0.0
    if settings.ablation_for(None) == "linear":
        uncut = Circuit.full(weights.graph_of(budget.tokens), ablation="linear")
        needed = fit_gib(weights, uncut, fitted)
    if budget.scores == "fisher":
        scored = min(budget.score_images, len(images.train))
        needed = max(needed, held_gib(weights, scored, len(task.groups)))
    pixels = (fitted + scored) * weights.channels * weights.image_size**2 * 4 / 2**30
    require_memory(
        f"a search with fills of {fitted} images and scores of {scored}",
        needed_gib=needed + pixels + _WORKING_GIB,
        memory_gib=settings.memory_gib,
    )


@dataclass(eq=False)
class _Rounds:
    """The rounds of one search; each is cut, saved and measured, or read back."""

    model: Model
    images: Images
    budget: Budget
    settings: CutSettings
    fitter: Fitter
    costs: CostModel
    run: Run
    threads: int
    timed: bool

    def __post_init__(self) -> None:
        self.started, self.resumed = time.perf_counter(), False
        self.smooth_costs = replace(self.costs, smooth=True)
        self.selection = Selection(
            self.model.weights,
            self.budget,
            ablation=self.settings.ablation_for(None),
            pixels=normalise(self.score_images().all(), self.model.preprocessing),
            group_of_class=torch.from_numpy(self.images.task.group_of_class),
            fitter=self.fitter,
            cost=self.cost,
        )
        self.uncut = self.selection.cost()

    def score_images(self) -> ImageSet:
        """Training images that no fill is fitted to, if there are enough of them."""
        # On the images of the fit a linear fill predicts cut parts too well: scores are too low.
        many, most, seed = self.budget.score_images, len(self.images.train), self.settings.seed
        fitted = self.images.calibration(min(self.settings.images, most), seed=seed)
        drawn = self.images.calibration(min(self.settings.images + many, most), seed=seed)
        unseen = np.flatnonzero(~np.isin(drawn.rows, fitted.rows))
        if len(unseen) == many:
            return drawn.take(unseen)
        say(
            f"too few training images to score parts on {many} others than the {len(fitted)} that "
            "fills are fitted to: cuts look cheaper than they are; give fewer --images"
        )
        return self.images.calibration(min(many, most), seed=seed)

    def cost(self, circuit: Circuit) -> float:
        """What the budget limits: MACs, or predicted milliseconds."""
        plan = plan_circuit(self.model.weights.shape, circuit, self.costs)
        if self.budget.target_latency is None:
            return count_macs(plan)
        return self.smooth_costs.latency_ms(plan)

    def until_fast(self, target: float) -> Iterator[PathStep]:
        """Rounds until the measured latency is at most a fraction of the dense model's."""
        fraction = max(_FASTEST_STEP, target)
        nearest, fastest = "the uncut model", 1.0
        for _ in range(_MOST_ROUNDS):
            if fraction * self.uncut < self.selection.smallest:
                break
            step = self.make(f"predicted-{fraction:.4f}", fraction * self.uncut)
            yield step
            reached = step.latency_fraction or 1.0
            if reached <= target:
                return
            if reached < fastest:
                fastest, nearest = reached, f"{reached:.3f} of dense, {step.circuit}"
            # The measured latency has to fall to target / reached of what it is. Assume that the
            # predicted one falls with it, but neither creep towards the target nor leap past it.
            ratio = min(_SLOWEST_STEP, max(_FASTEST_STEP, target / reached))
            fraction = self.selection.cost() / self.uncut * ratio
        raise CircuitError(
            f"target-latency {target:g} cannot be met: the nearest in {self.run.path} is "
            f"{nearest}; ask for more, or for another runtime or batch"
        )

    def make(self, name: str, target: float) -> PathStep:
        """Cut to a target cost and measure what is left, or read back what is done already."""
        resumed = self.budget.rescore
        if not self.budget.rescore:
            # Scores that are taken once keep a sum over all earlier cuts. A saved circuit does not
            # hold it, so these rounds are always made again.
            self.selection.cut_to(target)

        def cut() -> Circuit:
            nonlocal resumed
            resumed = False
            self.selection.cut_to(target)
            took = round(time.perf_counter() - self.started, 2)
            return replace(
                self.selection.circuit,
                method=self.budget.scores,
                task=self.images.task.name,
                provenance={
                    "model": self.model.name,
                    "weight_hash": self.model.weight_hash,
                    "images_fingerprint": self.images.fingerprint,
                    "selection": as_plain(self.budget),
                    "cut": as_plain(replace(self.settings, costs=None)),
                    "costs": self.costs.fingerprint,
                    # Unknown for a search that was resumed.
                    "seconds": None if self.resumed else took,
                },
            )

        file = f"path/{name}/circuit.json"
        circuit = self.run.once(file, cut, Circuit.load)
        if resumed:
            self.resumed = True
            self.selection.resume(circuit)

        def measure() -> PathStep:
            fill, weights = self.fitter.fit(circuit).fill, self.model.weights
            compact = compile_circuit(weights, circuit, fill, costs=self.costs)
            found, macs = self.evaluated(compact, self.dense), count_macs(compact.plan)
            timed = self.timed and self.budget.target_latency is not None
            return PathStep(
                name=name,
                circuit=file,
                macs=macs,
                macs_fraction=macs / dense_macs(weights.shape),
                accuracy_coarse=found.accuracy_coarse,
                kl=found.kl or 0.0,
                heads_kept=circuit.num_heads_kept,
                neurons_kept_fraction=circuit.neurons_kept_fraction,
                latency_fraction=self.latency_fraction(compact) if timed else None,
            )

        step = self.run.once(f"path/{name}/step.json", measure, PathStep.load)
        latency = step.latency_fraction
        say(
            f"{step.name}: {step.macs_fraction:.1%} of the MACs"
            + ("" if latency is None else f", {latency:.1%} of the latency")
            + f", coarse accuracy {step.accuracy_coarse:.1%}, KL {step.kl:z.4f} on val images"
        )
        return step

    def latency_fraction(self, compact: CompactViT) -> float:
        """The latency of a compact model as a fraction of the dense model's, timed in turn."""
        val, batch = self.images.val, self.costs.batch
        config = BenchSettings(
            runtimes=(self.budget.runtime,), batches=(batch,), threads=self.threads, seconds=1.0
        )
        models: dict[str, nn.Module] = {"dense": self.model.module, "cut": compact}
        pixels = normalise(val.read(range(min(batch, len(val)))), self.model.preprocessing)
        report = measure_latency(models, pixels, config, baselines=("dense",))
        return 1 / report.comparisons[0].ratio

    @cached_property
    def dense(self) -> Evaluation:
        """The dense model on val images."""
        return self.evaluated(self.model.module)

    def evaluated(self, module: nn.Module, reference: Evaluation | None = None) -> Evaluation:
        """A module on val images."""
        val = self.images.val
        chosen = choose_evenly(
            val.labels, min(self.budget.val_images, len(val)), seed=self.settings.seed
        )
        return evaluate(
            module,
            val.take(chosen),
            self.images.task,
            self.model.preprocessing,
            reference=reference,
        )
