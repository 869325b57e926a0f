"""From a picture to the tensor that a model takes: one value, for models and images alike."""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from vitcut.errors import ConfigError, ModelError
from vitcut.framing import WHOLE, Framing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture is framed, scaled and normalised."""

    image_size: int
    """Height and width, in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted per channel, on the scale 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by per channel, on the scale 0 to 1."""
    framing: Framing = field(default=WHOLE)
    """Which part of the picture is kept, in which colours, and how it is scaled."""


def per_channel(values: Any, channels: int, what: str) -> tuple[float, ...]:
    """One number per channel; a single one holds for all.

    Raises:
        ModelError: They are no numbers, or not as many as there are channels.
    """
    found: list[Any] = list(values) if isinstance(values, (list, tuple)) else [values]
    if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in found):
        raise ModelError(f"{what} must be numbers, got {values!r}")
    if len(found) not in {1, channels}:
        raise ModelError(
            f"{what} must be {channels} numbers, one per channel of the model, got {len(found)}"
        )
    return tuple(float(item) for item in found) * (channels if len(found) == 1 else 1)


def numbers(name: str, given: Any) -> tuple[float, ...] | None:
    """One number or one per channel, typed or from Python, as a tuple.

    Raises:
        ConfigError: They are no finite numbers.
    """
    if given is None:
        return None
    if isinstance(given, str):
        given = given.strip("[]").split(",")
    try:
        numbers = tuple(float(item) for item in ([given] if isinstance(given, Real) else given))
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, or one per channel, got {given!r}") from None
    for value in numbers:
        if not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value}")
    return numbers
