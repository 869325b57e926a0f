"""Settings of the data stage. Loads neither torch nor numpy."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.settings import require_bounds, require_one_of

Orientation = Literal["auto", "apply", "ignore"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images to use, at what size, and how to split them."""

    source: str | None = None
    """A Tiny ImageNet .zip or folder, a folder or .zip of class folders, a .parquet file or a
    folder of them, a Hugging Face dataset id ("org/name"), or "drawn" (generated pictures). None
    downloads Tiny ImageNet."""
    image_size: int = 64
    """Height and width of the prepared images, in pixels."""
    seed: int = 0
    """Seed for the val split, for the test split if the data lacks one, and for drawn pictures."""
    val_fraction: float = 0.1
    """Fraction of each class's training images to set aside as the val split."""
    skip_bad_images: bool = False
    """Leave out images that cannot be decoded, with a count, instead of stopping."""
    orientation: Orientation = "auto"
    """Whether to turn pictures as their EXIF entry says; auto does what the library does that the
    model's preprocessing comes from."""
    image_column: str | None = None
    """The column of a parquet file that holds the pictures; by default "image", or the only one."""
    label_column: str | None = None
    """The column of a parquet file that holds the classes; by default found by its name."""

    def __post_init__(self) -> None:
        if self.source is not None and not self.source.strip():
            raise ConfigError(
                "source is empty: give a .zip, folder, .parquet file, dataset id or 'drawn'"
            )
        for name in ("image_column", "label_column"):
            if self.source == "drawn" and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name.replace('_', '-')} is for parquet files, got it with source 'drawn': "
                    "leave it out"
                )
        require_bounds("image_size", self.image_size)
        require_bounds("seed", self.seed)
        if not 0 < self.val_fraction < 1:
            raise ConfigError(
                f"val_fraction must be between 0 and 1, both excluded, got {self.val_fraction}"
            )
        require_one_of("orientation", self.orientation, get_args(Orientation))
