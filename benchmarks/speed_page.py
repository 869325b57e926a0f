"""The page of benchmarks/speed.py: tables from what it measured."""

import json
import shutil
from pathlib import Path

import numpy as np

from vitcut.benchmark.bootstrap import bootstrap_interval
from vitcut.results import Comparison, Point, Results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "speed"
START, END = "<!-- table: speed -->\n", "<!-- end of speed -->\n"
RUNTIMES = {
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
        if (out / name).exists():
            shutil.copyfile(out / name, PAGE / name)
    stored = json.loads((out / "correct.json").read_text())
    correct = {name: np.array([*map(int, bits)], dtype=float) for name, bits in stored.items()}
    results = Results.load(out / FILES[0])
    (PAGE / "README.md").write_text(page(out, results, correct), encoding="utf-8")
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

    uv run python benchmarks/speed.py --source tiny-imagenet-200.zip

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


def summary(results: Results, correct: Correct) -> str:
    """The README's part: what was repaired, and some cuts that were not."""
    wanted = ("class-only", "batch-64-predicted-0.3600", "batch-64-predicted-0.2700")
    chosen = [point for point in results.points if point.name in wanted]
    return f"""
{repaired_table(results, correct)}
Without any training:

{table(results, chosen, correct)}
{conditions(results)} Repairs are means of three seeds. More, and one command that makes it again:
[docs/benchmarks/speed](docs/benchmarks/speed/README.md).

"""


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
    results: Results, name: str, batch: int, runtime: str = "onnxruntime"
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
    columns: list[tuple[Results, str, int]] = []
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
