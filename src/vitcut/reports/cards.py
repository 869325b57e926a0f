"""Model cards: what a model is, how it was made, and what was measured of it."""

from pathlib import Path

from vitcut.benchmark.evaluation import Evaluation
from vitcut.compact.card import IMAGENET_TERMS, Origin, model_card
from vitcut.compact.info import ModelInfo
from vitcut.errors import plain_markdown
from vitcut.images.load import Images
from vitcut.model.model import Model
from vitcut.names import SHIPPED_MODEL
from vitcut.reports.tables import headline, point_table, to_markdown
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

_TINY_IMAGENET = {"Tiny ImageNet", "tiny-imagenet-200.zip", "tiny-imagenet-200"}
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


def compact_card(results: Results, point: Point, info: ModelInfo, origin: Origin) -> str:
    """The card of a cut model, with the table that it was measured in."""
    if point.max_abs_diff is None:
        made = f"{_kept(point)} Then repaired: fine-tuned by distillation from the dense model. "
        made += _NO_LONGER
    else:
        made = f"{_kept(point)} Its logits differ from the masked original's by at most "
        made += f"{point.max_abs_diff:.2g}."
    return _card(results, point, made, info, origin, shown=(point,))


def repaired_card(
    results: Results,
    info: ModelInfo,
    origin: Origin,
    *,
    result: TrainResult,
    config: FinetuneSettings,
) -> str:
    """The card of a repaired model, the last point, beside the dense one repaired likewise."""
    point = results.points[-1]
    made = f"""{_kept(point)}

Then repaired: fine-tuned by {_recipe(result, config)}.
{_NO_LONGER}"""
    others = tuple(item for item in results.points if item.name == DENSE_REPAIRED)
    return _card(results, point, made, info, origin, shown=(*others, point))


def write_cards(results: Results, run: Path, info: ModelInfo, origin: Origin) -> None:
    """Write the model card of every point that has a model."""
    for point in results.points:
        if point.model is not None:
            card = compact_card(results, point, info, origin)
            write_text(run / point.model / "README.md", card)


def origin_of(model: Model, images: Images) -> Origin:
    """What is known of a dense model and of the pictures that it was cut with."""
    source = images.origin["source"]
    name = "Tiny ImageNet" if source is None else Path(str(source)).name
    terms = IMAGENET_TERMS if name in _TINY_IMAGENET else None
    is_id = source is not None and str(source).count("/") == 1 and not Path(str(source)).exists()
    if source == "drawn":
        name, terms = "pictures that vitcut drew", "none needed"
    return Origin(
        model=model.public_name or "a model that vitcut trained",
        license=IMAGENET_TERMS if model.name == SHIPPED_MODEL else model.license,
        base_model=model.hub_id,
        pictures=str(source) if is_id else name,
        pictures_license=terms,
        dataset=str(source) if is_id else None,
    )


def _recipe(result: TrainResult, config: FinetuneSettings) -> str:
    return f"""distillation from the dense model, best of {result.epochs_run} epochs
(epoch {result.best_epoch}), learning rate {config.learning_rate:g}, loss {config.coarse_weight:g}
KL on the groups + {config.fine_weight:g} KL on the classes + {config.label_weight:g} cross-entropy
with the labels, {config.augmentation} augmentation, seed {config.seed}"""


def _kept(point: Point) -> str:
    if point.edges_kept is None:
        return "Cut by vitcut."
    heads = f"{point.heads_kept} of {point.heads_total} heads"
    kept = f"{point.edges_kept} of {point.edges_total} edges and {heads}"
    if point.granularity == "part" and point.neurons_kept_fraction is not None:
        kept = f"{heads} (in any token kind) and {point.neurons_kept_fraction:.1%} of the neurons"
    if point.positions_kept_fraction not in {None, 1.0}:
        kept = f"{point.positions_kept_fraction:.1%} of the positions, {kept}"
    return f"Cut by vitcut: {kept} are kept, {point.ablation} ablation stands in for the rest."


def _card(
    results: Results,
    point: Point,
    made: str,
    info: ModelInfo,
    origin: Origin,
    *,
    shown: tuple[Point, ...],
) -> str:
    names = {item.name for item in shown}
    chosen = Results(
        task=results.task,
        machine=results.machine,
        dense=results.dense,
        points=shown,
        comparisons=tuple(c for c in results.comparisons if c.point in names),
    )
    task, name = plain_markdown(repr(results.task)), plain_markdown(point.name)
    verdict = headline(results, point).removeprefix(f"{point.name}:").strip()
    measured = f"""{to_markdown(point_table(chosen))}
{_conditions(results, point)}

Speed-ups are against the dense model in the same runtime, with their 95 % interval; in brackets,
one that is not shown to differ from 1. Differences in accuracy are against the dense model on the
same pictures, with their 95 % interval."""
    return model_card(
        info,
        title=f"{name}: a Vision Transformer cut for the task {task}",
        verdict=verdict and f"Beside the dense model: {plain_markdown(verdict)}.",
        made=made,
        measured=measured,
        origin=origin,
    )


def _conditions(results: Results, point: Point) -> str:
    """What the numbers depend on: the machine, its state, versions and the day."""
    machine, threads = results.machine, point.latency[0].threads if point.latency else 1
    flags = " ".join(machine.get("cpu_flags", ()))
    versions = [
        f"{name} {number}" for name, number in machine.get("versions", {}).items() if number
    ]
    told = [
        f"{point.images} test images",
        f"float32, {threads} thread(s) of {machine['cpu']}" + (f" ({flags})" if flags else ""),
        f"{machine.get('usable_cores', '?')} of {machine.get('cores', '?')} cores allowed",
        f"load {machine.get('load_1min', '?')}",
        f"GPU {machine.get('gpu') or 'none'}",
        str(machine.get("system", "")),
        ", ".join([f"Python {machine.get('python', '?')}", *versions]),
        f"measured on {machine['date']}" if "date" in machine else "",
    ]
    return plain_markdown("; ".join(part for part in told if part) + ".")
