"""One whole run: train, discover at each tau, cut, measure. A finished stage is never redone."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError
from vitcut.images.images import TaskImages, load_images
from vitcut.model.loading import DenseCard, load_model, save_dense
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.model.tracing import read_model
from vitcut.pipeline.budget import cut_to_budget, require_possible
from vitcut.pipeline.cards import dense_card
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.points import MODEL_FOLDER, PointMaker, save_results
from vitcut.pipeline.repair import repair_compact
from vitcut.pipeline.settings import RunSettings
from vitcut.pipeline.stages import CLASS_ONLY, class_only, measure
from vitcut.pipeline.stored import StoredCut
from vitcut.pipeline.subject import Origin, Subject
from vitcut.progress import say
from vitcut.results import Point, Results
from vitcut.settings import as_plain
from vitcut.task import load_task
from vitcut.training.loop import train
from vitcut.training.settings import IMAGENET_MEAN, IMAGENET_STD, TrainSettings


def run(config: RunSettings, out: Path) -> Results:
    """Train a dense model, find and cut its circuits at every tau, and measure all of them.

    Args:
        config: The settings of every stage.
        out: The run directory; an interrupted run of the same settings goes on where it was.

    Raises:
        VitcutError: Any stage's own error; the directory can be continued once it is mended.
    """
    task = load_task(config.task)
    folder = RunFolder(out, as_plain(config))
    if folder.results.exists():
        earlier = Origin.load(out)
        if task != (earlier.written or earlier.task):
            raise ArtefactError(f"{out} is of another label file: choose another --out")
        say(f"{out} is complete: nothing to do")
        return Results.load(folder.results)
    config.vit.require_whole_patches(config.data.image_size)
    images = load_images(config.data, task)
    # What does not fit the images is refused before the folder is claimed and a model trained.
    images.calibration(config.discover.images, seed=config.discover.seed)
    untrained = read_model(_untrained(images, config.vit, config.train))
    require_possible(untrained, config.select, config.cut)
    Origin.own(images, config.data, task).claim(folder)
    train_dense(images, config.vit, config.train, folder)
    subject = Subject.of(load_model(str(folder.dense)), images)
    maker = PointMaker(subject, folder, config.cut)
    circuits: dict[str, Circuit] = {}
    for ablation in config.ablations:
        circuits |= maker.find(replace(config.discover, ablation=ablation), config.taus)
    points = {name: maker.cut(name, circuit) for name, circuit in circuits.items()}
    points = {CLASS_ONLY: class_only(subject), **points, **_budget_points(config, subject, folder)}
    results = measure(subject, points, config.bench)
    save_results(results, folder.path)
    return results


def _budget_points(
    config: RunSettings, subject: Subject, folder: RunFolder
) -> dict[str, tuple[Point, nn.Module]]:
    """The point that is cut to a budget, and its repair."""
    if not config.select.has_budget:
        return {}
    linear = replace(config.cut, ablation="linear", merge=False)
    point, model = cut_to_budget(
        subject, folder, config.select, linear, threads=config.bench.threads
    )
    points: dict[str, tuple[Point, nn.Module]] = {point.name: (point, model)}
    if config.repair is not None:
        stored = StoredCut.load(folder.point(point.name) / MODEL_FOLDER)
        into = folder.point(f"{point.name}-repaired")
        known = replace(stored, point=point)
        after, repaired, _ = repair_compact(subject, known, config.repair, into, base=folder.path)
        points[after.name] = after, repaired
    return points


def train_dense(
    images: TaskImages,
    vit: VitSettings,
    config: TrainSettings,
    folder: RunFolder,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> None:
    """Train a ViT on a task and save it into the run directory, unless it is there."""
    if folder.dense.exists():
        return
    task = images.task
    model = _untrained(images, vit, config)
    result = train(model, images, config, folder.path, mean=mean, std=std)
    card = DenseCard(
        task_name=task.name,
        class_ids=task.class_ids,
        class_names=task.class_names,
        group_names=task.groups,
        image_size=images.image_size,
        mean=mean,
        std=std,
        framing=images.framing,
        text=dense_card(task, result, config),
    )
    save_dense(model, folder.dense, card=card)


def _untrained(images: TaskImages, vit: VitSettings, config: TrainSettings) -> nn.Module:
    return build_reference(
        vit, num_classes=len(images.task.classes), image_size=images.image_size, seed=config.seed
    )
