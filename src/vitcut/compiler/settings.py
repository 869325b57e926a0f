"""Settings for cutting. Imports no torch, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.names import Ablation
from vitcut.settings import require_at_least, require_bounds, require_one_of, require_positive

CutAblation = Literal["mean", "zero", "linear"]
"""Ablations that fold into constants."""

_LEAST_RIDGE = 1e-9
"""Below it, features that are copies of each other make the fit singular."""


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """How a circuit is compiled and checked."""

    ablation: CutAblation | None = None
    """What stands in for a cut part in the compact model. Linear predicts cut heads and neurons
    from the ones that are kept beside them. By default the circuit's own ablation (mean instead of
    resample), or linear for a budget."""
    images: int = 1024
    """Training images that fills are averaged or fitted over, the same number from each class; all
    of them if there are fewer."""
    ridge: float | None = None
    """For linear fills: added to the diagonal of the covariance, as a fraction of its mean. By
    default it is chosen by cross-validation for each layer and token kind."""
    merge: bool = False
    """Bring edges back where targets can then share a sum and that saves predicted time."""
    batch: int = 64
    """Images per call that the compact model is optimised for. It decides whether the weights of
    heads with few queries are merged, and a latency budget is measured with it."""
    costs: str | None = None
    """File of costs by which plans are chosen, written by `vitcut checks --save`; by default the
    shipped costs."""
    memory_gib: float = 16.0
    """Most memory of the process, in GiB. A search or a linear fit that would need more, with what
    is loaded already, is refused before it starts."""
    verify_images: int = 64
    """Val images on which the compact and the masked model are compared."""
    seed: int = 0
    """Seed for choosing images."""

    def __post_init__(self) -> None:
        if self.ablation is not None:
            require_one_of("ablation of a cut", self.ablation, get_args(CutAblation))
        if self.ridge is not None and not self.ridge >= _LEAST_RIDGE:
            raise ConfigError(f"ridge must be at least {_LEAST_RIDGE:g}, got {self.ridge}")
        require_positive("memory-gib", self.memory_gib)
        require_at_least("images", self.images, 1)
        require_bounds("batch", self.batch)
        require_at_least("verify_images", self.verify_images, 1)
        require_bounds("seed", self.seed)

    def ablation_for(self, circuit: Ablation | None) -> CutAblation:
        """What stands in for cut parts, given a circuit's own ablation, or None for a budget."""
        if self.ablation is not None:
            return self.ablation
        if circuit is None:
            return "linear"
        return "mean" if circuit == "resample" else circuit
