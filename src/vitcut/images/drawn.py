"""A drawn picture set for demonstrations and tests: twelve shapes in four groups, no files needed.

Colours, position, size, angle, background and noise are random; only the shape tells the class.
The groups stand in the shipped label file ``drawn.yaml``.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


SOURCE_WORD = "drawn"
"""What a user gives as the source to get this set."""

_BATCH = 50
Plane: TypeAlias = NDArray[np.floating]
"""One number per pixel, shape [images, height, width]."""
Painter: TypeAlias = Callable[[Plane, Plane, np.random.Generator], Plane]
"""Coordinates of a shape that fills -1 to 1 -> signed distance to it, negative inside."""


def drawn_images(
    *, images_per_class: int, seed: int, image_size: int = 64
) -> tuple[NDArray[np.uint8], NDArray[np.character]]:
    """Draw the same number of pictures of every class.

    Args:
        images_per_class: At least 1.
        seed: Equal seeds, equal pictures.
        image_size: Height and width, in pixels.

    Returns:
        Pictures, uint8, shape [images, image_size, image_size, 3], class by class, and the class
        id of each, shape [images].
    """
    class_ids = sorted(_PAINTERS)
    pictures = [
        _draw_batch(_PAINTERS[name], min(_BATCH, images_per_class - start), image_size, rng)
        for number, name in enumerate(class_ids)
        for rng in [np.random.default_rng([seed, number])]
        for start in range(0, images_per_class, _BATCH)
    ]
    return np.concatenate(pictures), np.repeat(np.array(class_ids), images_per_class)


def _draw_batch(
    painter: Painter, count: int, size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    down, right = np.meshgrid(axis, axis, indexing="ij")
    radius = _uniform(rng, count, 0.6, 0.85)
    x, y = (right - _shift(rng, radius)) / radius, (down - _shift(rng, radius)) / radius
    angle = _uniform(rng, count, -0.35, 0.35)
    cos, sin = np.cos(angle), np.sin(angle)
    distance = painter(cos * x + sin * y, cos * y - sin * x, rng)
    # One pixel of the edge is blended, which looks smooth without drawing it larger first.
    cover = np.clip(0.5 - distance * radius * (size / 2), 0, 1)[..., np.newaxis]
    back, front = _colours(rng, count)
    back = back + _gradient(rng, right, down, count)
    grain = rng.standard_normal((count, size, size, 3), dtype=np.float32)
    grain *= _uniform(rng, count, 0.01, 0.07)[..., np.newaxis]
    picture = back + cover * (front - back) + grain
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _shift(rng: np.random.Generator, radius: Plane) -> Plane:
    """How far from the middle a shape may lie and still be in the picture."""
    return (1 - radius) * _uniform(rng, len(radius), -1, 1)


def _colours(rng: np.random.Generator, count: int) -> tuple[Plane, Plane]:
    """Background and foreground, far enough apart to be seen, shape [images, 1, 1, 3] each."""
    back = rng.uniform(0.1, 0.9, (count, 1, 1, 3)).astype(np.float32)
    away = np.where(back.mean(-1, keepdims=True) < 0.5, 1, -1) * rng.uniform(
        0.25, 0.6, (count, 1, 1, 1)
    )
    tint = rng.uniform(-0.25, 0.25, (count, 1, 1, 3))
    front = np.clip(back.mean(-1, keepdims=True) + away + tint, 0, 1).astype(np.float32)
    return back, front


def _gradient(rng: np.random.Generator, right: Plane, down: Plane, count: int) -> Plane:
    slope = [_uniform(rng, count, -0.12, 0.12) for _ in range(2)]
    return (slope[0] * right + slope[1] * down)[..., np.newaxis]


def _uniform(rng: np.random.Generator, count: int, low: float, high: float) -> Plane:
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _disc(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    del rng
    return np.hypot(x, y) - 0.9


def _ring(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    return np.abs(np.hypot(x, y) - 0.7) - _uniform(rng, len(x), 0.12, 0.22)


def _crescent(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    bite = np.hypot(x - _uniform(rng, len(x), 0.35, 0.5), y) - 0.75
    return np.maximum(np.hypot(x, y) - 0.9, -bite)


def _triangle(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    del rng
    return np.maximum(y - 0.45, np.abs(x) * 0.866 - y * 0.5 - 0.45)


def _square(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - _uniform(rng, len(x), 0.62, 0.75)


def _star(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Five points: one edge, mirrored and turned."""
    inner = _uniform(rng, len(x), 0.36, 0.46)
    turn = 2 * np.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - turn * np.round(angle / turn))
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    step_along, step_across = inner * np.cos(turn / 2) - 1, inner * np.sin(turn / 2)
    length = np.hypot(step_along, step_across)
    return ((along - 1) * step_across - across * step_along) / length


def _stripes(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    return np.maximum(_bands(x, rng), _window(x, y))


def _zigzag(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    return np.maximum(_bands(x + np.abs(_fold(y, 0.9)), rng), _window(x, y))


def _target(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    return np.maximum(_bands(np.hypot(x, y), rng), np.hypot(x, y) - 0.95)


def _grid(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    step = _uniform(rng, len(x), 0.45, 0.6)
    dots = np.hypot(_fold(x, step), _fold(y, step)) - 0.3 * step
    return np.maximum(dots, np.maximum(np.abs(x), np.abs(y)) - 1.3 * step)


def _necklace(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    turn = 2 * np.pi / np.round(_uniform(rng, len(x), 6.5, 9.5))
    angle = _fold(np.arctan2(y, x), turn)
    radius = np.hypot(x, y)
    return np.hypot(radius * np.cos(angle) - 0.75, radius * np.sin(angle)) - 0.17


def _scatter(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    distances = [
        np.hypot(x - _uniform(rng, len(x), -0.8, 0.8), y - _uniform(rng, len(x), -0.8, 0.8))
        for _ in range(7)
    ]
    return np.minimum.reduce(distances) - 0.15


def _bands(x: Plane, rng: np.random.Generator) -> Plane:
    """Parallel bands, as wide as the gaps between them."""
    step = _uniform(rng, len(x), 0.36, 0.5)
    return np.abs(_fold(x, step)) - step / 4


def _fold(x: Plane, step: Plane | float) -> Plane:
    """Repeat what lies around 0 at every multiple of ``step``."""
    return x - step * np.round(x / step)


def _window(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


_PAINTERS: dict[str, Painter] = {
    "crescent": _crescent,
    "disc": _disc,
    "grid": _grid,
    "necklace": _necklace,
    "ring": _ring,
    "scatter": _scatter,
    "square": _square,
    "star": _star,
    "stripes": _stripes,
    "target": _target,
    "triangle": _triangle,
    "zigzag": _zigzag,
}
