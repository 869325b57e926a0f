"""The images of a task: training, val and test, disjoint, and ready for a model.

Reading and decoding are left to `prepare`; pairing images with corrupted ones to `pairs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vitcut.errors import ConfigError, DataError, TaskError
from vitcut.framing import WHOLE, Framing
from vitcut.images.prepare import differing, prepare
from vitcut.images.prepared import PreparedData
from vitcut.images.settings import DataSettings
from vitcut.images.stratified import choose_evenly, choose_fraction
from vitcut.labels import Labels
from vitcut.progress import say
from vitcut.settings import config_hash
from vitcut.shapes import Float, Tensor
from vitcut.task import Task, unknown_classes
from vitcut.wordnet import imagenet_names

_TEST_FRACTION = 0.1
"""Of data that comes in one part."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Some images of a prepared array, with their labels; nothing is copied until it is read."""

    array: NDArray[np.uint8]
    """All images of the source, shape [all, height, width, channels]; often mapped from disk."""
    rows: NDArray[np.int64]
    """Which of them belong to this set, shape [images]."""
    labels: NDArray[np.int64]
    """The task's fine class numbers, shape [images]."""

    def __len__(self) -> int:
        return len(self.rows)

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


@dataclass(frozen=True, kw_only=True)
class TaskImages:
    """Everything that training, discovery and evaluation read of one source for one task."""

    task: Task
    """Names the labels."""
    train: ImageSet
    """For fitting and calibration."""
    val: ImageSet
    """For choosing: early stopping, ridge, rounds, tau."""
    test: ImageSet
    """For reporting, once per point."""
    fingerprint: str
    """Hex; of content, image size, task and splits."""
    ignored_classes: int
    """How many class ids of the data are not of the task."""
    data_labels: Labels
    """All classes of the data, in the order of their ids."""
    image_size: int
    """Height and width, in pixels."""
    framing: Framing = WHOLE
    """How they were made from pictures."""

    def calibration(self, count: int, *, seed: int) -> ImageSet:
        """Training images for discovery, as many of each fine class as of any other.

        The rest, where the task has one, counts as one class, whatever it is made of.

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


def load_images(config: DataSettings, task: Task, framing: Framing = WHOLE) -> TaskImages:
    """Prepare a source and split its images for a task, whose classes are the data's.

    Args:
        config: The source, the size and the splits.
        task: Names the classes.
        framing: What is kept of each picture: what the model takes.

    Raises:
        DataError: The source cannot be used, or a class has too few images to be split.
        TaskError: The task names a class that the data lacks.
    """
    prepared = prepare(config, framing)
    return task_images(prepared, config, task.among(labels_of(prepared)), framing)


def labels_of(prepared: PreparedData) -> Labels:
    """The classes of prepared data; ids that are ImageNet's have its names, if no others."""
    ids = tuple(sorted(prepared.class_names))
    names = (prepared.class_names[class_id] for class_id in ids)
    known = imagenet_names()
    return Labels(
        owner="the data",
        ids=ids,
        names=tuple(
            known.get(own, name) if name == own else name
            for own, name in zip(ids, names, strict=True)
        ),
    )


def task_images(
    prepared: PreparedData, config: DataSettings, task: Task, framing: Framing = WHOLE
) -> TaskImages:
    """Split prepared images for a task whose classes are called by their ids.

    The splits are made class by class before the task picks its classes: whatever the task, an
    image that one of them tunes or validates on trains no other.

    Raises:
        DataError: A class has too few images to be split.
        TaskError: The task names a class that the data lacks.
    """
    labels = _task_labels(prepared, task)
    sets = {
        name: _image_set(prepared, labels, chosen & (labels >= 0))
        for name, chosen in _splits(prepared, config).items()
    }
    for name, images in sets.items():
        _refuse_missing_classes(images, task, name)
    return TaskImages(
        task=task,
        train=sets["train"],
        val=sets["val"],
        test=sets["test"],
        fingerprint=_fingerprint(prepared, config, task, framing),
        ignored_classes=_ignored_classes(prepared, task),
        data_labels=labels_of(prepared),
        image_size=config.image_size,
        framing=framing,
    )


def to_float(
    images: NDArray[np.uint8],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "images channels y x"]:
    """Bring uint8 images to a model's range: (pixel / 255 - mean) / std.

    Args:
        images: Shape [images, height, width, channels].
        mean: Per channel, on the scale 0 to 1.
        std: Per channel, on the scale 0 to 1.
        dtype: Of the result; computed in float32 at least.
        device: Where the result lies; bytes travel there, not floats.
    """
    pixels = torch.from_numpy(images if images.flags.writeable else images.copy())
    exact = torch.promote_types(dtype, torch.float32)
    scaled = pixels.to(device).permute(0, 3, 1, 2).to(exact, memory_format=torch.contiguous_format)
    shift = torch.tensor(mean, dtype=exact, device=device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=exact, device=device).view(-1, 1, 1)
    return scaled.div_(255).sub_(shift).div_(scale).to(dtype)


def _task_labels(prepared: PreparedData, task: Task) -> NDArray[np.int64]:
    """The fine class number of every image, -1 for classes that the task does not name."""
    known = labels_of(prepared)
    named = (item.id for item in task.classes if item.group != task.rest)
    missing = [class_id for class_id in named if class_id not in prepared.class_names]
    if missing:
        raise TaskError(unknown_classes(task.name, missing, known))
    number = {class_id: label for label, class_id in enumerate(task.class_ids)}
    ids, members = np.unique(prepared.class_ids, return_inverse=True)
    return np.array([number.get(str(name), -1) for name in ids], dtype=np.int64)[members]


def _splits(prepared: PreparedData, config: DataSettings) -> dict[str, NDArray[np.bool_]]:
    """Whether each prepared image belongs to a split; disjoint, and together all."""
    _, classes = np.unique(prepared.class_ids, return_inverse=True)
    test = prepared.splits == "test"
    if not test.any():
        test = choose_fraction(classes, _TEST_FRACTION, seed=config.seed)
    rest = np.flatnonzero(~test)
    val = np.zeros_like(test)
    val[rest] = choose_fraction(classes[rest], config.val_fraction, seed=config.seed + 1)
    return {"train": ~test & ~val, "val": val, "test": test}


def _image_set(
    prepared: PreparedData, labels: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> ImageSet:
    rows = np.flatnonzero(chosen)
    return ImageSet(array=prepared.images, rows=rows, labels=labels[rows])


def _refuse_missing_classes(images: ImageSet, task: Task, split: str) -> None:
    rest = _in_rest(task)
    missing = np.setdiff1d(np.flatnonzero(~rest), images.labels)
    if len(missing):
        raise DataError(
            f"class {task.class_ids[missing[0]]} has no {split} images "
            f"({len(missing)} of {len(task.class_ids)} classes have none): expected at least one; "
            "add images, or take the class out of the label file"
        )
    if rest.any() and not rest[images.labels].any():
        raise DataError(
            f"the data has no {split} images of the rest, group {task.rest!r}: expected one at "
            "least, of a class that the model knows and the label file does not name"
        )


def _in_rest(task: Task) -> NDArray[np.bool_]:
    """Whether each fine class is of the rest; the data may lack those."""
    return np.array([item.group == task.rest for item in task.classes])


def _ignored_classes(prepared: PreparedData, task: Task) -> int:
    ignored = len(set(prepared.class_names) - set(task.class_ids))
    if ignored:
        say(
            f"data: left out {ignored} of {len(prepared.class_names)} classes, which are not of "
            f"task {task.name!r}"
        )
    return ignored


def _fingerprint(prepared: PreparedData, config: DataSettings, task: Task, framing: Framing) -> str:
    return config_hash(
        prepared.fingerprint,
        sorted(prepared.skipped),
        config.image_size,
        config.seed,
        config.val_fraction,
        [(item.id, item.group) for item in task.classes],
        task.groups,
        *differing(framing),
    )
