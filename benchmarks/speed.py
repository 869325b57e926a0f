"""Make docs/benchmarks/speed again: cuts by predicted latency, repaired, in every runtime.

    uv run --with matplotlib python benchmarks/speed.py --source tiny-imagenet-200.zip

Searches one path for batch 64 and one for batch 1, repairs some of their points and the dense model
with three seeds each, and times all of them on one thread and on two. Searches and repairs that
are finished are not done again; `--only search`, `repair`, `measure` or `page` does one part.
"""

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from speed_page import write_page
from torch import nn

import vitcut
from vitcut import (
    BenchSettings,
    Budget,
    CompactViT,
    CutSettings,
    DiscoverSettings,
    FinetuneSettings,
)
from vitcut.benchmark.points import Points, dense_point, evaluate_points, measure
from vitcut.circuit import Circuit
from vitcut.compiler.calibrate import Measured, fit_costs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.cut import Cut
from vitcut.images.load import Images, normalise
from vitcut.masked.fitting import Fitter
from vitcut.model.model import Model
from vitcut.progress import say
from vitcut.results import CLASS_ONLY, Point, Results
from vitcut.runs import CIRCUIT_FILE, Run
from vitcut.selection.search import search
from vitcut.training.distillation import repair

PATHS = {
    64: (0.5, 0.36, 0.27, 0.215, 0.175, 0.15, 0.13, 0.11, 0.095, 0.08, 0.07, 0.06),
    1: (0.8, 0.65, 0.53, 0.45, 0.39, 0.365, 0.34, 0.3, 0.27, 0.24, 0.21, 0.18),
}
"""Per batch size the predicted latencies of its path, as fractions of the uncut compact model's."""
SELECT = Budget(target_latency=0.5, score_images=290)
REPAIRED = (
    (64, "predicted-0.1500"),
    (64, "predicted-0.1300"),
    (1, "predicted-0.3900"),
    (1, "predicted-0.3650"),
    (1, "predicted-0.3400"),
    (1, "predicted-0.3000"),
)
SEEDS = (0, 1, 2)
TAUS = (0.01, 0.003, 0.001)


def main() -> None:
    """Search, repair, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="The Tiny ImageNet archive or folder.")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="Run directory.")
    parser.add_argument("--only", choices=["search", "repair", "measure", "page"], default=None)
    arguments = parser.parse_args()
    out, only = arguments.out, arguments.only
    torch.set_num_threads(1)
    if only != "page":
        model = vitcut.load_model("animals")
        images = vitcut.load_images(arguments.source, task="animals", model=model)
        model = model.for_task(images.task, images.labels)
        Run(out).claim({"weights": model.weight_hash, "images": images.fingerprint})
        if only in {None, "search"}:
            for batch in PATHS:
                search_path(model, images, batch, out)
            search_acdc(model, images, out)
        if only in {None, "repair"}:
            for _ in repairs(model, images, out):
                pass
        if only in {None, "measure"}:
            measure_all(model, images, out)
            measure_costs(out)
    if only in {None, "page"}:
        write_page(out)


def cut_settings(batch: int) -> CutSettings:
    """How the cuts of a path are compiled."""
    return CutSettings(ablation="linear", batch=batch)


def search_path(model: Model, images: Images, batch: int, out: Path) -> None:
    """The path of one batch size."""
    run, settings = Run(out / f"batch-{batch}"), cut_settings(batch)
    run.claim({"batch": batch, "fractions": list(PATHS[batch])})
    chosen = images.calibration(min(settings.images, len(images.train)), seed=settings.seed)
    fitter = Fitter(
        model.weights,
        lambda: normalise(chosen.all(), model.preprocessing),
        ridge=settings.ridge,
        memory_gib=settings.memory_gib,
    )
    costs = CostModel(batch=batch)
    search(model, images, SELECT, settings, fitter, costs, run, fractions=PATHS[batch])


def search_acdc(model: Model, images: Images, out: Path) -> None:
    """ACDC's circuits over whole tokens, searched under mean ablation."""
    for tau in TAUS:
        settings = DiscoverSettings(ablation="mean", tau=tau)
        vitcut.discover(model, images, settings=settings, out=out / "acdc")


def made(
    model: Model, images: Images, path: Path, settings: CutSettings, name: str, out: Path
) -> Cut:
    """A circuit, compiled or read again."""
    circuit, into = Circuit.load(path), out / "points" / name
    cut = vitcut.cut(model, images, circuit, settings=settings, bench=None, out=into)
    return replace(cut, name=name)


def path_cut(model: Model, images: Images, batch: int, step: str, out: Path) -> Cut:
    """A point of a path."""
    path = out / f"batch-{batch}" / "path" / step / CIRCUIT_FILE
    return made(model, images, path, cut_settings(batch), f"batch-{batch}-{step}", out)


def cuts(model: Model, images: Images, out: Path) -> Iterator[Cut]:
    """Every circuit, compiled or read again; ACDC's without and with merged streams."""
    for batch, fractions in PATHS.items():
        for fraction in fractions:
            yield path_cut(model, images, batch, f"predicted-{fraction:.4f}", out)
    for merge in (False, True):
        for path in sorted((out / "acdc" / "points").glob(f"*/{CIRCUIT_FILE}")):
            name = path.parent.name + ("-merged" if merge else "")
            yield made(model, images, path, CutSettings(merge=merge), name, out)


def repairs(model: Model, images: Images, out: Path) -> Iterator[tuple[Point, nn.Module]]:
    """The repaired cuts and the dense model after the same repair; each goes on where it was."""
    for seed in SEEDS:
        settings = FinetuneSettings(seed=seed)
        for batch, step in REPAIRED:
            cut = path_cut(model, images, batch, step, out)
            into = out / "repairs" / f"{cut.name}-{seed}"
            repaired = vitcut.finetune(
                cut, model, images, settings=settings, repair_dense=False, bench=None, out=into
            ).cut
            yield replace(repaired, name=f"{repaired.name}-{seed}").point(out), repaired.model
        say(f"repairing the dense model, seed {seed}")
        dense, folder = deepcopy(model.module), out / "repairs" / f"dense-{seed}"
        repair(dense, model.module, images, settings, folder, preprocessing=model.preprocessing)
        yield replace(dense_point(model), name=f"dense-repaired-{seed}"), dense


def measure_all(model: Model, images: Images, out: Path) -> None:
    """Accuracy of everything, and its latency in every runtime on one thread and on two."""
    uncut = Circuit.full(model.weights.graph, ablation="zero")
    baseline = replace(vitcut.cut(model, images, uncut, bench=None), name=CLASS_ONLY)
    made: list[tuple[Point, nn.Module]] = [(baseline.point(), baseline.model)]
    made.extend((cut.point(out), cut.model) for cut in cuts(model, images, out))
    made.extend(repairs(model, images, out))
    points: Points = {point.name: (point, module) for point, module in made}
    evaluations = evaluate_points(model, images, points)
    correct = {
        name: "".join(str(int(right)) for right in found.correct_coarse)
        for name, found in evaluations.items()
    }
    (out / "correct.json").write_text(json.dumps(correct))
    # A repair changes no time: of three seeds one is timed.
    timed = {name: item for name, item in points.items() if not name.endswith(("-1", "-2"))}
    few = {name: item for name, item in timed.items() if is_shown_everywhere(name)}
    for threads in (1, 2):
        bench = BenchSettings(runtimes=("onnxruntime",), threads=threads, seconds=1.0)
        results = measure(model, images, timed, bench, evaluations=evaluations)
        results.save(out / f"onnxruntime-{threads}.json")
        others = BenchSettings(
            runtimes=("openvino", "torch", "torch-compile"), threads=threads, seconds=1.0
        )
        results = measure(model, images, few, others, evaluations=evaluations)
        results.save(out / f"others-{threads}.json")


def measure_costs(out: Path) -> None:
    """How well the latencies of the cuts are predicted: by shipped costs, and fitted to half of them."""
    results = Results.load(out / "onnxruntime-1.json")
    cuts = [point for point in results.points if point.model and "repaired" not in point.name]
    measured = [
        Measured(plan=plan, batch=item.batch, latency_ms=item.median_ms)
        for point in cuts
        for plan in [CompactViT.from_pretrained(out / str(point.model)).plan]
        for item in point.latency
    ]
    of_cut = [number // 2 % 2 for number in range(len(measured))]
    halves = [
        [m for m, own in zip(measured, of_cut, strict=True) if own == half] for half in (0, 1)
    ]
    models = {
        "shipped": {half: CostModel() for half in (0, 1)},
        "calibrated": {half: fit_costs(halves[1 - half], CostModel()) for half in (0, 1)},
    }
    rows = [
        {"batch": item.batch, "measured_ms": item.latency_ms}
        | {
            f"{name}_ms": replace(costs[half], batch=item.batch).latency_ms(item.plan)
            for name, costs in models.items()
        }
        for item, half in zip(measured, of_cut, strict=True)
    ]
    errors = {
        str(batch): {
            name: float(
                np.median(
                    [
                        abs(row[f"{name}_ms"] / row["measured_ms"] - 1)
                        for row in rows
                        if row["batch"] == batch
                    ]
                )
            )
            for name in models
        }
        for batch in (1, 64)
    }
    content = {"models": len(cuts), "median_error": errors, "rows": rows}
    (out / "costs.json").write_text(json.dumps(content, indent=1) + "\n")


def is_shown_everywhere(name: str) -> bool:
    """Whether a point is timed in all runtimes: torch.compile takes long."""
    return name == CLASS_ONLY or (name.startswith("batch") and "repaired" in name)


if __name__ == "__main__":
    main()
