"""Model cards: what a model is, how it was made, and what was measured of it."""

from vitcut.benchmark.tables import point_table, to_markdown
from vitcut.results import Point, Results
from vitcut.task import Task
from vitcut.training.loop import TrainResult
from vitcut.training.settings import TrainConfig

_LICENCE_NOTE = (
    "The weights inherit the terms of the pictures that they were trained on; for ImageNet's "
    "these allow non-commercial research."
)


def dense_card(task: Task, result: TrainResult, config: TrainConfig) -> str:
    """The card of a trained dense model."""
    groups = "\n".join(
        f"- {group}: {', '.join(item.name for item in task.classes if item.group == group)}"
        for group in task.groups
    )
    return f"""# A small Vision Transformer for the task {task.name!r}

Trained by vitcut: {config.augmentation} augmentation, best of {result.epochs_run} epochs (epoch
{result.best_epoch}), seed {config.seed}. On the tuning images, which chose the epoch, it reaches
{result.accuracy_fine:.1%} over the {len(task.classes)} classes and {result.accuracy_coarse:.1%}
over the {len(task.groups)} groups.

    import timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

## Groups

{groups}

## Terms

{_LICENCE_NOTE}
"""


def compact_card(results: Results, point: Point) -> str:
    """The card of a cut model, with the table that it was measured in."""
    chosen = Results(
        task=results.task,
        machine=results.machine,
        dense=results.dense,
        points=(point,),
        comparisons=tuple(c for c in results.comparisons if c.point == point.name),
    )
    threads = point.latency[0].threads if point.latency else 1
    return f"""---
library_name: vitcut
tags: [vision-transformer, circuit, pruning]
---

# {point.name}: the circuit of a Vision Transformer for the task {results.task!r}

Cut by vitcut: {point.edges_kept} of {point.edges_total} edges and {point.heads_kept} of
{point.heads_total} heads are kept, {point.ablation} ablation stands in for the rest. Its logits
differ from the masked original's by at most {point.max_abs_diff:.2g}.

    from vitcut import CompactViT
    model = CompactViT.from_pretrained("FOLDER")

## Measured

{to_markdown(point_table(chosen))}
float32, {threads} thread(s) of {results.machine["cpu"]}, {point.images} validation images.
Speed-ups are against the dense model in the same runtime, with their 95 % interval.

## Terms

{_LICENCE_NOTE}
"""
