"""The drawn picture set."""

import numpy as np

from vitcut.images.drawn import drawn_images
from vitcut.images.prepare import prepare
from vitcut.images.settings import DataSettings
from vitcut.task import load_task


def test_the_shipped_label_file_names_every_drawn_class() -> None:
    task = load_task("drawn")
    data = prepare(DataSettings(source="drawn", image_size=16))
    assert set(data.class_names) == set(task.class_ids)
    assert len(task.groups) == 4


def test_a_seed_fixes_the_pictures() -> None:
    first, second, other = (drawn_images(images_per_class=2, seed=s)[0] for s in (0, 0, 1))
    assert first.shape == (24, 64, 64, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_no_two_pictures_are_equal() -> None:
    images, _ = drawn_images(images_per_class=60, seed=0, image_size=16)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_colour_alone_hardly_tells_the_class() -> None:
    images, class_ids = drawn_images(images_per_class=60, seed=0, image_size=32)
    colours = images.mean((1, 2))
    numbers = np.unique(class_ids, return_inverse=True)[1]
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (numbers[distances.argmin(1)] == numbers).mean() < 0.2
