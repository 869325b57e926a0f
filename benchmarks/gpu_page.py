"""The page of the GPU benchmark, from whatever was measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RAW = "results.json"
MODELS = {
    "deit_small_patch16_224": "DeiT-S",
    "vit_base_patch16_224": "ViT-B/16",
    "vit_tiny_patch16_224": "ViT-Ti",
}
VARIANTS = ("dense", "class-only", "0.5", "0.3", "0.15")
MODES = {
    "eager": "eager torch",
    "graph": "eager torch, in a CUDA graph",
    "reduce-overhead": "torch.compile, reduce-overhead",
    "max-autotune": "torch.compile, max-autotune",
}
NOTHING = "not yet measured"


def write_page(folder: Path) -> None:
    """Write ``README.md`` from the raw file and the plans that are in a folder."""
    raw = folder / RAW
    found: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8")) if raw.is_file() else {}
    (folder / "README.md").write_text("\n".join(lines(found, folder)) + "\n", encoding="utf-8")


def lines(found: dict[str, Any], folder: Path) -> Iterator[str]:
    """The page, line by line."""
    yield "# Cut models on a GPU"
    yield ""
    yield "    PYTHONPATH=src python benchmarks/gpu.py"
    yield ""
    yield (
        "Dense, class-only and cut models of three sizes, with random weights, in bfloat16; all of a "
        "table's models are timed in turn. *Cut* models keep what is in [plans](plans): "
        f"{origins(folder)}. Which weights a model has changes no time."
    )
    yield ""
    if found:
        versions = f"{found['gpu'] or found['device']}, torch {found['torch']}"
        yield f"{versions}, CUDA {found['cuda']}; {found['seconds']:.0f} s in all. Raw: [{RAW}]({RAW})."
    else:
        yield f"**{NOTHING.capitalize()}**: no machine with a GPU has run it."
    yield ""
    yield "## Images per second"
    for name, title in MODELS.items():
        yield ""
        yield f"### {title}"
        yield ""
        yield from table(found, name)
    yield ""
    yield "## Compact against masked, float32"
    yield ""
    exact = found.get("exactness", [])
    if exact:
        yield "| model | variant | MACs | largest difference of two logits |"
        yield "| --- | --- | ---: | ---: |"
    for row in exact:
        share, difference = row["macs_fraction"], row["max_abs_diff"]
        yield f"| {title_of(row)} | {row['variant']} | {share:.1%} | {difference:.2g} |"
    if not exact:
        yield f"{NOTHING.capitalize()}."
    yield ""
    yield "## Commands with `--device cuda`"
    yield ""
    ran = [row for row in found.get("commands", []) if row["command"] != "end"]
    yield "The shipped model on pictures of noise: whether they run, and how long they take."
    yield ""
    if not ran:
        yield f"{NOTHING.capitalize()}."
    for row in ran:
        yield f"- {row['command']}: {row['seconds']:.1f} s"
    for kind, title in (("failures", "What failed"), ("skipped", "Left out for want of time")):
        if found.get(kind):
            yield ""
            yield f"## {title}"
            yield ""
            for row in found[kind]:
                yield f"- {row['part']}: {row.get('error') or row.get('reason')}"


def table(found: dict[str, Any], name: str) -> Iterator[str]:
    """The throughputs of one model, one line per way to run it and batch size."""
    rows = [row for row in found.get("times", []) if row["model"] == name]
    if not rows:
        yield f"{NOTHING.capitalize()}."
        return
    yield f"| | batch | {' | '.join(VARIANTS)} |"
    yield f"| --- | {' | '.join(['---:'] * (1 + len(VARIANTS)))} |"
    by_place = {(row["mode"], row["batch"], row["variant"]): row for row in rows}
    for mode, title in MODES.items():
        for batch in sorted({row["batch"] for row in rows if row["mode"] == mode}):
            cells = [cell(by_place.get((mode, batch, variant))) for variant in VARIANTS]
            yield f"| {title} | {batch} | {' | '.join(cells)} |"


def cell(row: dict[str, Any] | None) -> str:
    """Throughput, and the speed-up over dense with its 95 % interval."""
    if row is None:
        return "-"
    if row["speed_up"] is None:
        return f"{row['images_per_s']:,.0f}"
    ratio, low, high = row["speed_up"]
    told = f"{ratio:.2f}x ({low:.2f}-{high:.2f})"
    differs = low > 1 or high < 1
    return f"{row['images_per_s']:,.0f}, {told if differs else f'[{told}]'}"


def title_of(row: dict[str, Any]) -> str:
    """What people call a model."""
    return MODELS.get(row["model"], row["model"])


def origins(folder: Path) -> str:
    """Where the plans come from, in words."""
    plans = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("plans/*.json"))
    return "; ".join(sorted({plan["origin"] for plan in plans})) or "there are none yet"
