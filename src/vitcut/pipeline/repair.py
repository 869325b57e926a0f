"""Repair: fine-tune a compact model, give the dense one the same, and tell what came of it.

The training itself is left to `training`, finding the compact model to `stored`.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitcut.benchmark.bootstrap import paired_interval
from vitcut.benchmark.evaluation import Evaluation
from vitcut.compact.artefact import CIRCUIT
from vitcut.compact.model import CompactViT
from vitcut.errors import ArtefactError
from vitcut.model.loading import DenseCard, load_model, save_dense
from vitcut.model.saving import require_savable
from vitcut.pipeline.cards import dense_repaired_card, repaired_card
from vitcut.pipeline.folder import RunFolder, differences
from vitcut.pipeline.points import MODEL_FOLDER
from vitcut.pipeline.settings import RepairSettings
from vitcut.pipeline.stages import (
    CLASS_ONLY,
    DENSE,
    DENSE_REPAIRED,
    class_only,
    dense_point,
    evaluate_points,
    measure,
)
from vitcut.pipeline.stored import StoredCut, require_cut_of, require_sight
from vitcut.pipeline.subject import Origin, Subject
from vitcut.progress import say
from vitcut.results import Point, Results
from vitcut.settings import as_plain
from vitcut.store import read_json, write_json, write_text
from vitcut.training import distillation
from vitcut.training.checkpoint import TrainResult, read_training
from vitcut.training.distillation import Distillation
from vitcut.training.loop import training_settings
from vitcut.training.settings import FinetuneSettings

REPAIR_FILE = "repair.json"
"""What the trainings came to, and the paired differences of accuracy."""
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AccuracyDifference:
    """How much more often a point is right than another, on the same images."""

    point: str
    against: str
    images: int
    difference: float
    """Coarse accuracy of `point` less that of `against`, as fractions of 1."""
    low: float
    """Lower end of the 95 % bootstrap interval of `difference`, images drawn in pairs."""
    high: float
    """Upper end of the same interval."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """The content of ``repair.json``."""

    training: TrainResult
    """Of the compact model; accuracies are on the val images."""
    dense_training: TrainResult | None
    """Of the dense model; None where it was not repaired."""
    paired: tuple[AccuracyDifference, ...]

    def save(self, path: Path) -> None:
        """Write it atomically."""
        write_json(path, {"format_version": _VERSION, **as_plain(self)})

    @classmethod
    def load(cls, path: Path) -> "Repair":
        """Read what `save` wrote.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        content = read_json(path, kind="repair", newest_version=_VERSION)
        try:
            dense = content["dense_training"]
            return cls(
                training=TrainResult(**content["training"]),
                dense_training=None if dense is None else TrainResult(**dense),
                paired=tuple(AccuracyDifference(**item) for item in content["paired"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"{path} is damaged: {error!r}; delete it and run again") from None


def repair(
    subject: Subject, model: nn.Module, config: FinetuneSettings, folder: Path
) -> TrainResult:
    """Train a model in place with the dense one as teacher; ``folder`` keeps checkpoints.

    Args:
        subject: The dense model, and images of its task.
        model: Compact or dense.
        config: The training.
        folder: As `train` takes it: rerun after a kill, the training goes on where it was.
    """
    mean, std = _mean_and_std(subject)
    return distillation.repair(
        model, subject.model.model, subject.images, config, folder, mean=mean, std=std
    )


def finetune_command(
    cut: StoredCut, origin: Origin, config: RepairSettings, out: Path
) -> tuple[Results, Repair]:
    """Repair a compact model into ``out/model``, and the dense one, and measure them.

    Args:
        cut: What is repaired.
        origin: Of the model that it was cut from, with task and images.
        config: The settings; an interrupted repair of the same goes on where it was.
        out: The run directory.

    Raises:
        ModelError: The compact model is of another dense model, or sees nothing of the image; the
            dense model is to be repaired and cannot be saved.
        TaskError: It is of another task.
        ArtefactError: ``out`` holds something else; the repaired dense model that was given is
            not there, or of other settings.
    """
    settings = {"run": str(cut.folder.resolve()), "start": cut.weight_hash}
    folder = RunFolder(out, {**settings, **origin.settings(), **as_plain(config)}, free=("run",))
    if folder.results.exists():
        say(f"{out} is complete: nothing to do")
        return Results.load(folder.results), Repair.load(out / REPAIR_FILE)
    require_sight(cut.model)
    if config.repaired_dense is not None:
        read_training(_dense_folder(Path(config.repaired_dense)))
    subject = origin.load_subject()
    require_cut_of(cut.model, subject)
    if config.repaired_dense is not None:
        _require_same_repair(subject, config.finetune, Path(config.repaired_dense))
    if config.repair_dense and config.repaired_dense is None:
        require_savable(subject.model.model)
    origin.loaded(subject).claim(folder)
    before = cut.point_from(out)
    points: dict[str, tuple[Point, nn.Module]] = {CLASS_ONLY: class_only(subject)}
    after, model, training = repair_compact(subject, cut, config.finetune, out, base=out)
    dense = _repaired_dense(subject, config, out)
    if dense is not None:
        points[DENSE_REPAIRED] = dense[:2]
    points |= {before.name: (before, cut.model), after.name: (after, model)}
    found = evaluate_points(subject, points)
    results = measure(subject, points, config.bench, evaluations=found)
    told = Repair(
        training=training,
        dense_training=None if dense is None else dense[2],
        paired=_paired(after.name, found, seed=config.bench.seed),
    )
    card = repaired_card(results, results.points[-1], training, config.finetune)
    write_text(out / MODEL_FOLDER / "README.md", card)
    told.save(out / REPAIR_FILE)
    results.save(folder.results)
    return results, told


def repair_compact(
    subject: Subject, cut: StoredCut, config: FinetuneSettings, into: Path, *, base: Path
) -> tuple[Point, CompactViT, TrainResult]:
    """Repair a compact model into ``into/model``.

    Args:
        subject: The dense model, and images of its task.
        cut: What is repaired.
        config: The training.
        into: Takes the training's files, too.
        base: The folder of the results; the point's paths are relative to it.
    """
    say(f"repairing {cut.folder}")
    model = deepcopy(cut.model)
    result = repair(subject, model, config, into)
    circuit, folder = cut.folder / CIRCUIT, into / MODEL_FOLDER
    if not folder.exists():
        model.save_pretrained(folder, circuit=circuit if circuit.is_file() else None)
    earlier = cut.point.seconds
    point = replace(
        cut.point,
        name=f"{cut.point.name}-repaired",
        # It no longer computes the masked model; what that was worth stands with the cut.
        max_abs_diff=None,
        faithfulness=None,
        seconds=None if earlier is None else round(earlier + result.seconds, 2),
        circuit=os.path.relpath(folder / CIRCUIT, base) if circuit.is_file() else None,
        model=os.path.relpath(folder, base),
    )
    return point, model, result


def _repaired_dense(
    subject: Subject, config: RepairSettings, out: Path
) -> tuple[Point, nn.Module, TrainResult] | None:
    """The dense model after the same repair: trained here, or taken from another run."""
    if not config.repair_dense:
        return None
    if config.repaired_dense is None:
        folder, point_model = out / DENSE_REPAIRED, f"{DENSE_REPAIRED}/dense"
        say("giving the dense model the same repair")
        model = deepcopy(subject.model.model)
        result = repair(subject, model, config.finetune, folder)
        if not (folder / "dense").exists():
            save_dense(model, folder / "dense", card=_dense_card(subject, result, config.finetune))
    else:
        folder = _dense_folder(Path(config.repaired_dense))
        point_model = os.path.relpath(folder / "dense", out)
        model = load_model(str(folder)).model
        _, result = read_training(folder)
    point = replace(
        dense_point(subject),
        name=DENSE_REPAIRED,
        seconds=round(result.seconds, 2),
        model=point_model,
    )
    return point, model, result


def _dense_folder(path: Path) -> Path:
    """A run directory of a repair means the dense model that it repaired."""
    return path / DENSE_REPAIRED if (path / DENSE_REPAIRED).is_dir() else path


def _require_same_repair(subject: Subject, config: FinetuneSettings, path: Path) -> None:
    loss = Distillation(subject.model.model, subject.group_of_class, config)
    mean, std = _mean_and_std(subject)
    wanted = training_settings(
        subject.model.model, subject.images, config, loss, mean=mean, std=std
    )
    earlier, _ = read_training(_dense_folder(path))
    for key, (was, now) in differences(earlier, wanted).items():
        raise ArtefactError(
            f"the dense model in {path} was repaired with other settings: {key} was {was!r}, now "
            f"{now!r}; give the same ones, or leave out --repaired-dense"
        )


def _mean_and_std(subject: Subject) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean: Any = subject.model.mean
    std: Any = subject.model.std
    return tuple(mean), tuple(std)


def _dense_card(subject: Subject, result: TrainResult, config: FinetuneSettings) -> DenseCard:
    task = subject.task
    return DenseCard(
        task_name=task.name,
        class_ids=task.class_ids,
        class_names=task.class_names,
        group_names=task.groups,
        image_size=subject.model.image_size,
        mean=subject.model.mean,
        std=subject.model.std,
        framing=subject.images.framing,
        text=dense_repaired_card(task, result, config),
    )


def _paired(
    name: str, found: Mapping[str, Evaluation], *, seed: int
) -> tuple[AccuracyDifference, ...]:
    """The repaired point against the dense model, before and after the same repair."""
    own = found[name].correct_coarse
    differences: list[AccuracyDifference] = []
    for against in (DENSE, DENSE_REPAIRED):
        if against in found:
            other = found[against].correct_coarse
            low, high = paired_interval(own, other, seed=seed)
            difference = float(own.mean() - other.mean())
            differences.append(
                AccuracyDifference(
                    point=name,
                    against=against,
                    images=len(own),
                    difference=difference,
                    low=low,
                    high=high,
                )
            )
    return tuple(differences)
