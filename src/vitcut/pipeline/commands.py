"""The verbs of the command line that work on run directories; `run` and `demo` stand in ``run``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitcut.benchmark.settings import BenchConfig
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutConfig
from vitcut.config import as_plain
from vitcut.data.images import load_images
from vitcut.data.settings import DataConfig
from vitcut.discovery.settings import DiscoverConfig
from vitcut.errors import ArtefactError, ConfigError
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.points import CIRCUIT_FILE, PointMaker, point_name
from vitcut.pipeline.run import require_whole_patches, save_results, train_dense
from vitcut.pipeline.stages import measure
from vitcut.pipeline.subject import ORIGIN_FILE, OWN_MODEL, Origin
from vitcut.progress import say
from vitcut.results import Point, Results
from vitcut.task import load_task
from vitcut.training.settings import TrainConfig
from vitcut.vits.settings import VitConfig


def resolve_origin(model: str, task: str | None, data: DataConfig) -> Origin:
    """What to work on; a run directory as model brings its own task and data along.

    Raises:
        TaskError: There is no such task.
        ConfigError: No task was given and the model does not bring one.
    """
    folder = Path(model)
    earlier = Origin.load(folder) if (folder / ORIGIN_FILE).exists() else None
    if earlier is None:
        if task is None:
            raise ConfigError(f"model {model!r} brings no task along: give --task")
        where = str(folder.resolve()) if folder.exists() else model
        return Origin(model=where, task=load_task(task), data=data)
    chosen = earlier.task if task is None else load_task(task)
    source = earlier.data.source if data.source is None else data.source
    return replace(earlier, task=chosen, data=replace(earlier.data, source=source))


def train_command(
    task: str, data: DataConfig, vit: VitConfig, config: TrainConfig, out: Path
) -> Path:
    """Train a dense model into ``out``; returns its folder."""
    loaded = load_task(task)
    folder = RunFolder(
        out,
        {"task": task, "data": as_plain(data), "vit": as_plain(vit), "train": as_plain(config)},
    )
    require_whole_patches(vit, data.image_size)
    images = load_images(data, loaded)
    folder.claim()
    Origin(model=OWN_MODEL, task=loaded, data=data).save(out)
    train_dense(images, vit, config, folder)
    return folder.dense


def discover_command(origin: Origin, config: DiscoverConfig, out: Path) -> Circuit:
    """Find one circuit into ``out/points/NAME``."""
    folder = RunFolder(out, {**_plain_origin(origin), "discover": as_plain(config)})
    name = point_name(config.method, config.ablation, config.tau)
    path = folder.point(name) / CIRCUIT_FILE
    if path.exists():
        say(f"{path} is there: nothing to do")
        return Circuit.load(path)
    subject = origin.load_subject()
    subject.images.calibration(config.images, seed=config.seed)
    folder.claim()
    origin.save(out)
    [(_, circuit)] = PointMaker(subject, folder, CutConfig()).find(config, [config.tau])
    return circuit


def find_circuit(path: Path, point: str | None) -> Path:
    """The circuit.json that a path means: itself, or the one of a run directory's point.

    Raises:
        ArtefactError: There is none, or several and ``point`` does not choose.
    """
    if path.is_file():
        return path
    found = {item.parent.name: item for item in sorted(path.glob(f"points/*/{CIRCUIT_FILE}"))}
    if not found:
        raise ArtefactError(
            f"no circuit at {path}: expected a circuit.json, or a run directory with points"
        )
    if point is None and len(found) > 1:
        raise ArtefactError(f"{path} has {len(found)} points: choose --point {', '.join(found)}")
    name = next(iter(found)) if point is None else point
    if name not in found:
        raise ArtefactError(f"{path} has no point {name!r}: it has {', '.join(found)}")
    return found[name]


def find_origin(path: Path) -> Origin | None:
    """The origin of the nearest run directory around a path; None if it is in none."""
    for folder in (path, *path.resolve().parents):
        if (folder / ORIGIN_FILE).exists():
            return Origin.load(folder)
    return None


def cut_command(
    circuit: Circuit, origin: Origin, config: CutConfig, bench: BenchConfig, out: Path
) -> Results:
    """Compile one circuit into ``out/model`` and measure it beside the dense model."""
    settings = {"circuit": circuit.fingerprint, "cut": as_plain(config), "bench": as_plain(bench)}
    folder = RunFolder(out, {**_plain_origin(origin), **settings})
    if folder.results.exists():
        say(f"{out} is complete: nothing to do")
        return Results.load(folder.results)
    subject = origin.load_subject()
    folder.claim()
    origin.save(out)
    maker = PointMaker(subject, folder, config)
    name = point_name(circuit.method, circuit.ablation, circuit.tau)
    points = {name: maker.cut(name, circuit, into=out)}
    results = measure(subject, points, bench)
    save_results(results, out)
    return results


def bench_command(path: Path, config: BenchConfig, out: Path) -> Results:
    """Measure the dense model and every cut model of a run directory again.

    Raises:
        ArtefactError: The directory holds no measured run.
    """
    origin = Origin.load(path)
    earlier = Results.load(path / "results.json")
    folder = RunFolder(out, {"run": str(path.resolve()), "bench": as_plain(config)})
    points: dict[str, tuple[Point, nn.Module]] = {
        point.name: (point, CompactViT.from_pretrained(path / point.model))
        for point in earlier.points
        if point.model is not None
    }
    subject = origin.load_subject()
    folder.claim()
    results = measure(subject, points, config)
    results.save(folder.results)
    return results


def _plain_origin(origin: Origin) -> dict[str, Any]:
    return {"model": origin.model, "task": origin.task.name, "data": as_plain(origin.data)}
