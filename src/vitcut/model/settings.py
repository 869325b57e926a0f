"""Settings of the models that vitcut builds. Loads no torch."""

from dataclasses import dataclass

from vitcut.errors import ConfigError
from vitcut.settings import require_bounds, require_positive


@dataclass(frozen=True, kw_only=True)
class VitSettings:
    """A plain class-token ViT; the defaults are the reference model's."""

    patch_size: int = 8
    """Side of a patch, in pixels."""
    width: int = 64
    """Width of the residual stream."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 8
    """Heads per block; the width is divided evenly among them."""
    mlp_ratio: float = 4.0
    """Hidden units per MLP, as a multiple of the width."""
    dropout: float = 0.0
    """Dropout rate after the embedding, attention and MLPs, during training."""

    def require_whole_patches(self, image_size: int) -> None:
        """Check that images divide into whole patches.

        Raises:
            ConfigError: The image size is not a multiple of the patch size.
        """
        if image_size % self.patch_size:
            raise ConfigError(
                f"image_size must be a multiple of patch_size ({self.patch_size}), got {image_size}"
            )

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "depth", "num_heads", "mlp_ratio"):
            require_bounds(name, getattr(self, name))
        require_positive("mlp_ratio", self.mlp_ratio)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be >= 0 and < 1, got {self.dropout}")
        if self.width % self.num_heads:
            raise ConfigError(
                f"width must be a multiple of num_heads ({self.num_heads}), got {self.width}"
            )
        # Weights, gradients and two moments of AdamW, in float32.
        gib = 16 * self.depth * (4 + 2 * self.mlp_ratio) * self.width**2 / 2**30
        if gib <= 1:
            return  # Every machine has that.
        import psutil

        there = psutil.virtual_memory().total / 2**30
        if gib > there:
            raise ConfigError(
                f"{self.depth} blocks of width {self.width} need {gib:.0f} GiB to train, this "
                f"machine has {there:.0f}: choose a smaller width or depth"
            )
