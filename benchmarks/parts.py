"""Make docs/benchmarks/parts again: circuits of token kinds, heads and neurons, cut and repaired.

    OMP_NUM_THREADS=1 uv run --with matplotlib python benchmarks/parts.py \
        --source tiny-imagenet-200.zip

Searches every variant's path of budgets, repairs some points, then measures all of them together,
and writes results.json and the page. What is finished is not done again; `--only search`,
`repair` or `measure` does one part.
"""

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parts_page import write_page
from torch import nn

import vitcut
from vitcut import BenchSettings, Budget, CutSettings, DiscoverSettings, FinetuneSettings
from vitcut.benchmark.points import Points, dense_point, evaluate_points, measure
from vitcut.circuit import Circuit
from vitcut.compiler.cut import Cut
from vitcut.compiler.settings import CutAblation
from vitcut.images.load import Images
from vitcut.model.model import Model
from vitcut.progress import say
from vitcut.results import CLASS_ONLY, Point
from vitcut.runs import CIRCUIT_FILE, PATH_FILE, Run
from vitcut.selection.steps import SearchPath
from vitcut.training.distillation import repair

TARGET, ROUNDS, SCORE_IMAGES = 0.05, 10, 290
ONE_ROUND: dict[str, Any] = {"joint": False, "rescore": False}
CONTROL = {**ONE_ROUND, "refresh_fraction": 0.0}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to choose and to fill."""

    name: str
    ablation: CutAblation
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant(name="random", ablation="linear", settings={**CONTROL, "scores": "random"}),
    Variant(name="magnitude", ablation="linear", settings={**CONTROL, "scores": "magnitude"}),
    Variant(name="one-round-mean", ablation="mean", settings=ONE_ROUND),
    Variant(name="one-round-linear", ablation="linear", settings=CONTROL),
    Variant(name="joint-mean", ablation="mean"),
    Variant(name="joint-linear", ablation="linear", settings={"refresh_fraction": 0.0}),
    Variant(name="joint-linear-obs", ablation="linear"),
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
        model = vitcut.load_model("animals")
        images = vitcut.load_images(arguments.source, task="animals", model=model)
        model = model.for_task(images.task, images.labels)
        Run(out).claim(
            {"benchmark": "parts", "weights": model.weight_hash, "images": images.fingerprint}
        )
        if only in {None, "search"}:
            for variant in VARIANTS:
                if arguments.variant in {None, variant.name}:
                    search(model, images, variant, out)
            if arguments.variant in {None, "acdc"}:
                search_acdc(model, images, out)
        if only in {None, "repair"}:
            for _ in repairs(model, images, out):
                pass
        if only in {None, "measure"}:
            measure_all(model, images, out)
    if only in {None, "page"}:
        write_page(out)


def search(model: Model, images: Images, variant: Variant, out: Path) -> None:
    """One variant's path of budgets; its last point is compiled, too."""
    budget = Budget(
        target_macs=TARGET, rounds=ROUNDS, score_images=SCORE_IMAGES, **variant.settings
    )
    settings = CutSettings(ablation=variant.ablation)
    say(f"searching {variant.name}")
    vitcut.cut(model, images, budget=budget, settings=settings, bench=None, out=out / variant.name)


def search_acdc(model: Model, images: Images, out: Path) -> None:
    """ACDC's circuits over whole tokens, searched under mean ablation."""
    for tau in TAUS:
        settings = DiscoverSettings(ablation="mean", tau=tau)
        vitcut.discover(model, images, settings=settings, out=out / "acdc")


def made(model: Model, images: Images, path: Path, name: str, out: Path) -> Cut:
    """A circuit, compiled under its own ablation or read again."""
    circuit, into = Circuit.load(path), out / "points" / name
    return replace(vitcut.cut(model, images, circuit, bench=None, out=into), name=name)


def cuts(model: Model, images: Images, out: Path) -> Iterator[Cut]:
    """The circuits of two variants and half of the others', compiled or read again."""
    for variant in VARIANTS:
        steps = SearchPath.load(out / variant.name / PATH_FILE).steps
        for step in steps if variant.name in WHOLE else steps[1::2]:
            path = out / variant.name / step.circuit
            yield made(model, images, path, f"{variant.name}-{step.name}", out)
    for path in sorted((out / "acdc" / "points").glob(f"*/{CIRCUIT_FILE}")):
        yield made(model, images, path, path.parent.name, out)


def repair_settings(seed: int) -> FinetuneSettings:
    """What the page's repairs were trained with: once the defaults."""
    return FinetuneSettings(seed=seed, batch_size=256, learning_rate=2e-3)


def repairs(model: Model, images: Images, out: Path) -> Iterator[tuple[Point, nn.Module]]:
    """The repaired cuts and the dense model after the same repair; each goes on where it was."""
    for step, seeds in REPAIRED.items():
        path = out / BEST / "path" / step / CIRCUIT_FILE
        cut = made(model, images, path, f"{BEST}-{step}", out)
        for seed in seeds:
            repaired = vitcut.finetune(
                cut,
                model,
                images,
                settings=repair_settings(seed),
                repair_dense=False,
                bench=None,
                out=out / "repairs" / f"{cut.name}-{seed}",
            ).cut
            yield replace(repaired, name=f"{repaired.name}-{seed}").point(out), repaired.model
    for seed in DENSE_SEEDS:
        say(f"repairing the dense model, seed {seed}")
        dense, folder = deepcopy(model.module), out / "repairs" / f"dense-{seed}"
        settings, taken = repair_settings(seed), model.preprocessing
        repair(dense, model.module, images, settings, folder, preprocessing=taken)
        yield replace(dense_point(model), name=f"dense-repaired-{seed}"), dense


def measure_all(model: Model, images: Images, out: Path) -> None:
    """Accuracy and latency of everything, in one go."""
    uncut = Circuit.full(model.weights.graph, ablation="zero")
    baseline = replace(vitcut.cut(model, images, uncut, bench=None), name=CLASS_ONLY)
    made: list[tuple[Point, nn.Module]] = [(baseline.point(), baseline.model)]
    made.extend((cut.point(out), cut.model) for cut in cuts(model, images, out))
    made.extend(repairs(model, images, out))
    points: Points = {point.name: (point, module) for point, module in made}
    evaluations = evaluate_points(model, images, points)
    bench = BenchSettings(runtimes=("onnxruntime",), seconds=0.7)
    results = measure(model, images, points, bench, evaluations=evaluations)
    results.save(out / "results.json")
    correct = {name: found.correct_coarse.tolist() for name, found in evaluations.items()}
    (out / "correct.json").write_text(json.dumps(correct))


if __name__ == "__main__":
    main()
