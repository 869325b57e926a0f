"""Make docs/benchmarks/animals-quick again from one run.

    OMP_NUM_THREADS=1 uv run python benchmarks/animals_quick.py --source tiny-imagenet-200.zip

Runs the recipe (or takes a finished run), then writes results.json, the training log and the page.
"""

import argparse
import json
import shutil
from pathlib import Path

import vitcut
from vitcut.circuit import Circuit
from vitcut.reports.tables import point_table, to_markdown
from vitcut.results import Comparison, Point, Results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "animals-quick"


def main() -> None:
    """Run the recipe and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="The Tiny ImageNet archive or folder.")
    parser.add_argument("--out", type=Path, default=Path("runs/animals"), help="Run directory.")
    arguments = parser.parse_args()
    changes = {"data.source": arguments.source}
    vitcut.run("animals-quick", changes=changes, out=arguments.out)
    write_page(arguments.out)


def write_page(run: Path) -> None:
    """Copy what was measured, and write it down for readers."""
    results = Results.load(run / "results.json")
    PAGE.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "results.json", PAGE / "results.json")
    shutil.copyfile(run / "metrics.jsonl", PAGE / "training.jsonl")
    circuits = {path.parent.name: Circuit.load(path) for path in run.glob("points/*/circuit.json")}
    (PAGE / "README.md").write_text(page(results, circuits, run), encoding="utf-8")


def page(results: Results, circuits: dict[str, Circuit], run: Path) -> str:
    """The whole page."""
    return f"""# animals-quick: ACDC circuits of a small ViT, cut and measured

    OMP_NUM_THREADS=1 uv run python benchmarks/animals_quick.py --source tiny-imagenet-200.zip

which is `vitcut run animals-quick`, and this page made of its results. Raw:
[results.json](results.json), [training.jsonl](training.jsonl). As a page with charts:

    vitcut report docs/benchmarks/animals-quick --out report.html

{conditions(results)}

## Accuracy, size and speed

{to_markdown(point_table(results))}
*class-only* is the uncut circuit, compiled: it computes the last block for the class token alone,
which is exact. Against it instead of the untouched dense model:

{class_only_table(results)}
KL is KL(dense || cut) over the groups on the test images, in nats. Every cut model was
compared with its masked original; the largest difference of two logits was
{max(point.max_abs_diff or 0 for point in results.points):.1g}.

## torch eager

{to_markdown(point_table(results, runtime="torch"))}
## What the search cost

{search_table(results, circuits)}
Naive ACDC evaluates edges x sources = {naive_nodes(circuits):,} nodes for each tau.
*KL, search* is on the search's own pairs under the ablation of the search, *KL, cut* on the same
images under mean ablation, which is what was cut. One set of cached activations serves every tau
of an ablation.

## Training

{training(run)}

## What this shows

See [findings.md](findings.md).
"""


def conditions(results: Results) -> str:
    """Machine, threads, precision and images."""
    machine = results.machine
    threads = {item.threads for point in results.all_points() for item in point.latency}
    images = results.dense.images if results.dense else 0
    versions = machine["versions"]
    return (
        f"{machine['cpu']} ({machine['cores']} cores, {', '.join(machine['cpu_flags'])}), "
        f"{threads.pop()} thread, float32, load {machine['load_1min']} before; torch "
        f"{versions['torch']}, ONNX Runtime {versions['onnxruntime']}. Latencies are medians of "
        f"interleaved rounds; speed-ups are medians of paired ratios with their 95 % bootstrap "
        f"interval. Accuracy on all {images} test images; always answering the largest group "
        f"scores {majority(results):.1%}."
    )


def majority(results: Results) -> float:
    """The coarse accuracy of always answering the largest group."""
    counts = [sum(row) for row in (results.dense and results.dense.confusion) or ()]
    return max(counts) / sum(counts)


def naive_nodes(circuits: dict[str, Circuit]) -> int:
    """What naive ACDC evaluates."""
    graph = next(iter(circuits.values())).graph
    return graph.num_edges * len(graph.sources)


def class_only_table(results: Results) -> str:
    """Speed-ups against the compiled uncut model in ONNX Runtime."""
    found = [c for c in results.comparisons if c.against == "class-only" and c.point != "dense"]
    rows = [
        f"| {name} | {ratio(found, name, 1)} | {ratio(found, name, 64)} |"
        for name in dict.fromkeys(c.point for c in found)
    ]
    return "\n".join(["| point | batch 1 | batch 64 |", "| --- | ---: | ---: |", *rows]) + "\n"


def ratio(found: list[Comparison], name: str, batch: int) -> str:
    """One speed-up with its interval."""
    for item in found:
        if (item.point, item.runtime, item.batch) == (name, "onnxruntime", batch):
            return f"{item.ratio:.2f}x ({item.low:.2f}-{item.high:.2f})"
    return "-"


def search_table(results: Results, circuits: dict[str, Circuit]) -> str:
    """Cost and outcome of every search."""
    lines = [
        "| point | pairs | node evaluations | oracle calls | seconds | KL, search | KL, cut |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [search_row(p, circuits[p.name]) for p in results.points if p.name in circuits]
    return "\n".join(lines) + "\n"


def search_row(point: Point, circuit: Circuit) -> str:
    """One line of the search table."""
    found = circuit.provenance
    cut = (point.faithfulness or {}).get("cut")
    kl = "-" if cut is None else f"{cut['kl']:.3f}"
    cells = (
        point.name,
        found["pairs"],
        f"{found['node_evaluations']:,}",
        found["oracle_calls"],
        "-" if found["seconds"] is None else f"{found['seconds']:.1f}",
        f"{found['kl']:.3f}",
        kl,
    )
    return f"| {' | '.join(map(str, cells))} |"


def training(run: Path) -> str:
    """How the dense model came about, from its log."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["accuracy_coarse"], row["accuracy_fine"]))
    seconds = sum(row["seconds"] for row in rows)
    return (
        f"{len(rows)} epochs in {seconds / 60:.0f} minutes; "
        f"best epoch {best['epoch']}: {best['accuracy_fine']:.1%} fine and "
        f"{best['accuracy_coarse']:.1%} coarse on the val images."
    )


if __name__ == "__main__":
    main()
