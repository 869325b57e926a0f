"""Settings of selection by budget; no torch, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.names import RuntimeName, Tokens
from vitcut.settings import require_at_least, require_fraction, require_one_of, require_runtime

Scores = Literal["fisher", "random", "magnitude"]
"""What parts are chosen by."""


@dataclass(frozen=True, kw_only=True)
class CutWords:
    """How to ask for a cut, in the words of an interface."""

    circuit: str = "a run directory or circuit.json"
    """What gives a circuit."""
    budget: str = "target-macs 0.2, or target-latency 0.25"
    merging: str = "merge what came of it: vitcut cut RUN --merge"
    """What follows a cut to a budget whose streams are to be merged."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How parts are chosen under a budget."""

    target_macs: float | None = None
    """Multiply-accumulates of the compact model as a fraction of the dense model's."""
    target_latency: float | None = None
    """Latency of the compact model as a fraction of the dense model's, measured here."""
    runtime: RuntimeName = "onnxruntime"
    """Of the latency."""
    scores: Scores = "fisher"
    """What parts are chosen by: the predicted rise of the KL, or a control."""
    joint: bool = True
    """Whether scores count what is cut together; otherwise they add up."""
    refresh_fraction: float = 0.125
    """Of linear fills: part of a layer's and kind's heads or neurons that is cut before the
    residuals of its others are brought up to date (OBS); 0 scores all as if they got the mean."""
    rounds: int = 5
    """Steps on the way to the budget; each is a point of the path."""
    rescore: bool = True
    """Whether the cut model is scored anew for every step; otherwise the first scores hold."""
    score_images: int = 232
    """Training images, as many of each class, on which parts are scored."""
    tokens: Tokens = "split"
    """Parts over whole tokens, or per token kind."""
    seed: int = 0
    """Seed of random scores; images are drawn with the seed of the cut."""

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
        for name in ("rounds", "score_images"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("seed", self.seed, 0)
        require_fraction("refresh_fraction", self.refresh_fraction)
        if self.scores != "fisher" and self.joint:
            raise ConfigError(f"{self.scores} scores add up: give --joint false with them")

    @property
    def has_budget(self) -> bool:
        """Whether a budget is given."""
        return self.target_macs is not None or self.target_latency is not None

    def require_budget_or(
        self, circuit: object | None, *, merge: bool = False, words: "CutWords | None" = None
    ) -> None:
        """Check that there is a budget or a circuit to cut to, not both.

        Args:
            circuit: The circuit, or where it is.
            merge: Whether streams are to be merged, which a budget does not allow for.
            words: How the caller says these things; None is the command line.

        Raises:
            ConfigError: There is neither, there are both, or a budget is to be merged.
        """
        said = words or CutWords()
        if circuit is None and not self.has_budget:
            raise ConfigError(f"cut needs a circuit ({said.circuit}), or a budget: {said.budget}")
        if circuit is not None and self.has_budget:
            raise ConfigError("cut takes a circuit or a budget, got both: leave one of them out")
        if self.has_budget and merge:
            raise ConfigError(
                "merge brings edges back to a circuit that is there, got a budget: cut to the "
                f"budget first, then {said.merging}"
            )
