"""Settings of the data stage. Loads neither torch nor numpy."""

from dataclasses import dataclass

from vitcut.errors import ConfigError
from vitcut.settings import require_at_least


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images, at which size, split how."""

    source: str | None = None
    """A Tiny ImageNet .zip or folder, a folder (or .zip) of class folders, a .parquet file, a
    Hugging Face dataset id ("org/name"), the word "drawn" (pictures drawn on the spot), or None:
    Tiny ImageNet from its public address."""
    image_size: int = 64
    """Height and width of the prepared images, in pixels."""
    seed: int = 0
    """Of the val split, of a test split that the data lacks, and of drawn pictures."""
    val_fraction: float = 0.1
    """Part of each class's training images that is set aside for choosing."""
    skip_bad_images: bool = False
    """Leave out images that do not decode, and say how many, instead of stopping."""

    def __post_init__(self) -> None:
        if self.source is not None and not self.source.strip():
            raise ConfigError(
                "source is empty: give a .zip, folder, .parquet file, dataset id or 'drawn'"
            )
        require_at_least("image_size", self.image_size, 8)
        require_at_least("seed", self.seed, 0)
        if not 0 < self.val_fraction < 1:
            raise ConfigError(
                f"val_fraction must be between 0 and 1, both excluded, got {self.val_fraction}"
            )
