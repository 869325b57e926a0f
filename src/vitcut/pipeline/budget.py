"""Cutting to a budget: rounds of selection, each saved and measured, and the last one compiled.

Choosing is left to ``selection/``, cutting and timing to ``stages``.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vitcut.benchmark.evaluation import evaluate
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchConfig
from vitcut.circuit import Circuit
from vitcut.compact.macs import count_macs, dense_macs
from vitcut.compact.model import CompactViT
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.planning import plan_circuit, shape_of
from vitcut.compiler.settings import CutConfig
from vitcut.config import as_plain
from vitcut.data.images import ImageSet
from vitcut.errors import CircuitError
from vitcut.files import read_json, write_json
from vitcut.pipeline.fills import Fills
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.points import CIRCUIT_FILE, PointMaker, save_results
from vitcut.pipeline.stages import CLASS_ONLY, DENSE, class_only, measure
from vitcut.pipeline.subject import Origin, Subject
from vitcut.progress import say
from vitcut.results import Point, Results
from vitcut.selection.rounds import Calibration, Selection, geometric
from vitcut.selection.settings import SelectConfig

PATH_FILE, PATH_FOLDER = "path.json", "path"
_FORMAT_VERSION = 1
_MOST_ROUNDS = 16
"""Of a latency budget, which is met by steps."""
_SLOWEST_STEP, _FASTEST_STEP = 0.97, 0.7
"""What the MACs are multiplied by from one such step to the next, at most and at least."""


@dataclass(frozen=True, kw_only=True)
class PathStep:
    """The model after one round of a selection; measured on the tuning images."""

    name: str
    circuit: str
    """Path of the circuit, relative to the run directory."""
    macs: int
    macs_fraction: float
    """Of the dense model's."""
    accuracy_coarse: float
    kl: float
    """Mean KL(dense || cut) on the task distribution, in nats."""
    heads_kept: int
    neurons_kept_fraction: float
    latency_fraction: float | None
    """Of the dense model's, in the runtime and at the batch size of a latency budget."""


def budget_command(
    origin: Origin, select: SelectConfig, cut: CutConfig, bench: BenchConfig, out: Path
) -> Results:
    """Cut a model to a budget into ``out/model``, and measure it beside the dense model.

    Every round's circuit stays in ``out/path``; a killed run goes on after the last one.

    Raises:
        CircuitError: The budget cannot be met.
    """
    settings = {"select": as_plain(select), "cut": as_plain(cut), "bench": as_plain(bench)}
    folder = RunFolder(out, {**origin.settings(), **settings})
    if folder.results.exists():
        say(f"{out} is complete: nothing to do")
        return Results.load(folder.results)
    subject = origin.load_subject()
    origin.loaded(subject).claim(folder)
    point, model = cut_to_budget(subject, folder, select, cut, into=out)
    points = {CLASS_ONLY: class_only(subject), point.name: (point, model)}
    results = measure(subject, points, bench)
    save_results(results, out)
    return results


def cut_to_budget(
    subject: Subject,
    folder: RunFolder,
    select: SelectConfig,
    cut: CutConfig,
    *,
    into: Path | None = None,
) -> tuple[Point, CompactViT]:
    """Search a circuit within a budget, and compile it.

    Args:
        subject: The model and images.
        folder: The run directory, for the path's circuits and ``path.json``.
        select: How to choose.
        cut: How to compile.
        into: Where the model goes; its point's folder if None.

    Raises:
        CircuitError: The budget cannot be met.
    """
    maker = PointMaker(subject, folder, cut)
    steps = list(BudgetSearch(subject, folder, select, cut, maker.fills).run())
    write_path(steps, folder.path / PATH_FILE)
    circuit = Circuit.load(folder.path / steps[-1].circuit)
    name = f"{select.scores}-{cut.ablation}-{steps[-1].name}"
    point, model = maker.cut(name, circuit, into=into)
    return replace(point, budget=_budget(select)), model


class BudgetSearch:
    """One selection in a run directory."""

    def __init__(
        self,
        subject: Subject,
        folder: RunFolder,
        select: SelectConfig,
        cut: CutConfig,
        fills: Fills,
    ) -> None:
        """Nothing is computed before ``run``."""
        self._subject = subject
        self._folder = folder
        self._select = select
        self._cut = cut
        self._fills = fills
        self._start = time.perf_counter()
        self._rounds = self._rounds_here = 0
        self._shape = shape_of(subject.weights)
        self._dense_macs = dense_macs(self._shape)
        tuning = subject.images.tuning
        self._dense = self._evaluate(subject.model.model)
        self._timed = subject.normalise(tuning.read(range(min(select.batch, len(tuning)))))

    def run(self) -> Iterator[PathStep]:
        """One round after the other; each is saved when it is given.

        Raises:
            CircuitError: The budget cannot be met.
        """
        selection = self._selection()
        start = self._macs(selection.circuit) / self._dense_macs
        self._require_possible(selection, start)
        if self._select.target_macs is not None:
            for fraction in geometric(start, self._select.target_macs, self._select.rounds):
                yield self._round(selection, fraction, timed=False)
            return
        yield from self._until_fast(selection, start)

    def _until_fast(self, selection: Selection, start: float) -> Iterator[PathStep]:
        """Steps towards a latency: MACs are scaled by what the time still lacks."""
        target = self._select.target_latency or 1.0
        fraction = max(start * _FASTEST_STEP, start * target)
        for _ in range(_MOST_ROUNDS):
            step = self._round(selection, fraction, timed=True)
            yield step
            reached = step.latency_fraction or 1.0
            if reached <= target:
                return
            ratio = min(_SLOWEST_STEP, max(_FASTEST_STEP, target / reached))
            fraction = step.macs_fraction * ratio
            if fraction * self._dense_macs < selection.smallest:
                break
        raise CircuitError(
            f"a latency of {target:g} of dense was not reached: the last of the circuits in "
            f"{self._folder.path / PATH_FOLDER} is the nearest"
        )

    def _selection(self) -> Selection:
        subject, select = self._subject, self._select
        weights = subject.weights
        return Selection(
            weights,
            Calibration(
                score_pixels=subject.normalise(self._score_images().all()),
                group_of_class=subject.group_of_class,
                fill=self._fills.with_statistics,
            ),
            self._macs,
            select,
            self._cut.ablation,
        )

    def _score_images(self) -> ImageSet:
        """Training images that no fill is fitted to, where there are enough."""
        many, seed = self._select.score_images, self._cut.seed
        fitted = self._subject.calibration(self._cut.images, seed=seed)
        images = self._subject.calibration(self._cut.images + many, seed=seed)
        unseen = np.flatnonzero(~np.isin(images.rows, fitted.rows))
        return (
            images.take(unseen)
            if len(unseen) == many
            else self._subject.calibration(many, seed=seed)
        )

    def _require_possible(self, selection: Selection, start: float) -> None:
        target, least = self._select.target_macs, selection.smallest / self._dense_macs
        if target is not None and not least <= target <= start:
            raise CircuitError(
                f"target-macs {target:g} cannot be met: the smallest model that still sees the "
                f"image has {least:.3f} of the dense MACs, the largest {start:.3f}"
            )

    def _round(self, selection: Selection, fraction: float, *, timed: bool) -> PathStep:
        name = f"macs-{fraction:.4f}"
        path = self._folder.path / PATH_FOLDER / name / CIRCUIT_FILE
        if path.exists():
            circuit = Circuit.load(path)
            selection.resume(circuit)
        else:
            selection.cut_to(fraction * self._dense_macs)
            self._rounds_here += 1
            circuit = replace(
                selection.circuit,
                method=self._select.scores,
                task=self._subject.task.name,
                provenance=self._provenance(),
            )
            circuit.save(path)
        self._rounds += 1
        step = self._measured(name, circuit, timed=timed)
        say(
            f"{name}: {step.macs_fraction:.1%} of the MACs, coarse accuracy "
            f"{step.accuracy_coarse:.1%}, KL {step.kl:.4f} on the tuning images"
        )
        return step

    def _measured(self, name: str, circuit: Circuit, *, timed: bool) -> PathStep:
        model = compile_circuit(self._subject.weights, circuit, self._fills.of(circuit))
        found = self._evaluate(model, self._dense.log_probs)
        macs = count_macs(model.plan)
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
        config = BenchConfig(
            runtimes=(self._select.runtime,), batches=(self._select.batch,), threads=1, seconds=1.0
        )
        models: dict[str, torch.nn.Module] = {DENSE: self._subject.model.model, "cut": model}
        report = measure_latency(models, self._timed, config, baselines=(DENSE,))
        return 1 / report.comparisons[0].ratio

    def _evaluate(self, model: torch.nn.Module, reference: Any = None) -> Any:
        return evaluate(
            model,
            self._subject.images.tuning,
            group_of_class=self._subject.task.group_of_class,
            preprocess=self._subject.normalise,
            reference_log_probs=reference,
        )

    def _macs(self, circuit: Circuit) -> float:
        return count_macs(plan_circuit(self._shape, circuit))

    def _provenance(self) -> dict[str, Any]:
        return {
            "model": self._subject.model.name,
            "weight_hash": self._subject.model.weight_hash,
            "images_fingerprint": self._subject.images.fingerprint,
            "selection": as_plain(self._select),
            # Not known of a search that was resumed.
            "seconds": round(time.perf_counter() - self._start, 2)
            if self._rounds_here > self._rounds
            else None,
        }


def write_path(steps: list[PathStep], path: Path) -> None:
    """Write what every round came to."""
    write_json(path, {"format_version": _FORMAT_VERSION, "steps": [asdict(step) for step in steps]})


def show_path(out: Path) -> None:
    """Print a run directory's ``path.json`` as a table."""
    content = read_json(out / PATH_FILE, kind="path", newest_version=_FORMAT_VERSION)
    table = Table(
        "point", "MACs", "coarse", "KL", "heads", "neurons", title="the path, on tuning images"
    )
    for step in content["steps"]:
        table.add_row(
            step["name"],
            f"{step['macs_fraction']:.1%}",
            f"{step['accuracy_coarse']:.1%}",
            f"{step['kl']:.4f}",
            str(step["heads_kept"]),
            f"{step['neurons_kept_fraction']:.1%}",
        )
    Console().print(table)


def _budget(select: SelectConfig) -> dict[str, Any]:
    if select.target_macs is not None:
        return {"macs": select.target_macs}
    return {
        "latency": select.target_latency,
        "runtime": select.runtime,
        "batch": select.batch,
    }
