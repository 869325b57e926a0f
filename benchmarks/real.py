r"""Make docs/benchmarks/real again: a pretrained ViT cut for two tasks, repaired, and timed.

    uv run --extra openvino python benchmarks/real.py --model timm:vit_tiny_patch16_224 \
        --animals tiny-imagenet-200.zip --cats-dogs cats-dogs-256.zip

Every step has its own run directory under ``--out`` and is not done again once it is finished; one
that was killed goes on. ``--steps`` does only some of: cut, acdc, repair, measure, page. The seconds
and the memory of whole commands come from ``benchmarks/stages.py``, whose files lie beside the page.
"""

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitcut
from vitcut import BenchSettings, Budget, CutSettings, DiscoverSettings, FinetuneSettings
from vitcut.benchmark.bootstrap import paired_interval
from vitcut.benchmark.points import Points, dense_point, measure
from vitcut.compiler.cut import Cut, class_only
from vitcut.errors import ArtefactError
from vitcut.images.load import Images
from vitcut.model.model import Model
from vitcut.names import RuntimeName
from vitcut.progress import say
from vitcut.reports.pictures import evaluate_and_keep
from vitcut.results import Point, Results
from vitcut.runs import RESULTS_FILE
from vitcut.training.checkpoint import read_training
from vitcut.training.distillation import repair

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "real"
TARGETS = (0.5, 0.3, 0.2)
"""MACs of the cuts, as fractions of dense."""
HEADLINE = "fisher-linear-macs-0.3"
"""The cut that is repaired with all seeds; the others with the first."""
RUNTIMES: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")
STEPS = ("cut", "acdc", "repair", "measure", "page")


@dataclass(frozen=True, kw_only=True)
class Bed:
    """A task, and how much of everything it gets."""

    task: str
    epochs: int
    """Of every repair."""
    seeds: tuple[int, ...]
    """Of the repairs of the headline cut and of the dense model."""
    taus: tuple[float, ...]
    acdc_images: int

    def repair(self, seed: int, width: int) -> FinetuneSettings:
        """The recipe of a repair."""
        return FinetuneSettings(epochs=self.epochs, seed=seed).for_width(width)


BEDS = (
    Bed(task="animals", epochs=1, seeds=(0,), taus=(0.01, 0.003), acdc_images=24),
    Bed(task="cats-dogs", epochs=6, seeds=(0, 1, 2), taus=(0.01, 0.003), acdc_images=24),
)


def main() -> None:
    """Do the steps of every task whose images are given, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--animals", help="The Tiny ImageNet archive or folder.")
    parser.add_argument("--cats-dogs", help="The archive of cats and dogs.")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="Run directories.")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    arguments = parser.parse_args()
    for bed in BEDS:
        source = getattr(arguments, bed.task.replace("-", "_"))
        if source is not None and set(arguments.steps) != {"page"}:
            run_bed(bed, arguments.model, source, arguments.out / bed.task, arguments.steps)
    if "page" in arguments.steps:
        write_page()


def run_bed(bed: Bed, name: str, source: str, out: Path, steps: list[str]) -> None:
    """Cut, repair and measure for one task."""
    model = vitcut.load_model(name)
    images = vitcut.load_images(source, task=bed.task, model=model)
    model = model.for_task(images.task, images.labels)
    if "cut" in steps:
        vitcut.cut(model, images, budget=Budget(target_macs=TARGETS), bench=None, out=out / "cut")
    if "acdc" in steps:
        for _ in acdc_cuts(bed, model, images, out):
            pass
    if "repair" in steps:
        for _ in repairs(bed, model, images, out):
            pass
    if "measure" in steps:
        measure_bed(bed, model, images, out)


def budget_cuts(out: Path) -> list[Cut]:
    """The cuts to a budget, the largest first."""
    cuts = [Cut.load(folder) for folder in (out / "cut" / "points").glob("*/model")]
    return sorted(cuts, key=lambda cut: -(cut.point().macs or 0))


def acdc_cuts(bed: Bed, model: Model, images: Images, out: Path) -> Iterator[Cut]:
    """The circuits of ACDC under mean ablation, compiled."""
    for tau in bed.taus:
        settings = DiscoverSettings(ablation="mean", tau=tau, images=bed.acdc_images)
        circuit = vitcut.discover(model, images, settings=settings, out=out / "acdc")
        into = out / f"acdc-{tau:g}"
        yield vitcut.cut(
            model, images, circuit, settings=CutSettings(merge=True), bench=None, out=into
        )


def repairs(
    bed: Bed, model: Model, images: Images, out: Path, *, finished_only: bool = False
) -> Iterator[tuple[Point, nn.Module]]:
    """Every cut repaired, and the dense model after the same repair; what is there is read."""
    sought = [*budget_cuts(out), *(acdc_cuts(bed, model, images, out) if made_acdc(out) else ())]
    for cut in sought:
        for seed in bed.seeds if cut.name == HEADLINE else bed.seeds[:1]:
            settings = bed.repair(seed, model.weights.width)
            into = out / "repairs" / f"{cut.name}-{seed}"
            if finished_only and not is_finished(into):
                continue
            repaired = vitcut.finetune(
                cut, model, images, settings=settings, repair_dense=False, bench=None, out=into
            ).cut
            point = replace(repaired.point(out), name=f"{repaired.name}-{seed}")
            yield with_seconds(point, into), repaired.model
    for seed in bed.seeds:
        settings = bed.repair(seed, model.weights.width)
        dense, into = deepcopy(model.module), out / "repairs" / f"dense-{seed}"
        if finished_only and not is_finished(into):
            continue
        say(f"repairing the dense model, seed {seed}")
        repair(dense, model.module, images, settings, into, preprocessing=model.preprocessing)
        yield with_seconds(replace(dense_point(model), name=f"dense-repaired-{seed}"), into), dense


def is_finished(run: Path) -> bool:
    """Whether a training has ended."""
    try:
        read_training(run)
    except ArtefactError:
        return False
    return True


def made_acdc(out: Path) -> bool:
    """Whether ACDC's circuits are there."""
    return any((out / "acdc" / "points").glob("*/circuit.json"))


def with_seconds(point: Point, run: Path) -> Point:
    """A repaired point with the seconds of its training."""
    return replace(point, seconds=round(read_training(run)[1].seconds, 1))


def measure_bed(bed: Bed, model: Model, images: Images, out: Path) -> None:
    """Accuracies of everything that was made, and latencies in turn on one thread."""
    made: list[tuple[Point, nn.Module]] = [class_only(model, images, CutSettings())]
    made += [(cut.point(out), cut.model) for cut in budget_cuts(out)]
    if made_acdc(out):
        made += [(cut.point(out), cut.model) for cut in acdc_cuts(bed, model, images, out)]
    made += repairs(bed, model, images, out, finished_only=True)
    points: Points = {point.name: (point, module) for point, module in made}
    found = evaluate_and_keep(model, images, points, out)
    # A repair changes no time: what has the shape of another point is not timed again.
    timed = {name: item for name, item in points.items() if "repaired" not in name}
    settings = BenchSettings(runtimes=RUNTIMES, batches=(1, 64), seconds=2.0)
    torch.set_num_threads(1)
    results = measure(model, images, timed, settings, evaluations=found)
    against: dict[str, Any] = {}
    for name, own in found.items():
        for other in ("dense", f"dense-repaired-{bed.seeds[0]}"):
            if other in found and name != other:
                interval = paired_interval(own.correct_coarse, found[other].correct_coarse, seed=0)
                change = own.accuracy_coarse - found[other].accuracy_coarse
                against.setdefault(name, {})[other] = [change, *interval]
    PAGE.mkdir(parents=True, exist_ok=True)
    results.save(PAGE / f"{bed.task}.json")
    results.save(out / RESULTS_FILE)
    repaired = [
        {
            "name": name,
            "accuracy_coarse": found[name].accuracy_coarse,
            "kl": found[name].kl,
            "macs": point.macs,
            "seconds": point.seconds,
        }
        for name, (point, _) in points.items()
        if "repaired" in name
    ]
    content = {"epochs": bed.epochs, "repaired": repaired, "against": against}
    (PAGE / f"{bed.task}-repairs.json").write_text(json.dumps(content, indent=1) + "\n")


def write_page() -> None:
    """The page, from the raw files that are there."""
    parts = [
        """# A pretrained ViT on real pictures

`vit_tiny_patch16_224` (ImageNet weights, 5.7 M parameters, 224 px) cut for two tasks. *animals*: 58
classes of Tiny ImageNet in 6 groups, its own logits for them, pictures of 64 px enlarged. *cats-dogs*:
photographs; 5 of ImageNet's classes are cats, 118 are dogs. No training before the cut; *repaired* is
fine-tuned by distillation from the dense model. Changes are of coarse accuracy on test images, in
points, with 95 % paired intervals; speed-ups are against the untouched dense model in the same
runtime, one thread. What we learned: [findings.md](findings.md).

    uv run --extra openvino python benchmarks/real.py --model timm:vit_tiny_patch16_224 \\
        --animals tiny-imagenet-200.zip --cats-dogs cats-dogs-256.zip

A page with the circuits, test images and what heads look at, from its run directory:

    vitcut report runs/real/cats-dogs --out report.html
"""
    ]
    for bed in BEDS:
        path = PAGE / f"{bed.task}.json"
        parts.append(f"## {bed.task}\n")
        parts.append(section(bed, path) if path.exists() else "Not yet measured.\n")
    parts.append("## Where the seconds go\n")
    files = sorted(PAGE.glob("stages-*.json"))
    parts.append(stages(files) if files else "Not yet measured.\n")
    (PAGE / "README.md").write_text("\n".join(parts), encoding="utf-8")


def section(bed: Bed, path: Path) -> str:
    """The table of one task."""
    results = Results.load(path)
    extra = json.loads((PAGE / f"{bed.task}-repairs.json").read_text())
    dense = results.dense
    if dense is None or dense.macs is None or dense.accuracy_coarse is None:
        raise SystemExit(f"{path} has no dense model")
    whole = dense.macs
    columns = [(runtime, batch) for runtime in RUNTIMES for batch in (1, 64)]
    lines = [
        "| point | MACs | accuracy | change | KL | "
        + " | ".join(f"{runtime}, batch {batch}" for runtime, batch in columns)
        + " | seconds |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(columns) + 1),
    ]

    def row(
        name: str, accuracy: float, kl: float | None, macs: int, speeds: list[str], s: Any
    ) -> None:
        change = extra["against"].get(name, {}).get("dense")
        told = (
            ""
            if change is None
            else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in change))
        )
        lines.append(
            f"| {name} | {100 * macs / whole:.0f} % | {accuracy:.1%} | {told} | "
            f"{'' if kl is None else f'{kl:.3f}'} | {' | '.join(speeds)} | {s or ''} |"
        )

    for point in results.all_points():
        speeds: list[str] = []
        for runtime, batch in columns:
            found = results.find_comparison(point.name, runtime=runtime, batch=batch)
            latency = point.find_latency(runtime=runtime, batch=batch)
            text = "" if latency is None else f"{latency.median_ms:.1f} ms"
            speeds.append(text if found is None else f"{found.ratio:.2f}x ({text})")
        row(
            point.name, point.accuracy_coarse or 0, point.kl, point.macs or 0, speeds, point.seconds
        )
    for item in extra["repaired"]:
        speeds = [""] * len(columns)
        row(
            item["name"], item["accuracy_coarse"], item["kl"], item["macs"], speeds, item["seconds"]
        )
    machine, told = results.machine, "; nothing was repaired yet"
    if extra["repaired"]:
        told = f"; repairs of {extra['epochs']} epochs; a repaired point is as fast as its cut"
    return (
        "\n".join(lines)
        + f"\n\n{machine['cpu']}, one thread, float32, {dense.images} test images{told}. Raw: "
        f"[{bed.task}.json]({bed.task}.json), "
        f"[{bed.task}-repairs.json]({bed.task}-repairs.json).\n"
    )


def stages(files: list[Path]) -> str:
    """The seconds of each stage of whole commands."""
    found = [json.loads(path.read_text()) for path in files]
    names = sorted({n for item in found for n in item["stages"]})
    lines = [
        "| stage | " + " | ".join(path.stem.removeprefix("stages-") for path in files) + " |",
        "|---|" + "---:|" * len(files),
    ]
    for name in names:
        cells = [item["stages"].get(name, {}).get("seconds", 0.0) for item in found]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.0f} s" for cell in cells) + " |")
    lines.append("| **all** | " + " | ".join(f"{item['seconds']:.0f} s" for item in found) + " |")
    lines.append("| peak memory | " + " | ".join(f"{i['peak_gib']} GiB" for i in found) + " |")
    raw = ", ".join(f"[{path.name}]({path.name})" for path in files)
    cores = max(item["machine"]["cores"] for item in found)
    return (
        "\n".join(lines)
        + f"\n\nWhole `vitcut cut` commands with images decoded, {cores} cores, by "
        f"`benchmarks/stages.py`. Raw: {raw}.\n"
    )


if __name__ == "__main__":
    main()
