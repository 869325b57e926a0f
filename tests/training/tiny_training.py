"""A training small enough to be repeated a hundred times."""

import numpy as np
from torch import nn

from vitcut.images.load import Images, ImageSet
from vitcut.labels import Labels
from vitcut.preprocessing import Preprocessing
from vitcut.runtime import seed_everything
from vitcut.task import Task, TaskClass
from vitcut.training.settings import TrainSettings

TASK = Task(
    name="tiny",
    classes=tuple(TaskClass(id=f"n{i}", name=f"class {i}", group="ab"[i // 2]) for i in range(4)),
    groups=("a", "b"),
)

SETTINGS = TrainSettings(
    epochs=3, batch_size=8, warmup_epochs=1, compile=False, precision="float32", device="cpu"
)
"""Three epochs of four steps."""
PREPROCESSING = Preprocessing(image_size=8)


def tiny_images(*, train: int = 36, side: int = 8) -> Images:
    count = train + 16
    draw = np.random.default_rng(0)
    array = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = np.arange(count) % 4
    # Something to learn: each class has a bright row of its own.
    array[np.arange(count), labels] = 255

    def part(start: int, stop: int) -> ImageSet:
        rows = np.arange(start, stop)
        return ImageSet(array=array, rows=rows, labels=labels[rows])

    return Images(
        task=TASK,
        train=part(0, train),
        val=part(train, train + 8),
        test=part(train + 8, train + 16),
        fingerprint="tiny",
        labels=Labels(owner="the data", ids=TASK.class_ids, names=TASK.class_names),
        preprocessing=Preprocessing(image_size=side),
        origin={},
    )


def tiny_model(num_classes: int = 4) -> nn.Module:
    """Dropout, so that a forgotten generator state shows."""
    seed_everything(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.Dropout(0.5), nn.Linear(16, num_classes)
    )
