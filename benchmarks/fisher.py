"""Make docs/benchmarks/fisher again: Fisher scores of the shipped model against exact ones.

    OMP_NUM_THREADS=1 uv run --with matplotlib python benchmarks/fisher.py \
        --source tiny-imagenet-200.zip

Every head of every token kind, and neurons and edges drawn at random among those that can reach
the classifier, are cut alone and measured in float64 (`exact`); Fisher scores them all at once.
"""

import argparse
import csv
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from part_scores import PartScores, exact_edges, exact_heads, exact_neurons, fisher_scores

import vitcut
from vitcut.discovery.search import make_examples
from vitcut.discovery.settings import DiscoverSettings
from vitcut.graph import Graph
from vitcut.images.load import Images, normalise
from vitcut.masked.masking import full_run
from vitcut.masked.oracle import Examples, Oracle
from vitcut.metrics import coarse_log_probs
from vitcut.model.weights import ViTWeights
from vitcut.names import Ablation
from vitcut.runtime import describe_machine

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "fisher"
IMAGES, NEURONS, EDGES = 116, 96, 120
ABLATIONS: tuple[Ablation, ...] = ("mean", "resample")
KINDS = ("heads", "neurons", "edges")

Row = tuple[str, str, str, float, float]
"""Ablation, kind, name, Fisher score, exact score."""


def main() -> None:
    """Score, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="The Tiny ImageNet archive or folder.")
    parser.add_argument("--only-times", action="store_true", help="Keep the scores that are there.")
    arguments = parser.parse_args()
    model = vitcut.load_model("animals")
    images = vitcut.load_images(arguments.source, task="animals", model=model)
    model = model.for_task(images.task, images.labels)
    examples = examples_of(images)
    PAGE.mkdir(parents=True, exist_ok=True)
    if not arguments.only_times:
        found = [
            row for ablation in ABLATIONS for row in compare(model.weights, examples, ablation)
        ]
        with (PAGE / "scores.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["ablation", "kind", "part", "fisher", "exact"])
            writer.writerows(found)
    with (PAGE / "scores.csv").open(newline="", encoding="utf-8") as stream:
        _, *lines = csv.reader(stream)
    rows = [
        (ablation, kind, name, float(fisher), float(exact))
        for ablation, kind, name, fisher, exact in lines
    ]
    draw(rows, PAGE / "scatter.svg")
    times = timings(model.weights, examples)
    (PAGE / "README.md").write_text(page(rows, times), encoding="utf-8")


def examples_of(images: Images) -> Examples:
    """The pairs that `vitcut discover` would search on."""
    settings = DiscoverSettings(images=IMAGES)
    chosen = images.calibration(settings.images, seed=settings.seed)
    groups = images.task.group_of_class
    pixels = normalise(chosen.all(), images.preprocessing)
    return make_examples(pixels, groups[chosen.labels], torch.from_numpy(groups), settings)


def compare(weights: ViTWeights, examples: Examples, ablation: Ablation) -> list[Row]:
    """Fisher and exact scores of the same parts."""
    weights = weights.to(torch.float64)
    oracle = Oracle(weights, examples, ablation, tokens="split")
    graph = oracle.graph
    fisher = fisher_scores(weights, examples, ablation, tokens="split", edges=True)
    random = np.random.default_rng(0)
    heads, mlps = graph.by_block(graph.find_live(graph.edges)[1])
    neurons = np.broadcast_to(mlps[:, :, None], fisher.neurons.shape)
    masks = {
        "heads": heads,
        "neurons": drawn(neurons, NEURONS, random),
        "edges": drawn(graph.useful_edges, EDGES, random),
    }
    exact = PartScores(
        heads=exact_heads(oracle, masks["heads"]),
        neurons=exact_neurons(oracle, masks["neurons"]),
        edges=exact_edges(oracle, masks["edges"]),
    )
    rows: list[Row] = []
    for kind, mask in masks.items():
        for place in np.argwhere(mask):
            index = tuple(place)
            predicted, measured = (float(getattr(x, kind)[index]) for x in (fisher, exact))
            rows.append((ablation, kind, name_of(kind, place, graph), predicted, measured))
    return rows


def drawn(mask: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """So many of the marked places."""
    found = np.zeros_like(mask)
    places = np.flatnonzero(mask)
    found.flat[random.choice(places, count, replace=False)] = True
    return found


def name_of(kind: str, place: np.ndarray, graph: Graph) -> str:
    """A part's name."""
    first, second, *third = (int(number) for number in place)
    if kind == "heads":
        return graph.sources[graph.head_source(first, second, third[0])].name
    if kind == "neurons":
        return f"{graph.sources[graph.mlp_source(first, second)].name}.{third[0]}"
    return f"{graph.sources[first].name} -> {graph.targets[second].name}"


def timings(weights: ViTWeights, examples: Examples) -> dict[str, float]:
    """Seconds of one forward pass with C backward passes, and of the scores; medians of three."""
    weights = weights.to(torch.float32)

    def passes() -> None:
        for pixels in examples.pixels.split(16):
            leaf = pixels.clone().requires_grad_()
            logits = full_run(weights, leaf).logits
            log_probs = coarse_log_probs(logits, examples.group_of_class, examples.num_groups)
            for y in range(examples.num_groups):
                torch.autograd.grad(log_probs[:, y].sum(), leaf, retain_graph=True)

    def scores(*, edges: bool) -> None:
        fisher_scores(weights, examples, "mean", edges=edges)

    jobs = {
        "passes": passes,
        "heads and neurons": lambda: scores(edges=False),
        "with edges": lambda: scores(edges=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(3):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def ranks(values: np.ndarray) -> np.ndarray:
    """Positions in ascending order; there are no ties in float64."""
    return np.argsort(np.argsort(values))


def statistics(rows: list[Row], ablation: str, kind: str) -> tuple[int, float, float, float, float]:
    """How many parts, Spearman correlation, and median, p10 and p90 of predicted / exact."""
    pairs = np.array([row[3:] for row in rows if row[:2] == (ablation, kind)])
    spearman = float(np.corrcoef(ranks(pairs[:, 0]), ranks(pairs[:, 1]))[0, 1])
    ratios = pairs[:, 0] / pairs[:, 1]
    low, median, high = np.percentile(ratios, (10, 50, 90))
    return len(pairs), spearman, float(median), float(low), float(high)


def draw(rows: list[Row], path: Path) -> None:
    """Exact against predicted, one panel per ablation and kind."""
    mpl.rcParams["svg.hashsalt"] = "vitcut"
    figure, panels = plt.subplots(2, 3, figsize=(10, 6.6), sharex="col", sharey="col")
    for line, ablation in zip(panels, ABLATIONS, strict=True):
        for panel, kind in zip(line, KINDS, strict=True):
            pairs = np.array([row[3:] for row in rows if row[:2] == (ablation, kind)])
            ends = [pairs[pairs > 0].min(), pairs.max()]
            panel.plot(ends, ends, color="#888888", linewidth=1)
            panel.scatter(pairs[:, 1], pairs[:, 0], s=9, color="#0072b2", alpha=0.7)
            panel.set(xscale="log", yscale="log", title=f"{kind}, {ablation}")
            panel.set(xlabel="exact KL, nats", ylabel="Fisher score, nats")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def page(rows: list[Row], times: dict[str, float]) -> str:
    """The page's text."""
    lines = []
    for ablation in ABLATIONS:
        for kind in KINDS:
            count, spearman, median, low, high = statistics(rows, ablation, kind)
            lines.append(
                f"| {ablation} | {kind} | {count} | {spearman:.4f} | {median:.3f} "
                f"({low:.2f} to {high:.2f}) |"
            )
    table = "\n".join(lines)
    machine, passes = describe_machine(), times["passes"]
    return f"""# Fisher scores against exact ones

    OMP_NUM_THREADS=1 uv run --with matplotlib python benchmarks/fisher.py \\
        --source tiny-imagenet-200.zip

The shipped model (`--model animals`), {IMAGES} training images, parts per token kind, float64.
Each part is cut alone and the mean KL(full || cut) on the task distribution is measured (*exact*); the
Fisher scores of all parts come from one forward and six backward passes per image. All heads that
can reach the classifier, and neurons and edges drawn at random among those that can. Raw:
[scores.csv](scores.csv).

| ablation | parts | number | Spearman | predicted / exact: median (p10 to p90) |
| --- | --- | ---: | ---: | ---: |
{table}

![scatter](scatter.svg)

## Time

One forward pass and one backward pass per coarse class, to the pixels, takes {passes:.2f} s for
these images; the scores of all heads and neurons take {times["heads and neurons"] / passes:.2f} times as
long, with all 7,201 edges {times["with edges"] / passes:.2f} times (float32, mean ablation, means
included; {machine["cpu"]}, {torch.get_num_threads()} thread, medians of three, load
{machine["load_1min"]}).
"""


if __name__ == "__main__":
    main()
