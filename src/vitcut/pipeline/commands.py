"""The verbs of the command line that work on run directories; `run` and `demo` stand in ``run``."""

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, ConfigError
from vitcut.images.images import load_images
from vitcut.images.settings import DataSettings
from vitcut.model.given import NOTHING, Given
from vitcut.model.loading import load_model
from vitcut.model.settings import VitSettings
from vitcut.names import SHIPPED_MODEL
from vitcut.pipeline.costs import cost_model
from vitcut.pipeline.folder import RunFolder, choose_point
from vitcut.pipeline.path import PATH_FOLDER
from vitcut.pipeline.points import (
    CIRCUIT_FILE,
    MODEL_FOLDER,
    PointMaker,
    point_name,
    save_results,
)
from vitcut.pipeline.run import train_dense
from vitcut.pipeline.stages import CLASS_ONLY, DENSE_REPAIRED, class_only, measure
from vitcut.pipeline.subject import ORIGIN_FILE, Origin
from vitcut.progress import say
from vitcut.results import Point, Results
from vitcut.settings import as_plain
from vitcut.task import load_task, shipped_tasks
from vitcut.training.settings import IMAGENET_MEAN, IMAGENET_STD, TrainSettings

_RESULTS = "results.json"


def resolve_origin(
    model: str | None,
    task: str | None,
    data: DataSettings,
    *,
    base: Origin | None = None,
    given: Given = NOTHING,
) -> Origin:
    """What to work on: what was typed, and for the rest what a run directory brings along.

    Args:
        model: A run directory takes the place of ``base``, any other model that of its model;
            None is the model of ``base``, or the shipped one where there is no base.
        task: None is the task of the base, or the shipped one of the shipped model's name.
        data: The source and its flags; no source is the one of the base.
        base: The origin of the run directory at hand.
        given: What was typed of the model besides; for the rest what the base says of its own.

    Raises:
        TaskError: There is no such task.
        ConfigError: No task was given and the model does not bring one.
    """
    run = None if model is None else Origin.of_run(model)
    if run is not None:
        base = run
    elif model is not None and base is not None:
        base = replace(base, model=_whereabouts(model), given=NOTHING)
    if base is None:
        return replace(_fresh_origin(model or SHIPPED_MODEL, task, data), given=given)
    kept = replace(base.data, skip_bad_images=base.data.skip_bad_images or data.skip_bad_images)
    return Origin(
        model=base.model,
        given=given.over(base.given),
        task=base.task if task is None else load_task(task),
        data=kept if data.source is None else replace(kept, source=data.source),
    )


def _fresh_origin(model: str, task: str | None, data: DataSettings) -> Origin:
    if task is None and model not in shipped_tasks():
        raise ConfigError(f"model {model!r} brings no task along: give --task")
    return Origin(model=_whereabouts(model), task=load_task(task or model), data=data)


def _whereabouts(model: str) -> str:
    """A path as model is kept absolute: a run directory is read from other places too."""
    shipped = model == SHIPPED_MODEL
    return str(Path(model).resolve()) if Path(model).exists() and not shipped else model


def train_command(
    task: str,
    data: DataSettings,
    vit: VitSettings,
    config: TrainSettings,
    out: Path,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Path:
    """Train a dense model into ``out``; returns its folder."""
    loaded = load_task(task)
    recipe = {**as_plain(config), "mean": list(mean), "std": list(std)}
    folder = RunFolder(
        out, {"task": task, "data": as_plain(data), "vit": as_plain(vit), "train": recipe}
    )
    vit.require_whole_patches(data.image_size)
    images = load_images(data, loaded)
    Origin.own(images, data, loaded).claim(folder)
    train_dense(images, vit, config, folder, mean=mean, std=std)
    return folder.dense


def discover_command(origin: Origin, config: DiscoverSettings, out: Path) -> Circuit:
    """Find one circuit into ``out/points/NAME``."""
    settings = {**origin.settings(), "discover": as_plain(config)}
    # Every tau and ablation has a point of its own, so one directory may hold several.
    folder = RunFolder(out, settings, free=("discover.tau", "discover.ablation"))
    name = point_name(config.method, config.ablation, config.tau)
    path = folder.point(name) / CIRCUIT_FILE
    subject = origin.load_subject()
    subject.images.calibration(config.images, seed=config.seed)
    origin.loaded(subject).claim(folder)
    if path.exists():
        say(f"{path} is there: nothing to do")
    [(_, circuit)] = PointMaker(subject, folder, CutSettings()).find(config, [config.tau])
    return circuit


def find_circuit(path: Path, point: str | None) -> Path:
    """The circuit.json that a path means: itself, or that of a run directory's point or model.

    Raises:
        ArtefactError: There is none, or several and ``point`` does not choose.
    """
    if path.is_file():
        return path
    # Those on the way to a budget are found by name only.
    folders = ("points",) if point is None else ("points", PATH_FOLDER)
    found = {
        item.parent.name: item
        for folder in folders
        for item in sorted(path.glob(f"{folder}/*/{CIRCUIT_FILE}"))
    }
    own = path / MODEL_FOLDER / CIRCUIT_FILE
    if point is None and not found and own.exists():
        return own
    if not found:
        raise ArtefactError(
            f"no circuit at {path}: expected a circuit.json, or a run directory with points"
        )
    return choose_point(found, point, path)


def find_origin(path: Path) -> Origin | None:
    """The origin of the nearest run directory around a path; None if it is in none."""
    for folder in (path, *path.resolve().parents):
        if (folder / ORIGIN_FILE).exists():
            return Origin.load(folder)
    return None


def cut_command(
    circuit: Circuit, origin: Origin, config: CutSettings, bench: BenchSettings, out: Path
) -> Results:
    """Compile one circuit into ``out/model`` and measure it beside the dense model."""
    config = replace(config, ablation=config.ablation_for(circuit.ablation))
    settings = {"circuit": circuit.fingerprint, "cut": as_plain(config), "bench": as_plain(bench)}
    costs = {"costs": cost_model(config.batch).fingerprint}
    folder = RunFolder(out, {**origin.settings(), **settings, **costs})
    if folder.results.exists():
        say(f"{out} is complete: nothing to do")
        return Results.load(folder.results)
    subject = origin.load_subject()
    origin.loaded(subject).claim(folder)
    name = point_name(circuit.method, circuit.discovered_under, circuit.tau)
    point = PointMaker(subject, folder, config).cut(name, circuit, into=out)
    baseline = class_only(subject, batch=config.batch)
    results = measure(subject, {CLASS_ONLY: baseline, name: point}, bench)
    save_results(results, out)
    return results


def bench_command(path: Path, config: BenchSettings, out: Path) -> Results:
    """Measure the dense model and every cut model of a run directory again.

    Raises:
        ArtefactError: The directory holds no measured run.
    """
    _require_measured(path)
    origin = Origin.load(path)
    earlier = Results.load(path / _RESULTS)
    folder = RunFolder(out, {"run": str(path.resolve()), "bench": as_plain(config)})
    subject = origin.load_subject()
    points: dict[str, tuple[Point, nn.Module]] = {CLASS_ONLY: class_only(subject)}
    for point in earlier.points:
        if point.model is not None:
            points[point.name] = _moved(point, path, out), _load_point(point, path)
    origin.loaded(subject).claim(folder)
    results = measure(subject, points, config)
    results.save(folder.results)
    return results


def _require_measured(path: Path) -> None:
    def is_measured(folder: Path) -> bool:
        return (folder / _RESULTS).is_file() and (folder / ORIGIN_FILE).is_file()

    if is_measured(path):
        return
    remedy = "expected the run directory of a finished `vitcut run`, `cut` or `finetune`"
    around = next(filter(is_measured, path.resolve().parents), None)
    if around is not None:
        remedy = f"give the run directory that it lies in, {around}"
    elif next(path.glob(f"points/*/{CIRCUIT_FILE}"), None) is not None:
        remedy = f"a circuit is measured when it is cut: vitcut cut {path}"
    raise ArtefactError(f"nothing was measured in {path}: {remedy}")


def _moved(point: Point, path: Path, out: Path) -> Point:
    """A point of one run directory as one of another."""
    model, circuit = (
        None if item is None else os.path.relpath(path / item, out)
        for item in (point.model, point.circuit)
    )
    return replace(point, model=model, circuit=circuit)


def _load_point(point: Point, path: Path) -> nn.Module:
    if point.name == DENSE_REPAIRED:
        return load_model(str(path / str(point.model))).model
    return CompactViT.from_pretrained(path / str(point.model))
