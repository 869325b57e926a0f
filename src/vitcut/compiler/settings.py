"""Settings of cutting; no torch, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.names import Ablation
from vitcut.settings import require_at_least, require_one_of, require_positive

CutAblation = Literal["mean", "zero", "linear"]
"""Ablations that fold into constants."""


_LEAST_RIDGE = 1e-9
"""Below it, features that are copies of each other cannot be told apart."""


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """How a circuit is compiled and checked."""

    ablation: CutAblation | None = None
    """What stands in for a cut part in the compact model; linear predicts cut heads and neurons
    from those that are kept beside them. None: what stands in for them in the circuit, or mean
    where that is resample; linear for a budget."""
    images: int = 1024
    """Training images, as many of each class, over which fills are averaged and fitted; all of them
    where there are fewer."""
    ridge: float | None = None
    """Of linear fills: added to the covariance's diagonal, as a fraction of its mean; chosen for
    each layer and token kind by cross-validation if None."""
    merge: bool = False
    """Whether edges come back where that saves predicted time, as targets then share a sum."""
    batch: int = 64
    """Images per call that the compact model is made for: it decides whether weights of heads with
    few queries are merged, and a latency budget is measured with it."""
    memory_gib: float = 16.0
    """Most memory that the activations of a fit, or of scoring parts, may take, in GiB."""
    verify_images: int = 64
    """Images on which compact and masked model are compared."""
    seed: int = 0
    """Seed of the choice of images."""

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
        """What stands in for the cut parts of a circuit of an ablation; of a budget where None."""
        if self.ablation is not None:
            return self.ablation
        if circuit is None:
            return "linear"
        return "mean" if circuit == "resample" else circuit
