"""Settings of circuit discovery; no torch, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.names import Criterion, EdgeAblation, PairMode, Tokens
from vitcut.settings import require_at_least, require_one_of, require_positive

Method = Literal["acdc"]
"""Discovery methods that give a circuit."""

Precision = Literal["float32", "float64"]
"""Of fast, filtering computations."""


@dataclass(frozen=True, kw_only=True)
class DiscoverSettings:
    """How a circuit is looked for."""

    method: Method = "acdc"
    """The algorithm."""
    tau: float = 0.01
    """ACDC cuts an edge when the mean KL divergence rises by less than this, in nats."""
    ablation: EdgeAblation = "mean"
    """What stands in for a cut edge while searching."""
    tokens: Tokens = "all"
    """Whether edges are over whole tokens, or exist once per token kind (cls, register, patch)."""
    criterion: Criterion = "increment"
    """Whether the rise of the KL divergence, or its total, is compared with tau."""
    images: int = 128
    """Calibration images, drawn from the training images, as many of each class."""
    pairs: PairMode = "one_random"
    """Corrupted images per clean image."""
    seed: int = 0
    """Seed of the choice of images and pairs."""
    memory_gib: float = 8.0
    """Most memory that a search may take beside model and images, in GiB."""
    precision: Precision = "float32"
    """Of the fast path. Decisions near tau are made in float64 in any case."""

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)
        require_positive("memory-gib", self.memory_gib)
        require_at_least("images", self.images, 2)
        require_at_least("seed", self.seed, 0)
        for name, value, allowed in (
            ("method", self.method, Method),
            ("ablation of a search", self.ablation, EdgeAblation),
            ("tokens", self.tokens, Tokens),
            ("criterion", self.criterion, Criterion),
            ("pairs", self.pairs, PairMode),
            ("precision", self.precision, Precision),
        ):
            require_one_of(name, value, get_args(allowed))
