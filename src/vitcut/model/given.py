"""What a user says of a model besides where it is. Heeding it is left to `loading`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vitcut.errors import ConfigError
from vitcut.settings import as_plain, require_at_least, require_positive

TIMM = "timm:"
"""Begins what names a model of timm."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Of files of bare weights."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user says of a model besides where it is."""

    arch: str | None = None
    """Of bare weights: what timm calls their architecture, or ``torchvision:NAME``."""
    mean: tuple[float, ...] | None = None
    """Of bare weights: what images were shifted by, per channel, on the scale 0 to 1; None takes
    what the library knows of the architecture."""
    std: tuple[float, ...] | None = None
    """Of bare weights: what images were divided by afterwards; likewise."""
    random_weights: bool = False
    """Of ``timm:NAME``: build it without its weights, and without network."""
    image_size: int | None = None
    """Of ``timm:NAME``: height and width of its images, in pixels; None is the size of its own."""

    def __post_init__(self) -> None:
        for value in self.mean or ():
            if not math.isfinite(value):
                raise ConfigError(f"mean must be a finite number, got {value}")
        for value in self.std or ():
            require_positive("std", value)
        if self.image_size is not None:
            require_at_least("image-size", self.image_size, 1)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Given":
        """Of JSON values by name, which may say other things too.

        Raises:
            ConfigError: A number is out of range.
        """
        names = {item.name for item in fields(cls)}
        said: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
            if name in names
        }
        return cls(**said)

    def to_dict(self) -> dict[str, Any]:
        """What is said, as JSON values by name."""
        return {name: value for name, value in as_plain(self).items() if value}

    def over(self, earlier: "Given") -> "Given":
        """What is said here, and for the rest what was said before."""
        return Given.from_dict({**earlier.to_dict(), **self.to_dict()})

    def require_for(self, spec: str) -> None:
        """Refuse what is for another kind of model than `load_model` is asked for.

        Raises:
            ConfigError: Something is.
        """
        said = self.to_dict()
        for name in ("arch", "mean", "std"):
            if name in said and not is_weights_file(spec):
                raise ConfigError(
                    f"{name} is for a file of bare weights ({', '.join(SUFFIXES)}), got it with "
                    f"{spec!r}: leave it out, or correct the path"
                )
        named = spec.startswith(TIMM)
        if self.random_weights and not named:
            raise ConfigError(
                f"random-weights is for timm:NAME, got it with {spec!r}: leave it out"
            )
        if self.image_size is not None and not named:
            raise ConfigError(
                f"image-size is for timm:NAME, got it with {spec!r}, whose weights or "
                "configuration say the size: leave it out"
            )

    def require_for_module(self) -> None:
        """Refuse what a module says itself.

        Raises:
            ConfigError: Something is.
        """
        said = self.to_dict()
        for name in ("arch", "random_weights", "image_size"):
            if name in said:
                raise ConfigError(f"a module is taken as it was built, got {name}: leave it out")


NOTHING = Given()
"""Nothing is said."""


def is_weights_file(spec: str) -> bool:
    """Whether this is a file of bare weights, and not a folder or a name."""
    return Path(spec).suffix in SUFFIXES and Path(spec).is_file()
