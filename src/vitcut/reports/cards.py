"""Model cards: what a model is, how it was made, and what was measured of it."""

from collections import Counter
from pathlib import Path

from vitcut.benchmark.evaluation import Evaluation
from vitcut.reports.tables import plain_markdown, point_table, to_markdown
from vitcut.results import DENSE_REPAIRED, Point, Results
from vitcut.store import write_text
from vitcut.task import Task
from vitcut.training.checkpoint import TrainResult
from vitcut.training.settings import FinetuneSettings, TrainSettings
from vitcut.training.transfer import Probe

_LICENCE_NOTE = (
    "The weights inherit the terms of the pictures that they were trained on; for ImageNet's "
    "these allow non-commercial research."
)

_NO_LONGER = "It no longer computes the masked original; `circuit.json` says what was cut."


def dense_card(task: Task, result: TrainResult, config: TrainSettings) -> str:
    """The card of a trained dense model."""
    groups = "\n".join(
        plain_markdown(
            f"- {group}: {', '.join(item.name for item in task.classes if item.group == group)}"
        )
        for group in task.groups
    )
    fine = ""
    if result.accuracy_fine is not None:
        fine = f"{result.accuracy_fine:.1%} over the {len(task.classes)} classes and "
    return f"""# A small Vision Transformer for the task {plain_markdown(repr(task.name))}

Trained by vitcut: {config.augmentation} augmentation, best of {result.epochs_run} epochs (epoch
{result.best_epoch}), seed {config.seed}. On val images, which chose the epoch, it reaches
{fine}{result.accuracy_coarse:.1%}
over the {len(task.groups)} groups.

    import timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

## Groups

{groups}

## Terms

{_LICENCE_NOTE}
"""


def transferred_card(task: Task, start: str, result: TrainResult | Probe, found: Evaluation) -> str:
    """The card of a pretrained model that was given the classes of a task."""
    origin = plain_markdown(repr(start))
    if isinstance(result, Probe):
        made = f"""Only its classifier is new: logistic regression on the features of {origin},
with an L2 penalty of {result.penalty:g}"""
    else:
        made = f"""Fine-tuned by vitcut from {origin}, with a new classifier: best of
{result.epochs_run} epochs (epoch {result.best_epoch})"""
    return f"""# A Vision Transformer for the task {plain_markdown(repr(task.name))}

{made}, which val images chose ({result.accuracy_fine:.1%} over the
{len(task.classes)} classes, {result.accuracy_coarse:.1%} over the {len(task.groups)} groups).

On {found.images} test images, it reaches {found.accuracy_fine:.1%} over the classes and
{found.accuracy_coarse:.1%} over the groups.

## Terms

The weights inherit the terms of {origin} and those of the pictures.
"""


def dense_repaired_card(task: Task, result: TrainResult, config: FinetuneSettings) -> str:
    """The card of a dense model that got a cut model's repair."""
    return f"""# A Vision Transformer for the task {plain_markdown(repr(task.name))}, fine-tuned

Fine-tuned by vitcut: {_recipe(result, config)}. On the val images, which chose the epoch, it
reaches {result.accuracy_coarse:.1%} over the {len(task.groups)} groups. Cut models that were
repaired in the same way are compared with it.

## Terms

{_LICENCE_NOTE}
"""


def compact_card(results: Results, point: Point, task: Task) -> str:
    """The card of a cut model, with the table that it was measured in."""
    if point.max_abs_diff is None:
        made = f"""{_kept(point)}

Then repaired: fine-tuned by distillation from the dense model. {_NO_LONGER}"""
    else:
        made = f"""{_kept(point)} Its logits
differ from the masked original's by at most {point.max_abs_diff:.2g}."""
    return _card(results, point, made, task, shown=(point,))


def repaired_card(
    results: Results, point: Point, task: Task, result: TrainResult, config: FinetuneSettings
) -> str:
    """The card of a repaired model, beside the dense one that got the same repair."""
    made = f"""{_kept(point)}

Then repaired: fine-tuned by {_recipe(result, config)}.
{_NO_LONGER}"""
    others = tuple(item for item in results.points if item.name == DENSE_REPAIRED)
    return _card(results, point, made, task, shown=(*others, point))


def _recipe(result: TrainResult, config: FinetuneSettings) -> str:
    return f"""distillation from the dense model, best of {result.epochs_run} epochs
(epoch {result.best_epoch}), learning rate {config.learning_rate:g}, loss {config.coarse_weight:g}
KL on the groups + {config.fine_weight:g} KL on the classes + {config.label_weight:g} cross-entropy
with the labels, {config.augmentation} augmentation, seed {config.seed}"""


def _kept(point: Point) -> str:
    if point.edges_kept is None:
        return "Cut by vitcut."
    heads = f"{point.heads_kept} of\n{point.heads_total} heads"
    kept = f"{point.edges_kept} of {point.edges_total} edges and {heads}"
    if point.granularity == "part" and point.neurons_kept_fraction is not None:
        kept = f"{heads} (in any token kind) and {point.neurons_kept_fraction:.1%} of the neurons"
    return f"""Cut by vitcut: {kept} are kept, {point.ablation} ablation stands in
for the rest."""


def _card(
    results: Results, point: Point, made: str, task: Task, *, shown: tuple[Point, ...]
) -> str:
    sizes = Counter(item.group for item in task.classes)
    groups = plain_markdown(", ".join(f"{group} ({sizes[group]})" for group in task.groups))
    names = {item.name for item in shown}
    chosen = Results(
        task=results.task,
        machine=results.machine,
        dense=results.dense,
        points=shown,
        comparisons=tuple(c for c in results.comparisons if c.point in names),
    )
    cpu = plain_markdown(str(results.machine["cpu"]))
    name, title = plain_markdown(point.name), plain_markdown(repr(results.task))
    threads = point.latency[0].threads if point.latency else 1
    return f"""---
library_name: vitcut
tags: [vision-transformer, circuit, pruning]
---

# {name}: the circuit of a Vision Transformer for the task {title}

{made}

    from vitcut import CompactViT
    model = CompactViT.from_pretrained("FOLDER")

It tells {len(task.groups)} groups apart, by the summed probability of their classes. Classes per
group: {groups}.

## Measured

{to_markdown(point_table(chosen))}
float32, {threads} thread(s) of {cpu}, {point.images} test images.
Speed-ups are against the dense model in the same runtime, with their 95 % interval.

## Terms

{_LICENCE_NOTE}
"""


def write_cards(results: Results, run: Path, task: Task) -> None:
    """Write the model card of every point that has a model."""
    for point in results.points:
        if point.model is not None:
            write_text(run / point.model / "README.md", compact_card(results, point, task))
