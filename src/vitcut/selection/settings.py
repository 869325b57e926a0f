"""Settings of a selection under a budget. Loads no torch, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.names import RuntimeName, Tokens
from vitcut.settings import require_at_least, require_fraction, require_one_of, require_runtime

Scores = Literal["fisher", "random", "magnitude"]
"""How parts are scored: Fisher attribution, or one of two controls."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is cut, and how the parts are chosen."""

    target_macs: float | None = None
    """Most multiply-accumulates of the compact model, as a fraction of the dense model's."""
    target_latency: float | None = None
    """Latency of the compact model, as a fraction of the dense model's; both are measured on this
    machine."""
    runtime: RuntimeName = "onnxruntime"
    """The runtime in which the latency is measured."""
    scores: Scores = "fisher"
    """How parts are scored: by the predicted rise of the KL divergence, or by a control."""
    joint: bool = True
    """Whether scores account for parts that are cut together; otherwise they simply add up."""
    refresh_fraction: float = 0.125
    """For linear fills: the fraction of the heads or neurons of a layer and token kind that is cut
    before the residuals of the rest are updated (OBS). With 0, parts are scored as if replaced by
    their mean."""
    rounds: int = 3
    """Steps on the way to a budget of MACs; each is a point of the path."""
    rescore: bool = True
    """Whether to score the cut model again at every step, instead of keeping the first scores."""
    score_images: int = 232
    """Training images that parts are scored on, the same number from each class."""
    val_images: int = 512
    """Val images on which each point of the path is measured; all of them if there are fewer."""
    tokens: Tokens = "split"
    """Whether a part spans all tokens, or exists once per token kind."""
    seed: int = 0
    """Seed for random scores; on the command line, also for choosing images."""

    def __post_init__(self) -> None:
        for name in ("target_macs", "target_latency"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"{flag} must be above 0 and below 1 of dense, got {value!r}")
        if self.target_macs is not None and self.target_latency is not None:
            raise ConfigError("give target-macs or target-latency, got both")
        require_runtime(self.runtime)
        require_one_of("scores", self.scores, get_args(Scores))
        require_one_of("tokens", self.tokens, get_args(Tokens))
        for name in ("rounds", "score_images", "val_images"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("seed", self.seed, 0)
        require_fraction("refresh_fraction", self.refresh_fraction)
        if self.scores != "fisher" and self.joint:
            raise ConfigError(f"{self.scores} scores add up: give --joint false with them")

    @property
    def is_given(self) -> bool:
        """Whether a target is set."""
        return self.target_macs is not None or self.target_latency is not None
