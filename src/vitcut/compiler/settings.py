"""Settings for cutting. Imports no torch, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.names import Ablation
from vitcut.settings import require_at_least, require_one_of, require_positive

CutAblation = Literal["mean", "zero", "linear"]
"""Ablations that fold into constants."""

_LEAST_RIDGE = 1e-9
"""Below it, features that are copies of each other make the fit singular."""


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """How a circuit is compiled and checked."""

    ablation: CutAblation | None = None
    """What stands in for a cut part in the compact model. Linear predicts cut heads and neurons
    from those that are kept beside them. None means the circuit's own ablation, mean in place of
    resample, and linear for a budget."""
    images: int = 1024
    """Training images that fills are averaged and fitted over, the same number of each class; all
    images where there are fewer."""
    ridge: float | None = None
    """Of linear fills: added to the diagonal of the covariance, as a fraction of its mean. None
    means that cross-validation chooses it for each layer and token kind."""
    merge: bool = False
    """Whether to bring edges back where that saves predicted time, as targets then share a sum."""
    batch: int = 64
    """Images per call that the compact model is made for. Decides whether the weights of heads with
    few queries are merged; a latency budget is measured with it."""
    costs: str | None = None
    """File of the costs that plans are chosen by, as `vitcut checks --save` writes it; the shipped
    costs if None."""
    memory_gib: float = 16.0
    """Memory limit in GiB for the activations of a fit or of scoring parts."""
    verify_images: int = 64
    """Images on which the compact and the masked model are compared."""
    seed: int = 0
    """Seed for the choice of images."""

    def __post_init__(self) -> None:
        if self.ablation is not None:
            require_one_of("ablation of a cut", self.ablation, get_args(CutAblation))
        if self.ridge is not None and not self.ridge >= _LEAST_RIDGE:
            raise ConfigError(f"ridge must be at least {_LEAST_RIDGE:g}, got {self.ridge}")
        require_positive("memory-gib", self.memory_gib)
        require_at_least("images", self.images, 1)
        require_at_least("batch", self.batch, 1)
        require_at_least("verify_images", self.verify_images, 1)
        require_at_least("seed", self.seed, 0)

    def ablation_for(self, circuit: Ablation | None) -> CutAblation:
        """What stands in for cut parts, given a circuit's own ablation, or None for a budget."""
        if self.ablation is not None:
            return self.ablation
        if circuit is None:
            return "linear"
        return "mean" if circuit == "resample" else circuit
