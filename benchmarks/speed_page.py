"""The page of benchmarks/speed.py, and the table and the figure that README.md shows.

    uv run --with matplotlib python benchmarks/speed_page.py

writes them again from the committed raw files.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vitcut.benchmark.bootstrap import bootstrap_interval
from vitcut.names import RuntimeName
from vitcut.results import Comparison, Point, Results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "speed"
START, END = "<!-- table: speed -->\n", "<!-- end of speed -->\n"
RUNTIMES: Mapping[RuntimeName, str] = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "torch",
    "torch-compile": "torch.compile",
}
FILES = (
    "onnxruntime-1.json",
    "others-1.json",
    "onnxruntime-2.json",
    "others-2.json",
    "costs.json",
    "correct.json",
)
Correct = dict[str, np.ndarray]


def write_page(out: Path) -> None:
    """Copy what was measured, and write it down for readers."""
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{readme} lacks the marks {START.strip()} and {END.strip()}")
    PAGE.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "operations.md"):
        if (out / name).exists() and out != PAGE:
            shutil.copyfile(out / name, PAGE / name)
    stored = json.loads((out / "correct.json").read_text())
    correct = {name: np.array([*map(int, bits)], dtype=float) for name, bits in stored.items()}
    results = Results.load(out / FILES[0])
    (PAGE / "README.md").write_text(page(out, results, correct), encoding="utf-8")
    draw(results, correct, PAGE / "speed.svg")
    text = before + START + summary(results, correct) + END + after
    readme.write_text(text, encoding="utf-8")


def page(out: Path, results: Results, correct: Correct) -> str:
    """The page's text."""
    found = {path: Results.load(out / path) for path in FILES[:4]}
    paths = "\n".join(
        f"### Chosen for batch {batch}\n\n"
        + table(results, [p for p in results.points if is_cut(p, f"batch-{batch}-")], correct)
        for batch in (64, 1)
    )
    baselines = [point for point in results.all_points() if point.name in {"dense", "class-only"}]
    acdc = [point for point in results.points if point.name.startswith("acdc")]
    worst = max(point.max_abs_diff or 0 for point in results.points)
    return f"""# Speed: cuts by predicted latency, in every runtime

    uv run --with matplotlib python benchmarks/speed.py --source tiny-imagenet-200.zip

The shipped model (`--model animals`), 58 animals in 6 groups. {conditions(results)} A name says which
batch size a path was searched for, and the predicted latency as a fraction of the uncut compact
model's, both smoothed as [selection sees them](../../decisions/0011-selection-by-predicted-time.md). *Efficiency* is the speed-up at batch 64 times the fraction of the MACs: 1 where time falls as
the MACs do. What it shows: [findings.md](findings.md); operation by operation:
[operations.md](operations.md). Raw: {", ".join(f"[{name}]({name})" for name in FILES)}.

## Repaired

Six epochs of distillation (`vitcut finetune`, its defaults), three seeds; the dense model got the same.
Accuracies are means over the seeds; differences are of these means, image by image, with their 95 %
bootstrap interval over images: they are about the mean of these three models. *No loss* means that the
interval against the better of dense and dense repaired excludes -1 point.

{repaired_table(results, correct)}
## Baselines

{table(results, baselines, correct)}
## Training-free

All compact models were compared with their masked originals: the largest difference of two logits is
{worst:.1e}.

{paths}
## ACDC's circuits, without and with merged streams

Whole tokens, 128 images, mean ablation, no repair. `--merge` gives edges back where that is predicted
to save time.

{table(results, acdc, correct)}
## Other runtimes, and two threads

Speed-up against the untouched dense model in the same runtime, at the same batch and threads; in
brackets the dense model's milliseconds.

{runtimes_table(found)}
{costs_text(out)}"""


SUMMARY = (
    ("class-only", "not cut: the last block, for the class token alone"),
    ("batch-64-predicted-0.3600", "cut, no training"),
    ("batch-64-predicted-0.2700", "cut, no training"),
    ("batch-1-predicted-0.3400-repaired-", "cut for single images, repaired"),
    ("batch-64-predicted-0.1500-repaired-", "cut for batches of 64, repaired"),
    ("batch-64-predicted-0.1300-repaired-", "cut for batches of 64, repaired"),
)
"""The points that README shows, and what they are; a repair's name lacks its seed."""


def summary(results: Results, correct: Correct) -> str:
    """The README's table: at most six rows."""
    lines = [
        "| model | work | batch 64 | batch 1 | accuracy, points |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    dense_repaired = over_seeds(correct, "dense-repaired-")
    for name, label in SUMMARY:
        repaired = name.endswith("-")
        point = next(p for p in results.points if p.name == (f"{name}0" if repaired else name))
        own = over_seeds(correct, name) if repaired else correct[name]
        speeds = [comparison(results, point.name, batch) for batch in (64, 1)]
        cells = (
            label,
            f"{100 * macs_fraction(results, point):.0f} %",
            *(f"{found.ratio:.1f}x faster" if found else "-" for found in speeds),
            difference(own, dense_repaired if repaired else correct["dense"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    machine, dense = results.machine, results.dense
    accuracy, repaired = (100 * found.mean() for found in (correct["dense"], dense_repaired))
    return f"""
{chr(10).join(lines)}

*Work* is multiply-accumulates, compared with the dense model's. *Faster* is against the untouched dense
model in the same runtime: ONNX Runtime {machine["versions"]["onnxruntime"]}, float32, one thread of an {machine["cpu"]} with
AVX-512, all models timed in turn. *Accuracy* is over the six groups, on {dense and dense.images:,} test images, with
its 95 % interval: a cut without training against the untouched dense model ({accuracy:.1f} %); a repaired
one, the mean of three seeds, against the dense model after the same six epochs of distillation
({repaired:.1f} %). Intervals of the speed-ups, other runtimes, raw files and the command that
makes it again: [docs/benchmarks/speed](docs/benchmarks/speed/README.md).

"""


def draw(results: Results, correct: Correct, path: Path) -> None:
    """Accuracy against speed-up at batch 64: cuts as they are, and repaired."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vitcut"
    mpl.rcParams["font.family"] = "DejaVu Sans"
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 3.4))
    series = {
        "cut, no training": ([p for p in results.points if is_cut(p, "batch-64-")], "#8a8f98"),
        "cut and repaired": (
            [p for p in results.points if p.name.endswith("-repaired-0") and "batch" in p.name],
            "#0b6e4f",
        ),
    }
    for label, (points, colour) in series.items():
        rows = []
        for point in points:
            found = comparison(results, point.name, 64)
            own = correct[point.name]
            if point.name.endswith("-repaired-0"):
                own = over_seeds(correct, point.name[:-1])
            if found is not None:
                rows.append((found.ratio, 100 * own.mean()))
        rows.sort()
        axis.plot(*zip(*rows, strict=True), "o-", color=colour, label=label, markersize=4)
    dense = 100 * correct["dense"].mean()
    axis.axhline(dense, color="#444444", linewidth=0.8, linestyle="--")
    axis.text(1.05, dense + 0.25, f"dense, {dense:.1f} %", fontsize=8, color="#444444")
    axis.set_xscale("log")
    ticks = [1, 2, 3, 5, 8, 12]
    axis.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(62, 74)
    axis.set_xlim(1, 13)
    axis.set_xlabel("speed-up, ONNX Runtime, batch 64, one thread")
    axis.set_ylabel("accuracy over 6 groups, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def is_cut(point: Point, start: str) -> bool:
    """Whether a point is an unrepaired cut of a path."""
    return point.name.startswith(start) and "repaired" not in point.name


def conditions(results: Results) -> str:
    """Machine, threads, precision and images."""
    machine = results.machine
    return (
        f"{machine['cpu']} ({machine['cores']} cores, {', '.join(machine['cpu_flags'])}), one thread unless said otherwise, float32, "
        f"ONNX Runtime {machine['versions']['onnxruntime']}, load {machine['load_1min']} before; "
        "all models interleaved, speed-ups are medians of paired ratios against the untouched dense "
        "export with their 95 % interval. Accuracies on all "
        f"{results.dense and results.dense.images} test images."
    )


def comparison(
    results: Results, name: str, batch: int, runtime: RuntimeName = "onnxruntime"
) -> Comparison | None:
    """The speed-up against the untouched dense model."""
    return results.find_comparison(name, runtime=runtime, batch=batch)


def speed(found: Comparison | None) -> str:
    """A speed-up with its interval."""
    return "-" if found is None else f"{found.ratio:.2f}x ({found.low:.2f}-{found.high:.2f})"


def macs_fraction(results: Results, point: Point) -> float:
    """Of the dense model's."""
    dense = results.dense
    return (point.macs or 0) / (dense.macs if dense and dense.macs else 1)


def efficiency(results: Results, point: Point) -> str:
    """Speed-up at batch 64 times the fraction of the MACs."""
    found = comparison(results, point.name, 64)
    return "-" if found is None else f"{found.ratio * macs_fraction(results, point):.2f}"


def difference(own: np.ndarray, other: np.ndarray) -> str:
    """Of two accuracies on the same images, in points."""
    low, high = bootstrap_interval(own - other, np.mean, seed=0)
    return f"{100 * (own - other).mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def table(results: Results, points: list[Point], correct: Correct) -> str:
    """Points as a table."""
    lines = [
        "| point | MACs | coarse % | against dense, points | KL | speed-up, batch 64 | efficiency "
        "| speed-up, batch 1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for point in points:
        cells = (
            point.name,
            f"{macs_fraction(results, point):.1%}",
            f"{100 * correct[point.name].mean():.1f}",
            difference(correct[point.name], correct["dense"]),
            "-" if point.kl is None else f"{point.kl:.4f}",
            speed(comparison(results, point.name, 64)),
            efficiency(results, point),
            speed(comparison(results, point.name, 1)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def over_seeds(correct: Correct, start: str) -> np.ndarray:
    """How often each image was right over the seeds of a repair."""
    return np.mean([values for name, values in correct.items() if name.startswith(start)], axis=0)


def repaired_table(results: Results, correct: Correct) -> str:
    """What was repaired, over its seeds, beside the dense model."""
    lines = [
        "| point | MACs | coarse % | seeds | against dense | against dense repaired | no loss "
        "| speed-up, batch 64 | efficiency | speed-up, batch 1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    dense, dense_repaired = correct["dense"], over_seeds(correct, "dense-repaired-")
    better = max((dense, dense_repaired), key=np.mean)
    for point in results.points:
        if not point.name.endswith("-repaired-0"):
            continue
        start = point.name[:-1]
        own = over_seeds(correct, start)
        seeds = [100 * values.mean() for name, values in correct.items() if name.startswith(start)]
        keeps = bootstrap_interval(own - better, np.mean, seed=0)[0] > -0.01
        compact = not point.name.startswith("dense")
        cells = (
            start.removesuffix("-"),
            f"{macs_fraction(results, point):.1%}",
            f"{100 * own.mean():.1f}",
            ", ".join(f"{value:.1f}" for value in seeds),
            difference(own, dense),
            difference(own, dense_repaired) if compact else "-",
            ("yes" if keeps else "no") if compact else "-",
            speed(comparison(results, point.name, 64)),
            efficiency(results, point),
            speed(comparison(results, point.name, 1)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def runtimes_table(found: dict[str, Results]) -> str:
    """Speed-ups in every runtime, at both batch sizes, on one thread and on two."""
    columns: list[tuple[Results, RuntimeName, int]] = []
    heads: list[str] = []
    for threads in (1, 2):
        for runtime, label in RUNTIMES.items():
            file = "onnxruntime" if runtime == "onnxruntime" else "others"
            results = found[f"{file}-{threads}.json"]
            for batch in (1, 64):
                latency = results.dense and results.dense.find_latency(runtime=runtime, batch=batch)
                if latency is not None:
                    columns.append((results, runtime, batch))
                    heads.append(
                        f"{label}, {threads} thread{'s' * (threads > 1)}, batch {batch} "
                        f"({latency.median_ms:.3g} ms)"
                    )
    names = [point.name for point in found["others-1.json"].points]
    lines = [f"| in | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for head, (results, runtime, batch) in zip(heads, columns, strict=True):
        cells = [speed(comparison(results, name, batch, runtime)) for name in names]
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def costs_text(out: Path) -> str:
    """How well latencies are predicted."""
    path = out / "costs.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    rows = "\n".join(
        f"| {batch} | {item['shipped']:.1%} | {item['calibrated']:.1%} |"
        for batch, item in found["median_error"].items()
    )
    return f"""
## Predicted and measured latency

The {found["models"]} cuts above, ACDC's with cut edges among them, in ONNX Runtime on one thread: median of
|predicted / measured - 1|. *Calibrated* costs are fitted as `vitcut checks` does, to the half of the cuts
that a prediction is not of; the shipped ones are from a machine of this kind and say nothing of others.

| batch | shipped costs | calibrated |
| ---: | ---: | ---: |
{rows}
"""


if __name__ == "__main__":
    write_page(PAGE)
