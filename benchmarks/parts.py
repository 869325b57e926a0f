"""Make docs/benchmarks/parts again: circuits of token kinds, heads and neurons, cut and repaired.

    OMP_NUM_THREADS=1 uv run python benchmarks/parts.py --source tiny-imagenet-200.zip

Searches every variant's path of budgets, repairs some points, then measures all of them together,
and writes results.json and the page. What is finished is not done again; `--only search`,
`repair` or `measure` does one part.
"""

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from parts_page import write_page
from torch import nn
from vitcut.pipeline.budget import cut_to_budget
from vitcut.pipeline.commands import resolve_origin
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.path import PATH_FILE, load_path
from vitcut.pipeline.points import MODEL_FOLDER, PointMaker
from vitcut.pipeline.repair import repair, repair_compact
from vitcut.pipeline.stages import (
    CLASS_ONLY,
    class_only,
    dense_point,
    evaluate_points,
    measure,
)
from vitcut.pipeline.stored import StoredCut
from vitcut.pipeline.subject import Subject

from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.images.settings import DataSettings
from vitcut.progress import say
from vitcut.results import Point
from vitcut.selection.settings import Budget
from vitcut.training.settings import FinetuneSettings

TARGET, ROUNDS, SCORE_IMAGES = 0.05, 10, 290
ONE_ROUND = {"joint": False, "rescore": False}
CONTROL = {**ONE_ROUND, "refresh_fraction": 0.0}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to choose and to fill."""

    name: str
    ablation: str
    settings: dict


VARIANTS = (
    Variant(name="random", ablation="linear", settings={**CONTROL, "scores": "random"}),
    Variant(name="magnitude", ablation="linear", settings={**CONTROL, "scores": "magnitude"}),
    Variant(name="one-round-mean", ablation="mean", settings=ONE_ROUND),
    Variant(name="one-round-linear", ablation="linear", settings=CONTROL),
    Variant(name="joint-mean", ablation="mean", settings={}),
    Variant(name="joint-linear", ablation="linear", settings={"refresh_fraction": 0.0}),
    Variant(name="joint-linear-obs", ablation="linear", settings={}),
)
BEST = "joint-linear-obs"
WHOLE = (BEST, "joint-linear")
TAUS = (0.01, 0.003, 0.001)
REPAIRED = {"macs-0.0880": (0,), "macs-0.0500": (0,), "macs-0.0663": (0,), "macs-0.1167": (0,)}
"""Points of the best variant, and the seeds of their repairs."""
DENSE_SEEDS = (0,)


def main() -> None:
    """Search, repair, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="The Tiny ImageNet archive or folder.")
    parser.add_argument("--out", type=Path, default=Path("runs/parts"), help="Run directory.")
    parser.add_argument("--only", choices=["search", "repair", "measure", "page"], default=None)
    parser.add_argument("--variant", default=None, help="Search this variant only.")
    arguments = parser.parse_args()
    out, only = arguments.out, arguments.only
    if only != "page":
        data = DataSettings(source=str(Path(arguments.source).resolve()))
        subject = resolve_origin("animals", "animals", data).load_subject()
        claimed(out, settings_of(subject))
        if only in {None, "search"}:
            for variant in VARIANTS:
                if arguments.variant in {None, variant.name}:
                    search(subject, variant, out)
            if arguments.variant in {None, "acdc"}:
                search_acdc(subject, out)
        if only in {None, "repair"}:
            repair_all(subject, out)
        if only in {None, "measure"}:
            measure_all(subject, out)
    if only in {None, "page"}:
        write_page(out)


def settings_of(subject: Subject) -> dict:
    """What every figure depends on."""
    return {
        "benchmark": "parts",
        "weights": subject.model.weight_hash,
        "images": subject.images.fingerprint,
    }


def search(subject: Subject, variant: Variant, out: Path) -> None:
    """One variant's path of budgets; its last point is compiled, too."""
    select = Budget(
        target_macs=TARGET, rounds=ROUNDS, score_images=SCORE_IMAGES, **variant.settings
    )
    folder = claimed(out / variant.name, {"variant": variant.name, "select": str(select)})
    if not (folder.path / PATH_FILE).exists():
        say(f"searching {variant.name}")
        cut_to_budget(subject, folder, select, CutSettings(ablation=variant.ablation))


def search_acdc(subject: Subject, out: Path) -> None:
    """ACDC's circuits over whole tokens, searched under mean ablation."""
    folder = claimed(out / "acdc", {"taus": list(TAUS)})
    config = DiscoverSettings(ablation="mean")
    for _, _ in PointMaker(subject, folder, CutSettings()).find(config, TAUS):
        pass


def claimed(path: Path, settings: dict) -> RunFolder:
    """A run directory of these settings."""
    folder = RunFolder(path, settings)
    folder.claim()
    return folder


def cuts(subject: Subject, out: Path) -> Iterator[tuple[Point, CompactViT]]:
    """The circuits of two variants and half of the others', compiled or read again."""
    for variant in VARIANTS:
        cut = CutSettings(ablation=variant.ablation)
        maker = PointMaker(subject, claimed(out, settings_of(subject)), cut)
        steps = load_path(out / variant.name / PATH_FILE)
        for step in steps if variant.name in WHOLE else steps[1::2]:
            circuit = Circuit.load(out / variant.name / step.circuit)
            name = f"{variant.name}-{step.name}"
            yield maker.cut(name, circuit, into=out / "points" / name)
    maker = PointMaker(subject, claimed(out, settings_of(subject)), CutSettings())
    for path in sorted((out / "acdc" / "points").glob("*/circuit.json")):
        name = path.parent.name
        yield maker.cut(name, Circuit.load(path), into=out / "points" / name)


def repair_all(subject: Subject, out: Path) -> None:
    """Every repair; each goes on where it was."""
    for _ in repairs(subject, out):
        pass
    for seed in DENSE_SEEDS:
        repaired_dense(subject, out, seed)


def repair_config(seed: int) -> FinetuneSettings:
    """What the page's repairs were trained with: once the defaults."""
    return FinetuneSettings(seed=seed, batch_size=256, learning_rate=2e-3)


def repaired_dense(subject: Subject, out: Path, seed: int) -> tuple[Point, nn.Module]:
    """The dense model after the repair that the cuts get."""
    say(f"repairing the dense model, seed {seed}")
    model = deepcopy(subject.model.model)
    repair(subject, model, repair_config(seed), out / "repairs" / f"dense-{seed}")
    return replace(dense_point(subject), name=f"dense-repaired-{seed}"), model


def repairs(subject: Subject, out: Path) -> Iterator[tuple[Point, CompactViT]]:
    """The repaired cuts."""
    maker = PointMaker(subject, claimed(out, settings_of(subject)), CutSettings(ablation="linear"))
    for step, seeds in REPAIRED.items():
        name = f"{BEST}-{step}"
        into = out / "points" / name
        maker.cut(name, Circuit.load(out / BEST / "path" / step / "circuit.json"), into=into)
        stored = StoredCut.load(into / MODEL_FOLDER)
        for seed in seeds:
            say(f"repairing {name}, seed {seed}")
            folder = out / "repairs" / f"{name}-{seed}"
            point, model, _ = repair_compact(subject, stored, repair_config(seed), folder, base=out)
            yield replace(point, name=f"{name}-repaired-{seed}"), model


def measure_all(subject: Subject, out: Path) -> None:
    """Accuracy and latency of everything, in one go."""
    points: dict[str, tuple[Point, nn.Module]] = {CLASS_ONLY: class_only(subject)}
    made = [*cuts(subject, out), *repairs(subject, out)]
    made += [repaired_dense(subject, out, seed) for seed in DENSE_SEEDS]
    points |= {point.name: (point, model) for point, model in made}
    evaluations = evaluate_points(subject, points)
    bench = BenchSettings(runtimes=("onnxruntime",), seconds=0.7)
    results = measure(subject, points, bench, evaluations=evaluations)
    results.save(out / "results.json")
    correct = {name: found.correct_coarse.tolist() for name, found in evaluations.items()}
    (out / "correct.json").write_text(json.dumps(correct))


if __name__ == "__main__":
    main()
