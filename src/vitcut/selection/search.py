"""The search for a circuit within a budget: rounds of selection, each saved, measured and resumed.

A budget in MACs is reached in a fixed number of rounds. A latency is predicted by the cost model
while parts are chosen and measured after each round; the next round corrects for the error.

An accuracy that may be lost is approached in steps and then from both sides.

Its files are described in ``steps.py``.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from vitcut.benchmark.bootstrap import paired_interval
from vitcut.benchmark.evaluation import Evaluation, evaluate, say_if_no_better
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs, dense_macs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.planning import plan_circuit
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ArtefactError, CircuitError, ConfigError
from vitcut.images.load import Images, ImageSet, normalise
from vitcut.images.stratified import choose_evenly
from vitcut.masked.fitting import Fitter, fit_gib
from vitcut.model.model import Model
from vitcut.model.weights import ViTWeights
from vitcut.progress import say
from vitcut.results import Asked
from vitcut.runs import PATH_FILE, Run
from vitcut.selection.greedy import Alive
from vitcut.selection.responses import held_gib
from vitcut.selection.rounds import Selection, geometric, smallest_cost
from vitcut.selection.settings import Budget
from vitcut.selection.steps import PathStep, SearchPath
from vitcut.settings import (
    as_plain,
    require_memory,
)
from vitcut.shapes import Tensor

_MOST_ROUNDS = 16
"""How many rounds a latency budget may take."""
_DROP_STEP, _CLOSER = 0.8, 3
"""The ratio of MACs from step to step towards a loss of accuracy, and how many steps are made from
the first one that passes it, which closes in on it."""
_CERTAIN = 3.0
"""Of N images without one change, the rate of changes is below 3 / N with 95 % confidence."""
_WORKING_GIB = 0.5
"""What intermediate results of single operations take, at most."""
_SLOWEST_STEP, _FASTEST_STEP = 0.97, 0.7
"""The largest and smallest ratio of one round's predicted latency to the last one's."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A circuit that meets a budget."""

    circuit: Circuit
    name: str
    """Of its point."""
    asked: Asked
    """What was asked for: {"macs": 0.2}, {"max_drop": 1.0}, or {"latency": 0.25, ...}."""


def _answers(
    path: SearchPath,
    budget: Budget,
    settings: CutSettings,
    run: Run,
    model: Model,
    images: Images,
) -> tuple[Answer, ...]:
    names = path.answers or (path.steps[-1].name,)
    asked: list[Asked] = [{"macs": target} for target in budget.macs]
    if budget.target_latency is not None:
        asked = [
            {
                "latency": budget.target_latency,
                "runtime": budget.runtime,
                "batch": settings.batch,
            }
        ]
    elif budget.max_drop is not None:
        asked = [{"max_drop": budget.max_drop}]
    if len(names) != len(asked):
        raise ArtefactError(
            f"{run.path / PATH_FILE} answers {len(names)} targets, this search has {len(asked)}: "
            "choose another --out"
        )
    found = {step.name: step for step in path.steps}
    answers: list[Answer] = []
    for name, wanted in zip(names, asked, strict=True):
        circuit = Circuit.load(run.path / found[name].circuit)
        kind, target = next(iter(wanted.items()))
        kind = kind.replace("_", "-")
        circuit.require_origin(model.weight_hash, images.fingerprint)
        point = f"{budget.scores}-{circuit.ablation}-{kind}-{target:g}"
        answers.append(Answer(circuit=circuit, name=point, asked=wanted))
    return tuple(answers)


def require_possible(weights: ViTWeights, budget: Budget, costs: CostModel) -> None:
    """Refuse MACs that no circuit has. A latency has to be measured first.

    Raises:
        CircuitError: The target is below the smallest model or above the uncut one.
    """
    if not budget.macs:
        return
    graph, dense = weights.graph_of(budget.tokens), dense_macs(weights.shape)

    def macs(circuit: Circuit) -> float:
        return count_macs(plan_circuit(weights.shape, circuit, costs))

    patches = len(weights.positions) if budget.positions else None
    least = smallest_cost(graph, weights.num_neurons, macs, patches) / dense
    most = macs(Alive.useful(graph, weights.num_neurons).circuit(graph, "mean")) / dense
    if min(budget.macs) < least:
        raise CircuitError(
            f"target-macs {min(budget.macs):g} cannot be met: the smallest model that still sees "
            f"the image has {least:.3f} of the dense model's MACs"
        )
    if max(budget.macs) > most:
        raise CircuitError(
            f"target-macs {max(budget.macs):g} leaves nothing to cut: compiled and uncut the model "
            f"has {most:.3f} of the dense model's MACs"
        )


def require_decidable(budget: Budget, images: Images) -> None:
    """Refuse a loss of accuracy that the val images are too few to exclude.

    Raises:
        ConfigError: They are.
    """
    val = len(images.val)
    if budget.max_drop is not None and budget.max_drop / 100 < _CERTAIN / val:
        raise ConfigError(
            f"max-drop {budget.max_drop:g} cannot be decided on {val} val images: even if a cut "
            f"changed none of them, a loss of {100 * _CERTAIN / val:.2g} points could not be "
            "excluded; allow at least that, or give more val images"
        )


def leave_images(settings: CutSettings, images: Images, budget: Budget) -> CutSettings:
    """The settings with fewer images for fills, where too few others would be left to score on.

    Fills are still fitted to at least half of the training images.
    """
    train = len(images.train)
    count = min(settings.images, max(train - budget.score_images, (train + 1) // 2))
    if budget.scores != "fisher" or count == settings.images:
        return settings
    say(f"fills are fitted to {count} of {train} training images, parts are scored on others")
    return replace(settings, images=count)


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
    warn: bool = True,
) -> tuple[Answer, ...]:
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
        warn: Say so if the model does not know the task; False where that was said.

    Returns:
        One circuit for each target, in falling order.

    Raises:
        CircuitError: The budget cannot be met.
        ConfigError: More memory is needed than allowed, or there are too few val images to tell
            whether an accuracy was lost.
    """
    require_decidable(budget, images)

    def find() -> SearchPath:
        _require_room(model, images, budget, settings)
        timed = fractions is None
        rounds = _Rounds(model, images, budget, settings, fitter, costs, run, threads, timed)
        if warn:
            say_if_no_better(rounds.dense, rounds.val, images.task, split="val")
        dense = dense_macs(model.weights.shape)
        if fractions is not None:
            costed = {
                f"predicted-{fraction:.4f}": fraction * rounds.uncut for fraction in fractions
            }
        elif budget.macs:
            # Fractions that round to one name are one round, cut to the smallest of them.
            falling = _ladder(rounds.uncut / dense, budget.macs, budget.rounds)
            costed = {_macs_name(fraction): fraction * dense for fraction in falling}
        elif budget.max_drop is not None:
            steps, name = rounds.until_dropped(budget.max_drop / 100)
            return SearchPath(steps=steps, answers=(name,))
        else:
            return SearchPath(steps=tuple(rounds.until_fast(budget.target_latency or 1.0)))
        return SearchPath(
            steps=tuple(rounds.make(name, cost) for name, cost in costed.items()),
            answers=tuple(map(_macs_name, budget.macs)),
        )

    path = run.once(PATH_FILE, find, SearchPath.load)
    return _answers(path, budget, settings, run, model, images)


def _macs_name(fraction: float) -> str:
    """The name of a step to a fraction of the dense model's MACs."""
    return f"macs-{fraction:.4f}"


def _ladder(start: float, targets: Sequence[float], rounds: int) -> Iterator[float]:
    """Falling fractions that meet every target, as steep as ``rounds`` steps to the last one."""
    steepest = (targets[-1] / start) ** (1 / rounds)
    for target in targets:
        steps = max(1, math.ceil(math.log(target / start) / math.log(steepest) - 1e-9))
        yield from list(geometric(start, target, steps))[:-1]
        yield target  # Exactly: its name is looked up again.
        start = target


def _require_room(model: Model, images: Images, budget: Budget, settings: CutSettings) -> None:
    """Refuse a search that would take more memory than is allowed, before anything is computed.

    Raises:
        ConfigError: It would take more.
    """
    weights, task = model.weights, images.task
    image = weights.channels * weights.image_size**2 * 4 / 2**30
    fitted, scored, needed = min(settings.images, len(images.train)), 0, 0.0
    if settings.ablation_for(None) == "linear":
        uncut = Circuit.full(weights.graph_of(budget.tokens), ablation="linear")
        needed = fitted * image + fit_gib(weights, uncut, fitted)
    if budget.scores == "fisher":
        scored = min(budget.score_images, len(images.train))
        held = held_gib(weights, weights.graph_of(budget.tokens), scored, len(task.groups))
        needed = max(needed, held) + scored * image
    require_memory(
        f"a search with fills of {fitted} images and scores of {scored}",
        needed_gib=needed + _WORKING_GIB,
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
            pixels=self.scored_pixels(),
            group_of_class=torch.from_numpy(self.images.task.group_of_class),
            fitter=self.fitter,
            cost=self.cost,
        )
        self.uncut = self.selection.cost()

    def scored_pixels(self) -> Tensor:
        """The normalised images that parts are scored on; none where scores need no images."""
        if self.budget.scores == "fisher":
            return normalise(self.score_images().all(), self.model.preprocessing)
        return self.model.weights.patch_weight.new_empty(0, self.model.weights.channels, 1, 1)

    def score_images(self) -> ImageSet:
        """Training images that no fill is fitted to."""
        # On the images of the fit a linear fill predicts cut parts too well: scores are too low.
        many, most, seed = self.budget.score_images, len(self.images.train), self.settings.seed
        fitted = self.images.calibration(min(self.settings.images, most), seed=seed)
        drawn = self.images.calibration(min(self.settings.images + many, most), seed=seed)
        unseen = np.flatnonzero(~np.isin(drawn.rows, fitted.rows))
        if len(unseen):
            return drawn.take(unseen)
        raise ConfigError(
            f"fills are fitted to all {most} training images: expected some to be left to score "
            f"parts on; {'give fewer --images' if most > 1 else 'add training images'}"
        )

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

    def until_dropped(self, most: float) -> tuple[tuple[PathStep, ...], str]:
        """Cut until more accuracy is lost than allowed, then close in on the last cut that holds.

        Args:
            most: The largest loss of coarse accuracy, as a fraction of 1.

        Returns:
            All steps that were made, and the name of the smallest one that holds.
        """
        dense = dense_macs(self.model.weights.shape)
        least = self.selection.smallest / dense
        steps: list[PathStep] = []
        holds: PathStep | None = None
        low, high = 0.0, self.uncut / dense
        closing = 0
        while closing < _CLOSER or (holds is None and closing < _MOST_ROUNDS):
            # Down by a fixed ratio until a step fails, then between it and the last that holds.
            if low == 0.0 and high * _DROP_STEP < least:
                low, closing = least, closing + 1
            fraction = high * _DROP_STEP if low == 0.0 else math.sqrt(low * high)
            if holds is not None:
                self.selection.resume(Circuit.load(self.run.path / holds.circuit))
            else:
                self.selection.restart()
            step = self.make(_macs_name(fraction), fraction * dense)
            steps.append(step)
            if step.change_low is not None and step.change_low >= -most:
                holds, high = step, fraction
            else:
                low = fraction
            closing += low > 0
        if holds is None:
            raise CircuitError(
                f"no cut loses less than {100 * most:g} points for certain: the nearest in "
                f"{self.run.path} keeps {steps[-1].macs_fraction:.1%} of the MACs; allow more, or "
                "give more val images"
            )
        return tuple(steps), holds.name

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
                    "model": self.model.public_name,
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
        circuit.require_origin(self.model.weight_hash, self.images.fingerprint)
        if resumed:
            self.resumed = True
            self.selection.resume(circuit)

        def measure() -> PathStep:
            fill, weights = self.fitter.fit(circuit).fill, self.model.weights
            compact = compile_circuit(weights, circuit, fill, costs=self.costs)
            found, macs = self.evaluated(compact, self.dense), count_macs(compact.plan)
            timed = self.timed and self.budget.target_latency is not None
            change_low, change_high = paired_interval(
                found.correct_coarse, self.dense.correct_coarse, seed=self.settings.seed
            )
            return PathStep(
                name=name,
                circuit=file,
                macs=macs,
                macs_fraction=macs / dense_macs(weights.shape),
                accuracy_coarse=found.accuracy_coarse,
                kl=found.kl or 0.0,
                change_low=change_low,
                change_high=change_high,
                heads_kept=circuit.num_heads_kept,
                neurons_kept_fraction=circuit.neurons_kept_fraction,
                positions_kept_fraction=circuit.positions_kept_fraction,
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

    @cached_property
    def val(self) -> ImageSet:
        """The val images that steps are measured on."""
        val = self.images.val
        count = len(val) if self.budget.max_drop else min(self.budget.val_images, len(val))
        return val.take(choose_evenly(val.labels, count, seed=self.settings.seed))

    def evaluated(self, module: nn.Module, reference: Evaluation | None = None) -> Evaluation:
        """A module on these images."""
        task, taken = self.images.task, self.model.preprocessing
        return evaluate(module, self.val, task, taken, reference=reference)
