"""Settings of circuit discovery; importing them loads no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.names import Criterion, EdgeAblation, PairMode, Tokens
from vitcut.settings import require_at_least, require_bounds, require_one_of, require_positive

Method = Literal["acdc"]
"""Discovery methods that find a circuit."""

Precision = Literal["float32", "float64"]
"""Precision of the fast path."""


@dataclass(frozen=True, kw_only=True)
class DiscoverSettings:
    """How a circuit is searched for."""

    method: Method = "acdc"
    """The algorithm."""
    tau: float = 0.01
    """ACDC cuts an edge if the mean KL divergence rises by less than this, in nats."""
    ablation: EdgeAblation = "mean"
    """What stands in for a cut edge during the search. Under resample, the circuit cannot be
    compiled as it is, and is cut under mean."""
    tokens: Tokens = "all"
    """Whether an edge spans all tokens, or exists once per token kind (cls, register, patch)."""
    criterion: Criterion = "increment"
    """What is compared with tau: how much the KL divergence rises, or its total."""
    images: int = 128
    """Calibration images, drawn from the training images in equal numbers per class."""
    pairs: PairMode = "one_random"
    """Corrupted images per clean image: one from each other group, or one at random."""
    seed: int = 0
    """Seed for choosing images and pairs."""
    memory_gib: float = 16.0
    """Most memory of the process, in GiB. A search that would need more, with what is loaded
    already, is refused before it starts."""
    precision: Precision = "float32"
    """Precision of the fast path; decisions near tau are always made in float64."""

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)
        require_positive("memory-gib", self.memory_gib)
        require_at_least("images", self.images, 2)
        require_bounds("seed", self.seed)
        for name, value, allowed in (
            ("method", self.method, Method),
            ("ablation of a search", self.ablation, EdgeAblation),
            ("tokens", self.tokens, Tokens),
            ("criterion", self.criterion, Criterion),
            ("pairs", self.pairs, PairMode),
            ("precision", self.precision, Precision),
        ):
            require_one_of(name, value, get_args(allowed))
