"""Settings of a selection under a budget. Loads no torch, so that ``--help`` stays fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.names import RuntimeName, Tokens
from vitcut.settings import (
    require_at_least,
    require_bounds,
    require_fraction,
    require_one_of,
    require_positive,
    require_runtime,
)

Scores = Literal["fisher", "random", "magnitude"]
"""How parts are scored: Fisher attribution, or one of two controls."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is cut, and how the parts are chosen."""

    target_macs: float | tuple[float, ...] | str | None = None
    """Most multiply-accumulates of the compact model, as a fraction of the dense model's. Several,
    separated by commas (0.5,0.3,0.2): one search reaches them all, and each becomes a model."""
    target_latency: float | None = None
    """Latency of the compact model, as a fraction of the dense model's; both are measured on this
    machine."""
    max_drop: float | None = None
    """Most coarse accuracy that the cut may lose, in points: the smallest cut is sought for which
    the 95 % interval of the loss on val images stays within it."""
    runtime: RuntimeName = "onnxruntime"
    """The runtime in which the latency is measured."""
    scores: Scores = "fisher"
    """How parts are scored: by the predicted rise of the KL divergence, or by a control."""
    joint: bool = True
    """Whether scores account for parts that are cut together; otherwise they simply add up."""
    shrink: bool = True
    """Whether interactions between parts are shrunk by what is chance, given so few images (Ledoit
    and Wolf); otherwise they are taken as they are."""
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
    positions: bool = True
    """Whether patches of the image may be left out, the same ones for every image."""
    seed: int = 0
    """Seed for random scores, and for the random signs by which a task of more than nine groups is
    scored; on the command line, also for choosing images."""

    def __post_init__(self) -> None:
        macs = self.target_macs
        if isinstance(macs, (str, tuple, list)):
            macs = _falling(macs)
            object.__setattr__(self, "target_macs", macs[0] if len(macs) == 1 else macs)
        for name, values in (("target-macs", self.macs), ("target-latency", [self.target_latency])):
            for value in values:
                if value is not None and not 0 < value < 1:
                    raise ConfigError(f"{name} must be above 0 and below 1 of dense, got {value!r}")
        names = ("target_macs", "target_latency", "max_drop")
        given = [name.replace("_", "-") for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"give one of target-macs, target-latency and max-drop, got {' and '.join(given)}"
            )
        if self.max_drop is not None:
            require_positive("max-drop", self.max_drop)
            if not self.rescore:
                raise ConfigError("max-drop takes cuts back: leave out rescore=false")
        require_runtime(self.runtime)
        require_one_of("scores", self.scores, get_args(Scores))
        require_one_of("tokens", self.tokens, get_args(Tokens))
        for name in ("rounds", "score_images", "val_images"):
            require_at_least(name, getattr(self, name), 1)
        require_bounds("seed", self.seed)
        require_fraction("refresh_fraction", self.refresh_fraction)
        if self.scores != "fisher" and self.joint:
            raise ConfigError(f"{self.scores} scores add up: give --joint false with them")

    @property
    def macs(self) -> tuple[float, ...]:
        """The MACs to reach, in falling order; none where something else is the budget."""
        if self.target_macs is None:
            return ()
        if isinstance(self.target_macs, (int, float)):
            return (float(self.target_macs),)
        return _falling(self.target_macs)

    @property
    def is_given(self) -> bool:
        """Whether a target is set."""
        return any(
            target is not None for target in (self.target_macs, self.target_latency, self.max_drop)
        )


def _falling(given: str | Sequence[float]) -> tuple[float, ...]:
    """Numbers, from the largest to the smallest, each once; several are told apart by 4 digits."""
    listed = given.split(",") if isinstance(given, str) else given
    try:
        values = [float(value) for value in listed]
    except ValueError:
        raise ConfigError(
            f"target-macs must be a fraction of dense, such as 0.3, or several, such as "
            f"0.5,0.3,0.2, got {given!r}"
        ) from None
    if len(values) > 1:
        values = [round(value, 4) for value in values]
    return tuple(sorted(set(values), reverse=True))
