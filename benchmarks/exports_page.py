"""The page of benchmarks/exports.py, from the raw files beside it."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "export"
TITLES = {
    "animals": "The shipped animals model (width 64, 64 px)",
    "cats-dogs": "vit_tiny_patch16_224, cats and dogs (width 192, 224 px)",
}
NAMES = {
    "onnx": "ONNX, opset 20",
    "onnx-23": "ONNX, opset 23",
    "onnx-float16": "ONNX, float16",
    "onnx-int8": "ONNX, int8",
    "openvino": "OpenVINO",
    "pt2": "pt2 (torch)",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
    "transformers-js": "Transformers.js",
}
MODELS = ("dense", "compact")


def write_page() -> None:
    """The page, from the raw files that are there."""
    found = {task: PAGE / f"{task}.json" for task in TITLES}
    tasks = {task: json.loads(path.read_text()) for task, path in found.items() if path.exists()}
    if not tasks:
        raise SystemExit(f"{PAGE} has no raw files: measure first")
    sections = "\n".join(section(task, rows) for task, rows in tasks.items())
    text = f"""# Every target of `vitcut export`, dense beside compact

    OMP_NUM_THREADS=1 taskset -c 0 uv run python benchmarks/exports.py --animals tiny-imagenet-200.zip \\
        --vit-tiny timm:vit_tiny_patch16_224 --cats-dogs cats-dogs-256.zip

Two models, each beside its cut to a share of its multiply-accumulates, without any training after the
cut. *Dense* is the untouched model with the logits of the task's classes.

{conditions(tasks)}

{sections}"""
    (PAGE / "README.md").write_text(text, encoding="utf-8")


def conditions(tasks: dict[str, Any]) -> str:
    """Machine, load, versions, and how each column was measured."""
    rows = [row for each in tasks.values() for row in each.values()]
    machine = rows[0]["machine"]
    loads = [row["machine"]["load_1min"] for row in rows]
    foreign = [row.get("foreign_cores") or 0 for row in rows]
    dates = sorted({row["machine"]["date"] for row in rows})
    seconds = sorted({f"{row['seconds']:g}" for row in rows})
    tools: dict[str, set[str]] = {}
    for row in rows:
        for name, release in row["files"]["dense"]["tools"].items():
            tools.setdefault(name, set()).add(release)
    versions = ", ".join(f"{name} {' and '.join(sorted(tools[name]))}" for name in sorted(tools))
    missing = ""
    if not any("litert" in each for each in tasks.values()):
        missing = (
            "\n- LiteRT is missing: it wants an older torch, so it is measured in an environment of its "
            "own, with `--targets litert` and the same `--out`."
        )
    return f"""- {machine["cpu"]}, {machine["cores"]} cores, {
        ", ".join(machine["cpu_flags"])
    }; load {min(loads)} to {max(loads)} at the start of a row, other processes kept up to {
        max(foreign):.1f} cores busy during the timings; Python {machine["python"]}; {
        ", ".join(dates)
    }.
- {versions}.
- **Latency**: one thread, float32, dense and compact in turn for {
        " or ".join(seconds)
    } seconds of each;
  median (10th to 90th percentile). *Faster* is the median of the ratios within rounds, with its 95 %
  interval. ONNX and pt2 have one file for any batch size; the others have one for each.
- **Start**: a fresh process that runs the program of the folder's README on one picture, from its
  start to its end, and the most memory that it had resident; median of 3, taken in turn, or one where that takes long. *Imports* is
  the same process with the program's imports alone.
- **Parity**: the file's logits against torch's, on training images.{missing}"""


def section(task: str, rows: dict[str, Any]) -> str:
    """The tables of one model."""
    rows = {case: rows[case] for case in NAMES if case in rows}
    dense, compact = (next(iter(rows.values()))["macs"][name] for name in MODELS)
    return f"""## {TITLES[task]}

Cut to {compact / dense:.1%} of {dense / 1e6:,.0f} million MACs. Raw: [{task}.json]({task}.json).

{latencies(rows)}

{starts(rows)}

{files(rows)}

{precisions(rows)}
"""


def table(head: str, lines: list[str]) -> str:
    """A table whose first two columns are text."""
    columns = head.count("|") - 1
    return "\n".join([head, "|---|" + "---:|" * (columns - 1), *lines])


def latencies(rows: dict[str, Any]) -> str:
    """Milliseconds and ratios."""
    lines: list[str] = []
    for case, row in rows.items():
        for batch, found in row["latency"].items():
            told = ["{median:.3g} ({p10:.3g}-{p90:.3g})".format(**found["ms"][n]) for n in MODELS]
            faster = "**{:.2f}x** ({:.2f}-{:.2f})".format(*found["faster"])
            lines.append(f"| {NAMES[case]} | {batch} | {' | '.join(told)} | {faster} |")
    return table("| target | batch | dense, ms | compact, ms | faster |", lines)


def starts(rows: dict[str, Any]) -> str:
    """Seconds and memory of fresh processes."""
    lines: list[str] = []
    for case, row in rows.items():
        if "starts" in row:
            cells = [row["starts"][name] for name in ("imports", *MODELS)]
            told = [f"{each['seconds']:.2f}" for each in cells]
            told += [f"{each['peak_bytes'] / 1e6:.0f}" for each in cells]
            lines.append(f"| {NAMES[case]} | {' | '.join(told)} |")
    head = (
        "| start and one picture | imports, s | dense, s | compact, s | imports, peak MB | "
        "dense, peak MB | compact, peak MB |"
    )
    return table(head, lines)


def files(rows: dict[str, Any]) -> str:
    """Sizes and parity."""
    lines: list[str] = []
    for case, row in rows.items():
        cells = [f"{row['files'][name]['bytes'] / 1e6:.2f}" for name in MODELS]
        for name in MODELS:
            found = row["files"][name]["parity"]
            worst = max(each["max_abs_diff"] for each in found)
            same = min(each["labels_equal"] for each in found)
            cells.append(f"{worst:.1e}, {same} of {found[0]['images']}")
        if row["files"]["dense"]["parity"][0]["of"].startswith("probabilities"):
            cells = [*cells[:2], *(f"{cell} (probabilities)" for cell in cells[2:])]
        lines.append(f"| {NAMES[case]} | {' | '.join(cells)} |")
    head = (
        "| file | dense, MB | compact, MB | dense: greatest difference, same answers | "
        "compact: greatest difference, same answers |"
    )
    shown = table(head, lines)
    if "transformers-js" in rows:
        shown += (
            "\n\nTransformers.js takes pictures of any size and scales them itself: its probabilities are "
            "compared with those of Pillow's scaling and torch."
        )
    return shown


def precisions(rows: dict[str, Any]) -> str:
    """float16 and int8 beside float32, as the export reports them."""
    lines: list[str] = []
    for case, row in rows.items():
        for name in MODELS:
            report = row["files"][name]["beside_float32"]
            if report is None:
                continue
            precision = case.removeprefix("onnx-")
            size, accuracy = report["bytes"], report["accuracy"]
            change = accuracy[precision] - accuracy["float32"]
            low, high = report["accuracy_change_interval"]
            speeds = [
                f"{found['float32']:.3g} to {found[precision]:.3g} ({{:.2f}}x)".format(
                    report["times_faster"][batch][0]
                )
                for batch, found in report["latency_ms"].items()
            ]
            lines.append(
                f"| {name}, {precision} | {size['float32'] / 1e6:.2f} to {size[precision] / 1e6:.2f} | "
                f"{accuracy['float32']:.1%} to {accuracy[precision]:.1%} | "
                f"{100 * change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) | {' | '.join(speeds)} | "
                f"{'no' if report['advice'] else 'yes'} |"
            )
            images = report["val_images"]
    if not lines:
        return ""
    head = (
        "| ONNX, from float32 | MB | accuracy | change, points | ms, batch 1 | ms, batch 64 | "
        "worth it, says the tool |"
    )
    return table(head, lines) + (
        f"\n\nAs `vitcut export --precision` reports them: accuracy on {images} val images with a paired "
        "95 % interval, latency for a second of each, int8 calibrated on 128 training images."
    )
