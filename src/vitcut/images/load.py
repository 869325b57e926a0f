"""The images of a task as one value: train, val and test splits, disjoint and ready for a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vitcut.errors import ConfigError, DataError
from vitcut.images.settings import DataSettings
from vitcut.images.stratified import choose_evenly, choose_fraction
from vitcut.labels import Labels
from vitcut.preprocessing import WHOLE, Preprocessing
from vitcut.progress import say
from vitcut.settings import config_hash
from vitcut.shapes import Float, Tensor
from vitcut.task import Task

if TYPE_CHECKING:
    from vitcut.images.prepare import PreparedData

_TEST_FRACTION = 0.1
"""Of data that comes in one part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Some images of a prepared array, with their labels; nothing is copied until it is read."""

    array: NDArray[np.uint8]
    """All images of the source, shape [all, height, width, channels]; often mapped from disk."""
    rows: NDArray[np.int64]
    """Which of them belong to this set, shape [images]."""
    labels: NDArray[np.int64]
    """Positions in the task's ``label_ids``, shape [images]: fine class numbers, or folders."""

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images)"

    def read(self, positions: ArrayLike) -> NDArray[np.uint8]:
        """Copy the images at these positions, shape [positions, height, width, channels]."""
        return np.asarray(self.array[self.rows[np.asarray(positions)]])

    def all(self) -> NDArray[np.uint8]:
        """Copy all images of the set into memory, shape [images, height, width, channels]."""
        return self.read(np.arange(len(self)))

    def take(self, positions: ArrayLike) -> "ImageSet":
        """The smaller set of the images at these positions, in this order."""
        chosen = np.asarray(positions)
        return ImageSet(array=self.array, rows=self.rows[chosen], labels=self.labels[chosen])


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Images:
    """Everything that training, discovery and evaluation read of one source for one task."""

    task: Task
    """Names the labels, and says which group each belongs to."""
    train: ImageSet
    """For fitting and calibration."""
    val: ImageSet
    """For choosing: early stopping, ridge, rounds, tau."""
    test: ImageSet
    """For reporting, once per point."""
    preprocessing: Preprocessing
    """How pictures became these images; mean and std are applied when images are normalised."""
    labels: Labels
    """All classes of the data, in the order of their ids."""
    fingerprint: str
    """Hex; of content, image size, task and splits."""
    origin: Mapping[str, Any]
    """The settings and the task, with its classes' ids, that load these images again."""
    num_turned: int = 0
    """How many pictures of the source have an EXIF orientation other than upright."""

    def calibration(self, count: int, *, seed: int) -> ImageSet:
        """Training images for discovery, equally many of each class that they are labelled with.

        The task's rest, if it has one, counts as a single class.

        Raises:
            ConfigError: Fewer than one, or more than there are.
        """
        if not 1 <= count <= len(self.train):
            raise ConfigError(
                f"images must be between 1 and {len(self.train)}, the training images of this "
                f"data, got {count}"
            )
        labels = np.where(_in_rest(self.task)[self.train.labels], -1, self.train.labels)
        return self.train.take(choose_evenly(labels, count, seed=seed))

    def __repr__(self) -> str:
        sizes = f"train {len(self.train)}, val {len(self.val)}, test {len(self.test)}"
        return f"Images(task {self.task.name!r}, {sizes}, {self.preprocessing.image_size} px)"


def split(
    prepared: "PreparedData",
    settings: DataSettings,
    task: Task,
    preprocessing: Preprocessing,
) -> Images:
    """Split prepared images for a task.

    The splits are made class by class, before the task picks its classes. So no image that is used
    for validation or test in one task is used for training in another.

    Args:
        prepared: All images of the source.
        settings: The source, the image size and the splits.
        task: Its classes are named by their ids. Images may be labelled with these, or with groups.
        preprocessing: How the images were prepared.

    Raises:
        DataError: A class has too few images to be split.
        TaskError: The task names a class that the data lacks.
    """
    task = task.for_data(prepared.labels)
    ignored = len(set(prepared.class_names) - set(task.label_ids))
    if ignored:
        say(
            f"data: left out {ignored} of {len(prepared.class_names)} classes, which are not of "
            f"task {task.name!r}"
        )
    # The label of every image; -1 for classes that the task does not name.
    number = {class_id: label for label, class_id in enumerate(task.label_ids)}
    ids, members = np.unique(prepared.class_ids, return_inverse=True)
    labels = np.array([number.get(str(name), -1) for name in ids], dtype=np.int64)[members]
    test = prepared.splits == "test"
    if not test.any():
        test = choose_fraction(members, _TEST_FRACTION, seed=settings.seed)
    rest = np.flatnonzero(~test)
    val = np.zeros_like(test)
    val[rest] = choose_fraction(members[rest], settings.val_fraction, seed=settings.seed + 1)
    sets: dict[str, ImageSet] = {}
    for name, chosen in {"train": ~test & ~val, "val": val, "test": test}.items():
        rows = np.flatnonzero(chosen & (labels >= 0))
        sets[name] = ImageSet(array=prepared.images, rows=rows, labels=labels[rows])
        _refuse_missing_classes(sets[name], task, name)
    # An absolute path, because run directories are also read from other working directories.
    source = settings.source
    if source is not None and Path(source).exists():
        source = str(Path(source).resolve())
    return Images(
        task=task,
        preprocessing=preprocessing,
        labels=prepared.labels,
        fingerprint=config_hash(
            prepared.fingerprint,
            sorted(prepared.skipped),
            settings.image_size,
            settings.seed,
            settings.val_fraction,
            [(item.id, item.group) for item in task.classes],
            task.groups,
            *([task.folders] if task.folders else []),
            *([] if preprocessing.framing == WHOLE else [preprocessing.framing.key()]),
        ),
        origin={**asdict(settings), "source": source, "task": task.to_dict()},
        num_turned=prepared.num_turned,
        **sets,
    )


def normalise(
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "images channels y x"]:
    """Bring uint8 images to a model's range: (pixel / 255 - mean) / std.

    Args:
        images: Shape [images, height, width, channels].
        preprocessing: Its mean and std are used.
        dtype: Of the result; computed in float32 at least.
        device: Where the result lies; bytes travel there, not floats.
    """
    pixels = torch.from_numpy(images if images.flags.writeable else images.copy())
    exact = torch.promote_types(dtype, torch.float32)
    scaled = pixels.to(device).permute(0, 3, 1, 2).to(exact, memory_format=torch.contiguous_format)
    shift = torch.tensor(preprocessing.mean, dtype=exact, device=device).view(-1, 1, 1)
    scale = torch.tensor(preprocessing.std, dtype=exact, device=device).view(-1, 1, 1)
    return scaled.div_(255).sub_(shift).div_(scale).to(dtype)


def _refuse_missing_classes(images: ImageSet, task: Task, name: str) -> None:
    rest = _in_rest(task)
    missing = np.setdiff1d(np.flatnonzero(~rest), images.labels)
    if len(missing):
        raise DataError(
            f"class {task.label_ids[missing[0]]} has no {name} images "
            f"({len(missing)} of {len(task.label_ids)} classes have none): expected at least one; "
            "add images, or leave the class out by a label file (--task)"
        )
    if rest.any() and not rest[images.labels].any():
        raise DataError(
            f"the data has no {name} images of the rest, group {task.rest!r}: expected at least "
            "one, of a class that the model knows and the label file does not name"
        )


def _in_rest(task: Task) -> NDArray[np.bool_]:
    """Whether each label belongs to the rest, whose classes the data may lack."""
    return np.array([task.groups[group] == task.rest for group in task.group_of_label])
