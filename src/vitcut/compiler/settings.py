"""Settings of cutting; no torch, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.config import require_at_least, require_one_of

CutAblation = Literal["mean", "zero"]
"""Ablations that fold into constants."""


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """How a circuit is compiled and checked."""

    ablation: CutAblation = "mean"
    """What stands in for a cut edge in the compact model."""
    images: int = 1024
    """Training images, as many of each class, over which mean ablation averages; all of them
    where there are fewer."""
    verify_images: int = 64
    """Images on which compact and masked model are compared."""
    seed: int = 0
    """Seed of the choice of images."""

    def __post_init__(self) -> None:
        require_one_of("ablation of a cut", self.ablation, get_args(CutAblation))
        require_at_least("images", self.images, 1)
        require_at_least("verify_images", self.verify_images, 1)
        require_at_least("seed", self.seed, 0)
