"""Make docs/benchmarks/speed again: cuts by predicted latency, repaired, in every runtime.

    uv run python benchmarks/speed.py --source tiny-imagenet-200.zip

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
from vitcut.pipeline.budget import BudgetSearch
from vitcut.pipeline.commands import resolve_origin
from vitcut.pipeline.fills import Fills
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.path import PATH_FILE, PATH_FOLDER, save_path
from vitcut.pipeline.points import CIRCUIT_FILE, MODEL_FOLDER, PointMaker
from vitcut.pipeline.repair import repair, repair_compact
from vitcut.pipeline.stages import CLASS_ONLY, class_only, dense_point, evaluate_points, measure
from vitcut.pipeline.stored import StoredCut
from vitcut.pipeline.subject import Subject

from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compiler.calibrate import Measured, fit_costs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.images.settings import DataSettings
from vitcut.progress import say
from vitcut.results import Point, Results
from vitcut.selection.settings import Budget
from vitcut.training.settings import FinetuneSettings

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
        data = DataSettings(source=str(Path(arguments.source).resolve()))
        subject = resolve_origin("animals", "animals", data).load_subject()
        home(subject, out)
        if only in {None, "search"}:
            for batch in PATHS:
                search(subject, batch, out)
            search_acdc(subject, out)
        if only in {None, "repair"}:
            for _ in repairs(subject, out):
                pass
        if only in {None, "measure"}:
            measure_all(subject, out)
            measure_costs(out)
    if only in {None, "page"}:
        write_page(out)


def claimed(path: Path, settings: dict) -> RunFolder:
    """A run directory of these settings."""
    folder = RunFolder(path, settings)
    folder.claim()
    return folder


def home(subject: Subject, out: Path) -> RunFolder:
    """The run directory."""
    images = subject.images.fingerprint
    return claimed(out, {"weights": subject.model.weight_hash, "images": images})


def cut_config(batch: int) -> CutSettings:
    """How the cuts of a path are compiled."""
    return CutSettings(ablation="linear", batch=batch)


def search(subject: Subject, batch: int, out: Path) -> None:
    """The path of one batch size."""
    folder = claimed(path_folder(out, batch), {"batch": batch, "fractions": list(PATHS[batch])})
    if not (folder.path / PATH_FILE).exists():
        cut = cut_config(batch)
        found = BudgetSearch(subject, folder, SELECT, cut, Fills(subject, cut))
        save_path(list(found.walk(PATHS[batch])), folder.path / PATH_FILE)


def path_folder(out: Path, batch: int) -> Path:
    """Where the path of a batch size is."""
    return out / f"batch-{batch}"


def search_acdc(subject: Subject, out: Path) -> None:
    """ACDC's circuits over whole tokens, searched under mean ablation."""
    folder = claimed(out / "acdc", {"taus": list(TAUS)})
    for _ in PointMaker(subject, folder, CutSettings()).find(
        DiscoverSettings(ablation="mean"), TAUS
    ):
        pass


def cuts(subject: Subject, out: Path) -> Iterator[tuple[Point, CompactViT]]:
    """Every circuit, compiled or read again; ACDC's without and with merged streams."""
    folder = home(subject, out)
    for batch, fractions in PATHS.items():
        maker = PointMaker(subject, folder, cut_config(batch))
        for fraction in fractions:
            step = f"predicted-{fraction:.4f}"
            path = path_folder(out, batch) / PATH_FOLDER / step / CIRCUIT_FILE
            name = f"batch-{batch}-{step}"
            yield maker.cut(name, Circuit.load(path), into=out / "points" / name)
    for merge in (False, True):
        maker = PointMaker(subject, folder, CutSettings(merge=merge))
        for path in sorted((out / "acdc" / "points").glob(f"*/{CIRCUIT_FILE}")):
            name = path.parent.name + ("-merged" if merge else "")
            yield maker.cut(name, Circuit.load(path), into=out / "points" / name)


def repairs(subject: Subject, out: Path) -> Iterator[tuple[Point, nn.Module]]:
    """The repaired cuts and the dense model after the same repair; each goes on where it was."""
    for seed in SEEDS:
        for batch, step in REPAIRED:
            yield repaired_cut(subject, out, batch, step, seed)
        yield repaired_dense(subject, out, seed)


def repaired_cut(
    subject: Subject, out: Path, batch: int, step: str, seed: int
) -> tuple[Point, nn.Module]:
    """A cut after repair."""
    name = f"batch-{batch}-{step}"
    circuit = Circuit.load(path_folder(out, batch) / PATH_FOLDER / step / CIRCUIT_FILE)
    maker = PointMaker(subject, home(subject, out), cut_config(batch))
    maker.cut(name, circuit, into=out / "points" / name)
    stored = StoredCut.load(out / "points" / name / MODEL_FOLDER)
    folder = out / "repairs" / f"{name}-{seed}"
    point, model, _ = repair_compact(subject, stored, FinetuneSettings(seed=seed), folder, base=out)
    return replace(point, name=f"{name}-repaired-{seed}"), model


def repaired_dense(subject: Subject, out: Path, seed: int) -> tuple[Point, nn.Module]:
    """The dense model after the repair that the cuts get."""
    say(f"repairing the dense model, seed {seed}")
    model = deepcopy(subject.model.model)
    repair(subject, model, FinetuneSettings(seed=seed), out / "repairs" / f"dense-{seed}")
    return replace(dense_point(subject), name=f"dense-repaired-{seed}"), model


def measure_all(subject: Subject, out: Path) -> None:
    """Accuracy of everything, and its latency in every runtime on one thread and on two."""
    points: dict[str, tuple[Point, nn.Module]] = {CLASS_ONLY: class_only(subject)}
    made = [*cuts(subject, out), *repairs(subject, out)]
    points |= {point.name: (point, model) for point, model in made}
    evaluations = evaluate_points(subject, points)
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
        results = measure(subject, timed, bench, evaluations=evaluations)
        results.save(out / f"onnxruntime-{threads}.json")
        others = BenchSettings(
            runtimes=("openvino", "torch", "torch-compile"), threads=threads, seconds=1.0
        )
        results = measure(subject, few, others, evaluations=evaluations)
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
