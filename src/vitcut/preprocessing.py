"""From a picture to the tensor that a model takes: one value, for models and images alike."""

import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, get_args

from vitcut.errors import ConfigError, ModelError
from vitcut.settings import require_one_of, require_positive

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Fit = Literal["crop", "squash"]
"""Scale the shorter side and crop the centre, or scale both sides to the same length."""

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
"""Pillow's filters."""

Orientation = Literal["ignore", "apply"]
"""Take pixels as they are stored, or turn a picture as its EXIF entry says."""

_MOST = 2.0
"""No mean and no standard deviation of numbers from 0 to 1 is larger."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """What is done to a decoded picture, besides scaling it to a size; the default shows it whole.

    Models bring their own; mean and standard deviation are applied afterwards.
    """

    channels: int = 3
    """1: grey, 3: red, green and blue."""
    fit: Fit = "crop"
    crop_fraction: float = 1.0
    """Side of the central square that is kept, after fitting; timm's ``crop_pct``."""
    interpolation: Interpolation = "bicubic"
    orientation: Orientation = "ignore"
    """As the library that the preprocessing comes from: torchvision and timm take pixels as they
    are stored, transformers turns them."""

    def __post_init__(self) -> None:
        if self.channels not in {1, 3}:
            raise ConfigError(
                f"images have 1 (grey) or 3 (red, green, blue) channels, got {self.channels}: "
                "choose a model that takes such images"
            )
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"crop_fraction must be > 0 and <= 1, got {self.crop_fraction}")
        require_one_of("fit", self.fit, get_args(Fit))
        require_one_of("interpolation", self.interpolation, get_args(Interpolation))
        require_one_of("orientation", self.orientation, get_args(Orientation))

    def shown_fraction(self, image_size: int) -> float:
        """Part of each fitted side that is kept: pictures are scaled to whole pixels, then cropped.

        Args:
            image_size: Height and width of the result, in pixels.
        """
        return image_size / int(image_size / self.crop_fraction + 1e-6)

    def key(self) -> dict[str, Any]:
        """What tells this framing from others in hashes, which keep those of earlier versions."""
        plain = asdict(self)
        if self.orientation == "ignore":
            del plain["orientation"]
        return plain


WHOLE = Framing()
"""The default: RGB, the shorter side scaled, and the whole central square kept."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture is framed, scaled and normalised."""

    image_size: int
    """Height and width, in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted per channel, on the scale 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by per channel, on the scale 0 to 1."""
    framing: Framing = WHOLE
    """Which part of the picture is kept, in which colours, and how it is scaled."""

    def __post_init__(self) -> None:
        for value in (*self.mean, *self.std):
            if not math.isfinite(value):
                raise ConfigError(f"mean and std must be finite numbers, got {value}")
        for value in self.std:
            require_positive("std", value)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if any(abs(value) > _MOST for value in values):
                listed = ", ".join(f"{value:g}" for value in values)
                raise ConfigError(
                    f"{name} must be on the scale 0 to 1, got {listed}, which seems to be on the "
                    "scale 0 to 255: divide it by 255"
                )


def per_channel(values: Any, channels: int, what: str) -> tuple[float, ...]:
    """One number per channel; a single one holds for all.

    Raises:
        ModelError: They are not numbers, or not as many as there are channels.
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
        ConfigError: They are not finite numbers.
    """
    if given is None:
        return None
    items = given.strip("[]").split(",") if isinstance(given, str) else given
    try:
        numbers = tuple(float(item) for item in ([items] if isinstance(items, Real) else items))
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, or one per channel, got {given!r}") from None
    for value in numbers:
        if not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value}")
        if name == "std":
            require_positive(name, value)
    if len(numbers) not in {1, 3}:
        raise ConfigError(
            f"{name} must be one number, or three for red, green and blue, got {len(numbers)}"
        )
    return numbers
