"""The page of benchmarks/parts.py: tables and a figure from what it measured."""

import json
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from vitcut.benchmark.bootstrap import paired_interval
from vitcut.results import Comparison, Point, Results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "parts"
BATCHES = (64, 1)
LABELS = {
    "random": "random, linear fill",
    "magnitude": "magnitude, linear fill",
    "one-round-mean": "Fisher, one round, mean",
    "one-round-linear": "Fisher, one round, linear fill",
    "joint-mean": "Fisher, joint rounds, mean",
    "joint-linear": "Fisher, joint rounds, linear fill",
    "joint-linear-obs": "Fisher, joint rounds, linear fill, OBS",
    "acdc": "ACDC (edges), mean",
}
COLOURS = ("#999999", "#bbbb66", "#56b4e9", "#0072b2", "#e69f00", "#cc79a7", "#d55e00", "#009e73")
MARKERS = "xvs^Dp" + "o*"


def write_page(out: Path) -> None:
    """Copy what was measured, and write it down for readers."""
    results = Results.load(out / "results.json")
    correct = {
        name: np.array(values, dtype=bool)
        for name, values in json.loads((out / "correct.json").read_text()).items()
    }
    PAGE.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "results.json", PAGE / "results.json")
    for kind in ("coarse", "latency"):
        draw(results, kind, PAGE / f"{kind}.svg")
    (PAGE / "README.md").write_text(page(results, correct), encoding="utf-8")


def variant_of(point: Point) -> str | None:
    """Which variant a point belongs to; None for dense models, baselines and repaired points."""
    if "repaired" in point.name:
        return None
    found = [name for name in LABELS if point.name.startswith(f"{name}-")]
    return max(found, key=len, default=None)


def ratio(results: Results, name: str, batch: int) -> Comparison | None:
    """The speed-up against the untouched dense model in ONNX Runtime."""
    return results.find_comparison(name, runtime="onnxruntime", batch=batch)


def speed(results: Results, point: Point, batch: int) -> str:
    """A speed-up with its interval."""
    found = ratio(results, point.name, batch)
    return "-" if found is None else f"{found.ratio:.2f}x ({found.low:.2f}-{found.high:.2f})"


def row(results: Results, point: Point, correct: dict[str, np.ndarray]) -> str:
    """One line of a table."""
    dense = results.dense
    own, other = correct[point.name], correct["dense"]
    low, high = paired_interval(own, other, seed=0)
    gained = 100 * (own.mean() - other.mean())
    macs = (point.macs or 0) / (dense.macs if dense and dense.macs else 1)
    cells = (
        point.name,
        f"{macs:.1%}",
        f"{100 * (point.accuracy_coarse or 0):.1f}",
        f"{gained:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        "-" if point.kl is None else f"{point.kl:.4f}",
        *(speed(results, point, batch) for batch in BATCHES),
        "-" if point.max_abs_diff is None else f"{point.max_abs_diff:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def table(results: Results, points: list[Point], correct: dict[str, np.ndarray]) -> str:
    """Points as a table."""
    head = (
        "| point | MACs | coarse % | against dense, points | KL | speed-up, batch 64 "
        "| speed-up, batch 1 | compact - masked |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    return "\n".join([head, *(row(results, point, correct) for point in points)]) + "\n"


def draw(results: Results, kind: str, path: Path) -> None:
    """Accuracy against MACs, or against latency at batch 64."""
    mpl.rcParams["svg.hashsalt"] = "vitcut"
    figure, panel = plt.subplots(figsize=(8, 5))
    dense = results.dense
    if dense is None or dense.macs is None:
        raise SystemExit("results.json has no dense model")

    def place(point: Point) -> float:
        if kind == "coarse":
            return 100 * (point.macs or 0) / (dense.macs or 1)
        latency = point.find_latency(runtime="onnxruntime", batch=64)
        return latency.median_ms if latency else float("nan")

    for (name, label), colour, marker in zip(LABELS.items(), COLOURS, MARKERS, strict=True):
        chosen = [point for point in results.points if variant_of(point) == name]
        chosen.sort(key=place)
        panel.plot(
            [place(point) for point in chosen],
            [100 * (point.accuracy_coarse or 0) for point in chosen],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            label=label,
        )
    repaired = [point for point in results.points if "-repaired-" in point.name and point.ablation]
    panel.scatter(
        [place(point) for point in repaired],
        [100 * (point.accuracy_coarse or 0) for point in repaired],
        color="black",
        marker="+",
        s=60,
        label="repaired, 6 epochs",
        zorder=3,
    )
    panel.axhline(100 * (dense.accuracy_coarse or 0), color="black", linewidth=0.8, linestyle=":")
    panel.set_xscale("log")
    label = "MACs, % of dense" if kind == "coarse" else "ONNX Runtime ms, batch 64, one thread"
    panel.set(xlabel=label, ylabel="coarse accuracy, %")
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def conditions(results: Results) -> str:
    """Machine, threads, precision and images."""
    machine = results.machine
    versions = machine["versions"]
    return (
        f"{machine['cpu']} ({machine['cores']} cores), one thread, float32, ONNX Runtime "
        f"{versions['onnxruntime']}, load {machine['load_1min']} before; all models interleaved, "
        "speed-ups are medians of paired ratios against the untouched dense export with their 95 % "
        f"interval. Accuracies on all {results.dense and results.dense.images} test images, "
        "differences paired with 95 % bootstrap intervals."
    )


def page(results: Results, correct: dict[str, np.ndarray]) -> str:
    """The page's text."""
    by_name = {point.name: point for point in results.all_points()}
    sections = [
        f"### {label}\n\n"
        + table(results, [p for p in results.points if variant_of(p) == name], correct)
        for name, label in LABELS.items()
    ]
    baselines = [by_name["dense"], by_name["class-only"]]
    repaired = [point for point in results.points if "repaired" in point.name]
    sections_text = "\n".join(sections)
    worst = max(point.max_abs_diff or 0 for point in results.points)
    return f"""# Parts: circuits of token kinds, heads and neurons

    OMP_NUM_THREADS=1 uv run --with matplotlib python benchmarks/parts.py \\
        --source tiny-imagenet-200.zip

The shipped model (`--model animals`), 58 animals in 6 groups. {conditions(results)} Raw:
[results.json](results.json). What it shows: [findings.md](findings.md).

![accuracy against MACs](coarse.svg)

![accuracy against latency](latency.svg)

## Baselines

{table(results, baselines, correct)}
## Repaired

Six epochs of distillation, in batches of 256 at 2e-3 (the defaults have changed since,
[decision 6](../../decisions/0006-how-a-repair-trains.md)); the last number of a name is the seed.

{table(results, repaired, correct)}
## Training-free

Every variant goes through the same budgets. *One round* adds up each part's own score; *joint* scores
the cut model anew at each budget and counts what is cut together; *OBS* scores the residual that
the parts kept beside a part cannot predict. All compact models were compared with their masked
originals: the largest difference of two logits is {worst:.1e}.

{sections_text}"""
