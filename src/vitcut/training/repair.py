"""Repair: fine-tune a compact model, give the dense one the same, and compare them in pairs."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from vitcut import store
from vitcut.benchmark.evaluation import Evaluation, compare
from vitcut.compact.model import CompactViT
from vitcut.compiler.cut import Cut
from vitcut.errors import ArtefactError, ModelError, TaskError
from vitcut.images.load import Images
from vitcut.model.model import Model
from vitcut.progress import say
from vitcut.results import DENSE, DENSE_REPAIRED, AccuracyDifference, Results
from vitcut.runs import differences
from vitcut.training.checkpoint import TrainResult, read_training
from vitcut.training.distillation import Distillation, repair
from vitcut.training.loop import training_settings
from vitcut.training.settings import FinetuneSettings

_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What the trainings of a repair came to; the content of ``repair.json``."""

    training: TrainResult
    """Of the compact model; accuracies are on val images."""
    dense_training: TrainResult | None
    """Of the dense model; None where it was not repaired."""
    paired: tuple[AccuracyDifference, ...]

    def save(self, path: Path) -> None:
        """Write it atomically."""
        store.save(path, self, version=_VERSION)

    @classmethod
    def load(cls, path: Path) -> "Repair":
        """Read what `save` wrote.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        return store.load(path, cls, kind="repair", version=_VERSION)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Repaired:
    """A repaired compact model, and what came of it."""

    cut: Cut
    """The compact model with its new weights."""
    dense: Model | None
    """The dense model after the same repair; None where that was not wanted."""
    repair: Repair
    results: Results | None
    """What was measured; None where nothing was."""

    def __repr__(self) -> str:
        return f"Repaired({self.cut!r}, {self.repair.training.epochs_run} epochs)"


def repair_cut(
    cut: Cut, model: Model, images: Images, settings: FinetuneSettings, out: Path
) -> tuple[Cut, TrainResult]:
    """Repair a copy of a compact model; ``out`` keeps checkpoints, and the result in ``model``.

    Args:
        cut: What is repaired.
        model: The dense model, its teacher.
        images: Of the task.
        settings: The training; one that was killed goes on from its last checkpoint.
        out: The folder of the training's files.
    """
    say(f"repairing {cut.name}")
    compact = deepcopy(cut.model)
    taken = model.preprocessing
    result = repair(compact, model.module, images, settings, out, preprocessing=taken)
    repaired = replace(
        cut,
        model=compact,
        name=f"{cut.name}-repaired",
        # It no longer computes the masked model; what that was worth stands with the cut.
        fill=None,
        exactness=None,
        faithfulness=None,
        seconds=None if cut.seconds is None else round(cut.seconds + result.seconds, 2),
        results=None,
    )
    return repaired, result


def repair_dense_model(
    model: Model, images: Images, settings: FinetuneSettings, out: Path
) -> tuple[Model, TrainResult]:
    """Give a copy of the dense model the repair of its cut: what training alone would gain."""
    say("giving the dense model the same repair")
    module, taken = deepcopy(model.module), model.preprocessing
    result = repair(module, model.module, images, settings, out, preprocessing=taken)
    name, labels = f"{model.name}-repaired", model.labels
    repaired = Model.of(module, name, model.preprocessing, labels)
    return replace(repaired, kept_classes=model.kept_classes), result


def find_repair(
    path: Path, model: Model, images: Images, settings: FinetuneSettings
) -> tuple[Path, TrainResult]:
    """The dense model that an earlier repair trained with the same settings: folder and result.

    Args:
        path: A run directory of `vitcut.finetune`, or of the dense model's own training.
        model: The dense model.
        images: Of the task.
        settings: Of the repair at hand.

    Raises:
        ArtefactError: It is not there, not finished, or of other settings.
    """
    folder = path / DENSE_REPAIRED if (path / DENSE_REPAIRED).is_dir() else path
    earlier, result = read_training(folder)
    loss, taken = Distillation(model.module, images.task, settings), model.preprocessing
    wanted = training_settings(model.module, images, settings, loss, preprocessing=taken)
    for key, (was, now) in differences(earlier, wanted).items():
        raise ArtefactError(
            f"the dense model in {path} was repaired with other settings: {key} was {was!r}, now "
            f"{now!r}; give the same ones, or leave out --repaired-dense"
        )
    return folder, result


def require_cut_of(compact: CompactViT, model: Model, images: Images) -> None:
    """Check that a compact model was cut from this model, for this task, and can learn.

    What the compact model does not say of itself is not checked.

    Raises:
        ModelError: It was cut from another model, or sees nothing of the image.
        TaskError: It tells other classes or groups apart.
    """
    require_sight(compact)
    info, task = compact.info, images.task
    if info.source_sha256 not in {None, model.weight_hash}:
        raise ModelError(
            f"the compact model was cut from weights that hash to {str(info.source_sha256)[:12]}, "
            f"those of {model.name!r} hash to {model.weight_hash[:12]}: give the model that it was "
            "cut from"
        )
    same = (
        info.class_names in {(), task.class_names}
        and info.group_names in {(), task.groups}
        and info.group_of_class in {(), tuple(task.group_of_class.tolist())}
        and compact.plan.shape.num_classes == len(task.classes)
    )
    if not same:
        raise TaskError(
            f"the compact model's classes or groups are not those of task {task.name!r}: use the "
            "label file that it was cut for"
        )


def require_sight(compact: CompactViT) -> None:
    """Refuse a model whose logits are the same for every image.

    Raises:
        ModelError: It is one.
    """
    if not compact.plan.readout or not compact.plan.embeds:
        raise ModelError(
            "the compact model gives every image the same logits, so there is nothing to train: "
            "cut less"
        )


def compare_pairs(
    name: str, found: Mapping[str, Evaluation], *, seed: int
) -> tuple[AccuracyDifference, ...]:
    """The repaired point against the dense model, before and after the same repair."""
    return tuple(
        compare(name, found[name], against, found[against], seed=seed)
        for against in (DENSE, DENSE_REPAIRED)
        if against in found
    )
