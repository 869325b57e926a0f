"""Drawn pictures for demonstrations and tests: twelve shapes in four groups, without any files.

Colours, position, size, angle, background and noise are random; only the shape shows the class.
The shipped label file ``drawn.yaml`` lists the groups.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

SOURCE_WORD = "drawn"
"""The source that selects these pictures."""

_SHAPES = (
    "crescent", "disc", "grid", "necklace", "ring", "scatter", "square", "star", "stripes",
    "target", "triangle", "zigzag",
)  # fmt: skip
_BATCH = 50

Plane: TypeAlias = NDArray[np.floating]
"""One number per pixel, shape [images, height, width], or per image, shape [images, 1, 1]."""
Uniform: TypeAlias = Callable[[float, float], Plane]
"""Draws a number between two limits for each image."""


def drawn_images(
    *, images_per_class: int, seed: int, image_size: int = 64
) -> tuple[NDArray[np.uint8], NDArray[np.character]]:
    """Draw the same number of pictures of every class.

    Args:
        images_per_class: At least 1.
        seed: Equal seeds give equal pictures.
        image_size: Height and width, in pixels.

    Returns:
        The pictures, uint8, shape [images, image_size, image_size, 3], class by class, and the
        class id of each, shape [images].
    """
    pictures: list[NDArray[np.uint8]] = []
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) * (2 / image_size) - 1
    down, right = np.meshgrid(axis, axis, indexing="ij")
    # The pictures depend on the order of the random draws: do not change it.
    for number, shape in enumerate(_SHAPES):
        rng = np.random.default_rng([seed, number])
        for start in range(0, images_per_class, _BATCH):
            count = min(_BATCH, images_per_class - start)

            def uniform(
                low: float, high: float, count: int = count, rng: np.random.Generator = rng
            ) -> Plane:
                return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

            # Coordinates in which the shape fills -1 to 1: shifted as far as it stays inside the
            # picture, scaled and turned.
            radius = uniform(0.6, 0.85)
            x = (right - (1 - radius) * uniform(-1, 1)) / radius
            y = (down - (1 - radius) * uniform(-1, 1)) / radius
            angle = uniform(-0.35, 0.35)
            cos, sin = np.cos(angle), np.sin(angle)
            distance = _distance(shape, cos * x + sin * y, cos * y - sin * x, uniform)
            # The outermost pixel is blended, which looks smooth without drawing at a larger size.
            cover = np.clip(0.5 - distance * radius * (image_size / 2), 0, 1)[..., np.newaxis]

            # The foreground differs enough from the background to be seen.
            back = rng.uniform(0.1, 0.9, (count, 1, 1, 3)).astype(np.float32)
            brightness = back.mean(-1, keepdims=True)
            away = np.where(brightness < 0.5, 1, -1) * rng.uniform(0.25, 0.6, (count, 1, 1, 1))
            tint = rng.uniform(-0.25, 0.25, (count, 1, 1, 3))
            front = np.clip(brightness + away + tint, 0, 1).astype(np.float32)
            gradient = uniform(-0.12, 0.12) * right + uniform(-0.12, 0.12) * down
            back = back + gradient[..., np.newaxis]
            grain = rng.standard_normal((count, image_size, image_size, 3), dtype=np.float32)
            grain *= uniform(0.01, 0.07)[..., np.newaxis]
            picture = back + cover * (front - back) + grain
            pictures.append((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.concatenate(pictures), np.repeat(np.array(_SHAPES), images_per_class)


def _distance(shape: str, x: Plane, y: Plane, uniform: Uniform) -> Plane:
    """Signed distance to the outline of a shape that fills -1 to 1, negative inside."""
    radius, side = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    match shape:
        case "disc":
            distance = radius - 0.9
        case "ring":
            distance = np.abs(radius - 0.7) - uniform(0.12, 0.22)
        case "crescent":
            bite = np.hypot(x - uniform(0.35, 0.5), y) - 0.75
            distance = np.maximum(radius - 0.9, -bite)
        case "triangle":
            distance = np.maximum(y - 0.45, np.abs(x) * 0.866 - y * 0.5 - 0.45)
        case "square":
            distance = side - uniform(0.62, 0.75)
        case "star":  # Five points: one edge, mirrored and turned.
            inner = uniform(0.36, 0.46)
            turn = 2 * np.pi / 5
            angle = np.abs(_fold(np.arctan2(x, -y), turn))
            along, across = radius * np.cos(angle), radius * np.sin(angle)
            step_along, step_across = inner * np.cos(turn / 2) - 1, inner * np.sin(turn / 2)
            length = np.hypot(step_along, step_across)
            distance = ((along - 1) * step_across - across * step_along) / length
        case "stripes":
            distance = np.maximum(_bands(x, uniform), side - 0.85)
        case "zigzag":
            distance = np.maximum(_bands(x + np.abs(_fold(y, 0.9)), uniform), side - 0.85)
        case "target":
            distance = np.maximum(_bands(radius, uniform), radius - 0.95)
        case "grid":
            step = uniform(0.45, 0.6)
            dots = np.hypot(_fold(x, step), _fold(y, step)) - 0.3 * step
            distance = np.maximum(dots, side - 1.3 * step)
        case "necklace":
            angle = _fold(np.arctan2(y, x), 2 * np.pi / np.round(uniform(6.5, 9.5)))
            distance = np.hypot(radius * np.cos(angle) - 0.75, radius * np.sin(angle)) - 0.17
        case _:  # "scatter"
            dots = [np.hypot(x - uniform(-0.8, 0.8), y - uniform(-0.8, 0.8)) for _ in range(7)]
            distance = np.minimum.reduce(dots) - 0.15
    return distance


def _bands(x: Plane, uniform: Uniform) -> Plane:
    """Parallel bands, as wide as the gaps between them."""
    step = uniform(0.36, 0.5)
    return np.abs(_fold(x, step)) - step / 4


def _fold(x: Plane, step: Plane | float) -> Plane:
    """Repeat what is around 0 at every multiple of ``step``."""
    return x - step * np.round(x / step)
