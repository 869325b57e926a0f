"""How a picture becomes the square of pixels that a model takes; doing it is left to `data`."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError

Fit = Literal["crop", "squash"]
"""Scale the shorter side and crop the centre, or scale both sides alike whatever the shape."""

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
"""Pillow's filters."""


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

    def __post_init__(self) -> None:
        if self.channels not in {1, 3}:
            raise ConfigError(
                f"images have 1 (grey) or 3 (red, green, blue) channels, got {self.channels}: "
                "choose a model that takes such images"
            )
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"crop_fraction must be > 0 and <= 1, got {self.crop_fraction}")
        for name, kinds in (("fit", Fit), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(kinds))}, "
                    f"got {getattr(self, name)!r}"
                )

    def shown_fraction(self, image_size: int) -> float:
        """Part of each fitted side that is kept: pictures are scaled to whole pixels, then cropped.

        Args:
            image_size: Height and width of the result, in pixels.
        """
        return image_size / int(image_size / self.crop_fraction + 1e-6)


WHOLE = Framing()
"""Red, green and blue, the shorter side scaled, nothing cut off the square: nobody said else."""
