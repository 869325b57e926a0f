"""Cutting to a budget: rounds of selection, each saved and measured, and the last one compiled.

Choosing is left to ``selection/``, cutting and timing to ``stages``.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitcut.benchmark.evaluation import Evaluation, evaluate
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs, dense_macs
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.planning import plan_circuit
from vitcut.compiler.settings import CutSettings
from vitcut.errors import CircuitError
from vitcut.images.images import ImageSet
from vitcut.model.tracing import read_model
from vitcut.model.weights import ViTWeights
from vitcut.pipeline.costs import cost_model
from vitcut.pipeline.fills import Fills
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.path import (
    PATH_FILE,
    PATH_FOLDER,
    STEP_FILE,
    PathStep,
    load_path,
    save_path,
)
from vitcut.pipeline.points import CIRCUIT_FILE, PointMaker, save_results
from vitcut.pipeline.stages import CLASS_ONLY, DENSE, class_only, measure
from vitcut.pipeline.subject import Origin, Subject
from vitcut.progress import say
from vitcut.results import Point, Results
from vitcut.selection.rounds import (
    Calibration,
    Selection,
    geometric,
    smallest_cost,
    useful_parts,
)
from vitcut.selection.settings import Budget
from vitcut.settings import as_plain
from vitcut.shapes import Float, Tensor

_MOST_ROUNDS = 16
"""Of a latency budget, which is met by steps."""
_SLOWEST_STEP, _FASTEST_STEP = 0.97, 0.7
"""What the prediction is multiplied by from one such step to the next, at most and at least."""


def budget_command(
    origin: Origin, select: Budget, cut: CutSettings, bench: BenchSettings, out: Path
) -> Results:
    """Cut a model to a budget into ``out/model``, and measure it beside the dense model.

    Every round's circuit stays in ``out/path``; a killed run goes on after the last one.

    Raises:
        CircuitError: The budget cannot be met.
    """
    cut = replace(cut, ablation=cut.ablation_for(None))
    settings = {"select": as_plain(select), "cut": as_plain(cut), "bench": as_plain(bench)}
    costs = {"costs": cost_model(cut.batch).fingerprint}
    folder = RunFolder(out, {**origin.settings(), **settings, **costs})
    if folder.results.exists():
        say(f"{out} is complete: nothing to do")
        return Results.load(folder.results)
    model = origin.load_model()
    # What cannot be met is refused before images are decoded and the folder is claimed.
    weights = read_model(model.model)
    require_possible(weights, select, cut)
    subject = origin.load_subject(model, weights)
    origin.loaded(subject).claim(folder)
    point, compact = cut_to_budget(subject, folder, select, cut, threads=bench.threads, into=out)
    baseline = class_only(subject, batch=cut.batch)
    points = {CLASS_ONLY: baseline, point.name: (point, compact)}
    results = measure(subject, points, bench)
    save_results(results, out)
    return results


def require_possible(weights: ViTWeights, select: Budget, cut: CutSettings) -> None:
    """Check that MACs can be brought to a budget; a latency shows only when it is measured.

    Raises:
        CircuitError: They cannot.
    """
    target = select.target_macs
    if target is None:
        return
    shape, graph = weights.shape, weights.graph_of(select.tokens)
    dense, costs = dense_macs(shape), cost_model(cut.batch)

    def macs(circuit: Circuit) -> float:
        return count_macs(plan_circuit(shape, circuit, costs))

    least = smallest_cost(graph, weights.num_neurons, macs) / dense
    most = macs(useful_parts(graph, weights.num_neurons).circuit(graph, "mean")) / dense
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


def cut_to_budget(
    subject: Subject,
    folder: RunFolder,
    select: Budget,
    cut: CutSettings,
    *,
    threads: int = 1,
    into: Path | None = None,
) -> tuple[Point, CompactViT]:
    """Search a circuit within a budget, and compile it.

    Args:
        subject: The model and images.
        folder: The run directory, for the path's circuits and ``path.json``.
        select: How to choose.
        cut: How to compile.
        threads: CPU threads that a latency is measured with.
        into: Where the model goes; its point's folder if None.

    Raises:
        CircuitError: The budget cannot be met.
    """
    maker = PointMaker(subject, folder, cut)
    search = BudgetSearch(subject, folder, select, cut, maker.fills, threads=threads)
    circuit, budget = search.find(), _budget(select, cut)
    kind, target = next(iter(budget.items()))
    name = f"{select.scores}-{circuit.ablation}-{kind}-{target:g}"
    if into is None:
        circuit.save(folder.point(name) / CIRCUIT_FILE)
    return maker.cut(name, circuit, into=into, budget=budget)


class BudgetSearch:
    """One selection in a run directory."""

    def __init__(
        self,
        subject: Subject,
        folder: RunFolder,
        select: Budget,
        cut: CutSettings,
        fills: Fills,
        *,
        threads: int = 1,
    ) -> None:
        """Nothing is computed before ``find``."""
        self._subject = subject
        self._folder = folder
        self._select = select
        self._cut = cut
        self._fills = fills
        self._threads = threads
        self._start = time.perf_counter()
        self._resumed = False
        self._shape = subject.weights.shape
        self._dense_macs = dense_macs(self._shape)
        self._costs = cost_model(cut.batch)
        self._smooth_costs = replace(self._costs, smooth=True)

    def find(self) -> Circuit:
        """The circuit that meets the budget: searched, or read where the search was done.

        Raises:
            CircuitError: No latency that was measured meets the budget.
        """
        path = self._folder.path / PATH_FILE
        if not path.exists():
            save_path(list(self._run()), path)
        return Circuit.load(self._folder.path / load_path(path)[-1].circuit)

    def _run(self) -> Iterator[PathStep]:
        """One round after the other; each is saved when it is given."""
        selection = self._selection()
        if self._select.target_macs is None:
            yield from self._until_fast(selection)
            return
        start = selection.cost() / self._dense_macs
        fractions = geometric(start, self._select.target_macs, self._select.rounds)
        # Budgets that round to one name are one round, to the smallest of them.
        named = {f"macs-{fraction:.4f}": fraction for fraction in fractions}
        for name, fraction in named.items():
            yield self._round(selection, name, fraction * self._dense_macs)

    def walk(self, fractions: Sequence[float]) -> Iterator[PathStep]:
        """Circuits at given predicted latencies, none of them measured; saved as they come.

        Args:
            fractions: Of the predicted latency of the uncut compact model; falling.
        """
        selection = self._selection()
        uncut = selection.cost()
        for fraction in fractions:
            yield self._round(selection, f"predicted-{fraction:.4f}", fraction * uncut, timed=False)

    def _until_fast(self, selection: Selection) -> Iterator[PathStep]:
        """Steps towards a latency: the predicted one is scaled by what the measured one lacks."""
        target = self._select.target_latency or 1.0
        uncut = selection.cost()
        fraction = max(_FASTEST_STEP, target)
        nearest, fastest = "the uncut model", 1.0
        for _ in range(_MOST_ROUNDS):
            if fraction * uncut < selection.smallest:
                break
            step = self._round(selection, f"predicted-{fraction:.4f}", fraction * uncut)
            yield step
            reached = step.latency_fraction or 1.0
            if reached <= target:
                return
            if reached < fastest:
                fastest, nearest = reached, f"{reached:.3f} of dense, {step.circuit}"
            ratio = min(_SLOWEST_STEP, max(_FASTEST_STEP, target / reached))
            fraction = selection.cost() / uncut * ratio
        raise CircuitError(
            f"target-latency {target:g} cannot be met: the nearest in {self._folder.path} is "
            f"{nearest}; ask for more, or for another runtime or batch"
        )

    def _selection(self) -> Selection:
        subject, select = self._subject, self._select
        return Selection(
            subject.weights,
            Calibration(
                score_pixels=subject.normalise(self._score_images().all()),
                group_of_class=subject.group_of_class,
                fill=self._fills.with_statistics,
                memory_gib=self._cut.memory_gib,
            ),
            self._cost,
            select,
            self._cut.ablation_for(None),
        )

    def _score_images(self) -> ImageSet:
        """Training images that no fill is fitted to, where there are enough."""
        many, seed = self._select.score_images, self._cut.seed
        fitted = self._subject.calibration(self._cut.images, seed=seed)
        images = self._subject.calibration(self._cut.images + many, seed=seed)
        unseen = np.flatnonzero(~np.isin(images.rows, fitted.rows))
        if len(unseen) == many:
            return images.take(unseen)
        say(
            f"too few training images to score on {many} others than the {len(fitted)} that fills "
            "are fitted to: scores are too good; give fewer --images"
        )
        return self._subject.calibration(many, seed=seed)

    def _round(
        self, selection: Selection, name: str, budget: float, *, timed: bool = True
    ) -> PathStep:
        folder = self._folder.path / PATH_FOLDER / name
        circuit_path, step_path = folder / CIRCUIT_FILE, folder / STEP_FILE
        if circuit_path.exists() and self._select.rescore:
            self._resumed = True
            circuit = Circuit.load(circuit_path)
            selection.resume(circuit)
        else:
            # Scores that are taken once know of every earlier cut: those rounds are made again.
            selection.cut_to(budget)
            circuit = self._described(selection.circuit)
            if not circuit_path.exists():
                circuit.save(circuit_path)
        if not step_path.exists():
            self._measured(name, circuit, timed=timed).save(step_path)
        step = PathStep.load(step_path)
        say(_line(step))
        return step

    def _described(self, circuit: Circuit) -> Circuit:
        took = round(time.perf_counter() - self._start, 2)
        return replace(
            circuit,
            method=self._select.scores,
            task=self._subject.task.name,
            provenance={
                "model": self._subject.model.name,
                "weight_hash": self._subject.model.weight_hash,
                "images_fingerprint": self._subject.images.fingerprint,
                "selection": as_plain(self._select),
                "cut": as_plain(self._cut),
                "costs": self._costs.fingerprint,
                # Not known of a search that was resumed.
                "seconds": None if self._resumed else took,
            },
        )

    def _measured(self, name: str, circuit: Circuit, *, timed: bool) -> PathStep:
        fill = self._fills.of(circuit)
        model = compile_circuit(self._subject.weights, circuit, fill, costs=self._costs)
        found = self._evaluate(model, self._dense)
        macs = count_macs(model.plan)
        timed = timed and self._select.target_latency is not None
        return PathStep(
            name=name,
            circuit=f"{PATH_FOLDER}/{name}/{CIRCUIT_FILE}",
            macs=macs,
            macs_fraction=macs / self._dense_macs,
            accuracy_coarse=found.accuracy_coarse,
            kl=found.kl or 0.0,
            heads_kept=circuit.num_heads_kept,
            neurons_kept_fraction=circuit.neurons_kept_fraction,
            latency_fraction=self._latency_fraction(model) if timed else None,
        )

    def _latency_fraction(self, model: CompactViT) -> float:
        config = BenchSettings(
            runtimes=(self._select.runtime,),
            batches=(self._cut.batch,),
            threads=self._threads,
            seconds=1.0,
        )
        models: dict[str, torch.nn.Module] = {DENSE: self._subject.model.model, "cut": model}
        report = measure_latency(models, self._timed, config, baselines=(DENSE,))
        return 1 / report.comparisons[0].ratio

    @cached_property
    def _timed(self) -> Float[Tensor, "images channels y x"]:
        val = self._subject.images.val
        return self._subject.normalise(val.read(range(min(self._cut.batch, len(val)))))

    @cached_property
    def _dense(self) -> Evaluation:
        return self._evaluate(self._subject.model.model)

    def _evaluate(self, model: torch.nn.Module, dense: Evaluation | None = None) -> Evaluation:
        return evaluate(
            model,
            self._subject.images.val,
            group_of_class=self._subject.task.group_of_class,
            preprocess=self._subject.normalise,
            reference_log_probs=None if dense is None else dense.log_probs,
        )

    def _cost(self, circuit: Circuit) -> float:
        """What the budget is of: MACs, or predicted milliseconds."""
        plan = plan_circuit(self._shape, circuit, self._costs)
        if self._select.target_latency is None:
            return count_macs(plan)
        return self._smooth_costs.latency_ms(plan)


def _line(step: PathStep) -> str:
    latency = ""
    if step.latency_fraction is not None:
        latency = f", {step.latency_fraction:.1%} of the latency"
    return (
        f"{step.name}: {step.macs_fraction:.1%} of the MACs{latency}, coarse accuracy "
        f"{step.accuracy_coarse:.1%}, KL {step.kl:z.4f} on the val images"
    )


def _budget(select: Budget, cut: CutSettings) -> dict[str, Any]:
    if select.target_macs is not None:
        return {"macs": select.target_macs}
    return {
        "latency": select.target_latency,
        "runtime": select.runtime,
        "batch": cut.batch,
    }
