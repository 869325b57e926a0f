"""The page of benchmarks/animals.py: tables and a figure from the raw files that are there."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vitcut.benchmark.bootstrap import paired_interval
from vitcut.results import Results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "animals"
RUNTIMES = (("onnxruntime", 64), ("onnxruntime", 1), ("torch", 64), ("torch", 1))
NOT_YET = "Not yet run.\n"

PUBLISHED_DENSE, PUBLISHED_RETRAINED = 60.07, 55.2
PUBLISHED = {0.003: (57, 18, 56.1, (1.25, 1.25)), 0.01: (94, 41, 31.8, (1.85, 2.0))}
"""Of the reference, by tau: edges cut in %, heads cut of 48, coarse accuracy in %, speed-up on a CPU."""


def read_raw(page: Path) -> tuple[dict[str, Any], Results | None]:
    """What was measured: the raw files that are there by name, and the latencies."""
    raw = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in ("circuits", "repairs", "retrained")
        if (path := page / f"{name}.json").exists()
    }
    if "circuits" not in raw:
        raise SystemExit("nothing was evaluated yet: run the steps search and evaluate first")
    timed = page / "results.json"
    return raw, Results.load(timed) if timed.exists() else None


def write_page(page: Path) -> None:
    """The figure and the text."""
    raw, timed = read_raw(page)
    draw(raw["circuits"], timed, page / "tau.svg")
    (page / "README.md").write_text(text(raw, timed), encoding="utf-8")


def of_search(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The circuits of one search, the smallest tau first."""
    rows = [row for row in found["circuits"] if row["search"] == name]
    return sorted(rows, key=lambda row: row["tau"])


def cut_percent(row: dict[str, Any], what: str) -> float:
    """How many of a circuit's edges or heads are cut, in %."""
    return 100 * (1 - row[f"{what}_kept"] / row[f"{what}_total"])


def draw(found: dict[str, Any], timed: Results | None, path: Path) -> None:
    """Accuracy, cut edges, cut heads and time over tau, ours and theirs."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "vitcut"
    figure, ((accuracy, time), (edges, heads)) = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
    theirs = {"color": "black", "marker": "*", "markersize": 11, "linestyle": "none"}
    for search, fill, colour, marker in (
        ("resample", "mean", "#d55e00", "o"),
        ("resample", "linear", "#e69f00", "v"),
        ("mean", "mean", "#0072b2", "s"),
        ("mean", "linear", "#56b4e9", "^"),
    ):
        rows = of_search(found, search)
        there = [row for row in rows if fill in row["fills"]]
        accuracy.plot(
            [row["tau"] for row in there],
            [100 * row["fills"][fill]["accuracy_coarse"] for row in there],
            color=colour,
            marker=marker,
            markersize=5,
            label=f"searched under {search}, {fill} fill",
        )
        if fill != "mean":
            continue
        taus = [row["tau"] for row in rows]
        for panel, what in ((edges, "edges"), (heads, "heads")):
            values = [cut_percent(row, what) for row in rows]
            panel.plot(taus, values, color=colour, marker=marker, markersize=5)
        for runtime, line in (("onnxruntime", "-"), ("torch", ":")):
            speeds = {row["tau"]: speed(timed, row["name"], runtime, 64) for row in rows}
            known = {tau: one.ratio for tau, one in speeds.items() if one}
            time.plot(
                list(known),
                [1 / ratio for ratio in known.values()],
                color=colour,
                marker=marker,
                markersize=4,
                linestyle=line,
                label=f"{search}, {runtime}, batch 64",
            )
    for tau, (cut, lost, right, speeds) in PUBLISHED.items():
        accuracy.plot(tau, right, **theirs, label="published" if tau == 0.003 else None)
        edges.plot(tau, cut, **theirs)
        heads.plot(tau, 100 * lost / 48, **theirs)
        time.plot([tau] * 2, [1 / one for one in speeds], **theirs)
    for level, style, label in (
        (100 * found["dense"]["accuracy_coarse"], "-", "our dense model"),
        (PUBLISHED_DENSE, "--", "published dense model"),
        (100 * found["largest_group"], ":", "always the largest group"),
    ):
        accuracy.axhline(level, color="grey", linewidth=0.8, linestyle=style, label=label)
    time.axhline(1, color="grey", linewidth=0.8)
    accuracy.set(ylabel="coarse accuracy, %", xscale="log")
    time.set(ylabel="time, of the dense model's")
    edges.set(ylabel="edges cut, %", xlabel="tau")
    heads.set(ylabel="heads cut, %", xlabel="tau")
    time.set_ylim(bottom=0)
    if timed is not None:
        time.legend(fontsize=7)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def speed(timed: Results | None, name: str, runtime: Any, batch: int) -> Any:
    """The comparison with the untouched dense model; None where it was not timed."""
    return timed and timed.find_comparison(name, runtime=runtime, batch=batch)


def speeds(timed: Results | None, name: str) -> list[str]:
    """Speed-ups as cells."""
    found = [speed(timed, name, *place) for place in RUNTIMES]
    return ["" if one is None else f"{one.ratio:.2f}x" for one in found]


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def change(row: dict[str, Any]) -> str:
    """The change against the dense model in points, with its interval."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in row["change"]))


def against(row: dict[str, Any], base: dict[str, Any] | None, images: int) -> str:
    """The change against what a model has the MACs of, in points, with its paired interval."""
    if base is None:
        return ""
    own, other = (
        np.unpackbits(np.frombuffer(bytes.fromhex(one["correct"]), np.uint8), count=images) > 0
        for one in (row, base)
    )
    low, high = paired_interval(own, other, seed=0)
    return change({"change": [own.mean() - other.mean(), low, high]})


def base_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of X for fisher-as-X and the like, of the same seed."""
    _, _, name = row["name"].partition("-as-")
    found = (one for one in rows if one["name"] == name and one.get("seed") == row.get("seed"))
    return next(found, None)


def macs(row: dict[str, Any], found: dict[str, Any]) -> str:
    """MACs in percent of the dense model's."""
    return f"{100 * row['macs'] / found['dense']['macs']:.1f} %"


def circuit_table(found: dict[str, Any], searches: list[str]) -> str:
    """The circuits of some searches under every fill."""
    rows: list[list[Any]] = []
    for search in searches:
        for row in of_search(found, search):
            fills = row["fills"]
            rows.append(
                [
                    row["name"],
                    row["searched"]["pairs"],
                    f"{cut_percent(row, 'edges'):.1f} %",
                    row["heads_total"] - row["heads_kept"],
                    macs(row, found),
                    f"{row['searched']['kl']:.3f}",
                    f"{fills['mean']['kl']:.3f}",
                    *(
                        f"{100 * fills[fill]['accuracy_coarse']:.1f}" if fill in fills else "-"
                        for fill in ("mean", "linear", "zero")
                    ),
                    f"{100 * fills['mean']['commonest_answer']:.0f} %",
                ]
            )
    return table(
        [
            "circuit",
            "pairs",
            "edges cut",
            "heads cut",
            "MACs",
            "KL, search",
            "KL, mean fill",
            "% right: mean fill",
            "linear",
            "zero",
            "commonest answer",
        ],
        rows,
    )


def side_by_side(found: dict[str, Any], timed: Results | None, retrained: dict[str, Any]) -> str:
    """The published figures beside ours."""
    by_name = {row["name"]: row for row in found["circuits"]}
    dense = 100 * found["dense"]["accuracy_coarse"]
    rows: list[list[Any]] = [
        ["dense", "published", "0 %", 0, PUBLISHED_DENSE, "", ""],
        ["dense", "ours", "0 %", 0, f"{dense:.1f}", "", ""],
    ]
    for tau, (edges, heads, right, (low, high)) in PUBLISHED.items():
        told = f"{low}x" if low == high else f"{low}-{high:g}x"
        lost = f"{right - PUBLISHED_DENSE:+.1f}"
        rows.append([f"tau {tau:g}", "published", f"{edges} %", heads, right, lost, told])
        for search in ("resample", "mean"):
            row = by_name.get(f"{search}-{tau:g}")
            if row is None:
                continue
            got = speeds(timed, row["name"])
            rows.append(
                [
                    f"tau {tau:g}",
                    f"ours, searched under {search}",
                    f"{cut_percent(row, 'edges'):.1f} %",
                    row["heads_total"] - row["heads_kept"],
                    f"{100 * row['fills']['mean']['accuracy_coarse']:.1f}",
                    f"{100 * row['fills']['mean']['change'][0]:+.1f}",
                    f"{got[2]} torch, {got[0]} ONNX Runtime" if got[0] else "not yet timed",
                ]
            )
    lost = f"{PUBLISHED_RETRAINED - PUBLISHED_DENSE:+.1f}"
    rows.append(["new weights", "published", "", "", PUBLISHED_RETRAINED, lost, ""])
    rows += [
        [
            f"new weights in {row['name']}",
            "ours",
            "",
            "",
            f"{100 * row['accuracy_coarse']:.1f}",
            f"{100 * row['change'][0]:+.1f}",
            "",
        ]
        for row in retrained.get("retrained", [])
        if row["name"] == "mean-0.003"
    ]
    head = ["", "", "edges cut", "heads cut of 48", "coarse accuracy, %", "against dense, points"]
    return table([*head, "speed-up on a CPU"], rows)


def repair_table(raw: dict[str, Any], timed: Results | None) -> str:
    """Models before and after their repair."""
    if "repairs" not in raw:
        return NOT_YET
    repaired, images = raw["repairs"]["repaired"], raw["circuits"]["images"]
    rows = [
        [
            row["name"],
            macs(row, raw["circuits"]),
            *speeds(timed, row["name"]),
            f"{100 * row['before']['accuracy_coarse']:.1f}",
            f"{100 * row['after']['accuracy_coarse']:.1f}",
            change(row["after"]),
            against(row["after"], (base_of(row, repaired) or {}).get("after"), images),
            f"{row['after']['kl']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(repaired, key=lambda row: -row["macs"])
    ]
    timing = [f"{runtime}, batch {batch}" for runtime, batch in RUNTIMES]
    head = ["start", "MACs", *timing, "% right before", "after", "against dense, points"]
    return table([*head, "against X", "KL", "seconds"], rows)


def retrained_table(raw: dict[str, Any]) -> str:
    """Architectures with new weights."""
    if "retrained" not in raw:
        return NOT_YET
    retrained, images = raw["retrained"]["retrained"], raw["circuits"]["images"]
    rows = [
        [
            row["name"],
            row["seed"],
            macs(row, raw["circuits"]),
            f"{100 * row['accuracy_fine']:.1f}",
            f"{100 * row['accuracy_coarse']:.1f}",
            change(row),
            against(row, base_of(row, retrained), images),
            f"{row['seconds'] / 60:.0f}",
        ]
        for row in sorted(retrained, key=lambda row: -row["macs"])
    ]
    head = ["architecture", "seed", "MACs", "% fine", "% coarse", "coarse against dense, points"]
    return table([*head, "against X", "minutes"], rows)


def time_table(found: dict[str, Any], timed: Results | None) -> str:
    """Latencies with their spread."""
    if timed is None or timed.dense is None:
        return NOT_YET
    rows: list[list[Any]] = []
    for point in timed.all_points():
        cells: list[str] = []
        for runtime, batch in RUNTIMES:
            took = point.find_latency(runtime=runtime, batch=batch)
            ratio = speed(timed, point.name, runtime, batch)
            text = "" if took is None else f"{took.median_ms:.2f} ms"
            cells.append(
                text
                if ratio is None
                else f"{ratio.ratio:.2f}x ({ratio.low:.2f}-{ratio.high:.2f}), {text}"
            )
        rows.append([point.name, macs({"macs": point.macs}, found), *cells])
    head = ["model", "MACs", *(f"{runtime}, batch {batch}" for runtime, batch in RUNTIMES)]
    machine, versions = timed.machine, timed.machine["versions"]
    return table(head, rows) + (
        f"\n{machine['cpu']}, one thread, float32, load {machine['load_1min']} before; torch "
        f"{versions['torch']}, ONNX Runtime {versions['onnxruntime']}; all models in turn, medians, "
        "speed-ups against the untouched dense model with their 95 % interval.\n"
    )


def fewer(evaluations: int) -> str:
    """How many times fewer node evaluations than the naive way."""
    return f"{NAIVE / evaluations:.0f}x" if evaluations else "-"


def search_table(found: dict[str, Any]) -> str:
    """What the searches cost."""
    rows = [
        [
            row["name"],
            row["images"],
            row["searched"]["pairs"],
            f"{row['searched']['node_evaluations']:,}",
            fewer(row["searched"]["node_evaluations"]),
            row["searched"]["oracle_calls"],
            "-" if row["searched"]["seconds"] is None else f"{row['searched']['seconds']:.1f}",
        ]
        for search in dict.fromkeys(row["search"] for row in found["circuits"])
        for row in of_search(found, search)
    ]
    return table(
        ["circuit", "images", "pairs", "node evaluations", "fewer", "oracle calls", "seconds"], rows
    )


NAIVE = 3628 * 55
"""Node evaluations of naive ACDC: edges times sources."""


def text(raw: dict[str, Any], timed: Results | None) -> str:
    """The page."""
    found = raw["circuits"]
    main = of_search(found, "mean")
    names = [name for name in ("five", "more", "total") if of_search(found, name)]
    epochs = raw.get("repairs", {}).get("epochs", 6)
    worst = max(row["max_abs_diff"] or 0 for row in found["circuits"])
    others = circuit_table(found, names) if names else NOT_YET
    files = [f"{name}.json" for name in (*raw, *(() if timed is None else ("results",)))]
    shown = "\n\n    vitcut report docs/benchmarks/animals --out report.html"
    charts = "" if timed is None else f" As a page with charts:{shown}"
    linked = ", ".join(f"[{name}]({name})" for name in files)
    return f"""# animals: the reference experiment, ours and theirs

    OMP_NUM_THREADS=1 uv run --with matplotlib python benchmarks/animals.py \\
        --source tiny-imagenet-200.zip

The work that vitcut grew from trained a small ViT on 58 animals in 6 groups, found its circuit with
ACDC over tau, cut it, and trained the cut architecture anew. This is the same on the shipped model
(`--model animals`; [how it was trained](training.jsonl)). With `--quick`: fewer values of tau and
images, 8 minutes on one core, its page in `--out`. What it shows: [findings.md](findings.md).
Raw: {linked}.{charts}

## Side by side

{side_by_side(found, timed, raw.get("retrained", {}))}
![accuracy, time, cut edges and cut heads over tau](tau.svg)

Accuracy is over the six groups on {found["images"]} test images; always answering the largest group
scores {found["largest_group"]:.1%}. Time is at batch 64 on one thread. What differs in method:

- *What is cut stays cut.* Here a cut edge carries its stand-in in every later test, and in the cut model.
  The reference does not keep removed edges ablated while it tests the others, so its search never
  sees what the cuts do together.
- *What an edge is.* Here a target is a head's q, k or v, an MLP, or the classifier, before its LayerNorm:
  3,628 edges. The reference patches after the LayerNorm, has no q, k and v of their own, and
  tests no edge into the classifier. Equal values of tau do not mean equal circuits.
- *What stands in.* Searched under `resample`, a cut edge carries a corrupted image's value, which no
  compact model can; the circuit is then cut under mean fill. Searched under `mean`, it is cut as it was searched.
- *The dense model.* Ours is trained by the light recipe and starts {100 * found["dense"]["accuracy_coarse"] - PUBLISHED_DENSE:.0f} points higher. Compare
  changes, not levels.

## Circuits over tau

{main[0]["images"]} training images, one corrupted image each (`resample`) or their means. *Heads cut* of
48: those on no kept path from the embedding to the classifier. *KL* in nats: on the images of the search
under its own ablation, and of the compact model on the test images. *Commonest answer*: how often the
cut model gives its favourite group; near 100 % it no longer does the task. Every compact model was
compared with its masked original; the largest difference of two logits was {worst:.1g}.

{circuit_table(found, ["resample", "mean"])}
## Other searches

*five*: one corrupted image from each other group; *more*: as many pairs from more images with one
each; *total*: the KL itself is compared with tau, under mean ablation.

{others}
## Repaired

{epochs} epochs of distillation from the dense model (`vitcut finetune`, its defaults, one seed), from a
compact model with linear fill. *fisher-as-X* and *random-as-X* are cuts of heads and neurons per token
kind with the MACs of X, by Fisher scores and at random; *first-K* are the first K blocks alone. A repair changes no time.

{repair_table(raw, timed)}
## Trained anew

New weights for the compact architecture, trained on the 58 classes by the light recipe (24
epochs), which also made the dense model. *plain-as-X*: the plain ViT with the MACs nearest to those of X;
*budget-F*: the Fisher cut to this fraction of the MACs.

{retrained_table(raw)}
## Time

{time_table(found, timed)}
## What the search cost

Naive ACDC evaluates edges x sources = {NAIVE:,} nodes for each tau. One thread; one set of cached
activations serves a sweep.

{search_table(found)}"""
