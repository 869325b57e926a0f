"""Settings of a whole run: one per stage, in one file. Loads no torch."""

from dataclasses import dataclass, field

from vitcut.benchmark.settings import BenchSettings
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError
from vitcut.images.settings import DataSettings
from vitcut.model.settings import VitSettings
from vitcut.names import EdgeAblation
from vitcut.selection.settings import Budget
from vitcut.settings import require_positive
from vitcut.training.settings import FinetuneSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Train a ViT, find its circuits at several tau, cut each, and measure all of them."""

    task: str = "animals"
    """Name of a shipped task, or path of a label file."""
    data: DataSettings = field(default_factory=DataSettings)
    """The images."""
    vit: VitSettings = field(default_factory=VitSettings)
    """The dense model."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """Its training."""
    discover: DiscoverSettings = field(default_factory=DiscoverSettings)
    """The search; its tau and ablation are replaced by each of ``taus`` and ``ablations``."""
    taus: tuple[float, ...] = (0.01,)
    """ACDC's thresholds in nats; one point each."""
    ablations: tuple[EdgeAblation, ...] = ("resample",)
    """What stands in for cut edges while searching; each at every tau."""
    select: Budget = field(default_factory=Budget)
    """One more point, cut to a budget under linear ablation; none where there is no budget."""
    repair: FinetuneSettings | None = None
    """The repair of that point; none if None."""
    cut: CutSettings = field(default_factory=CutSettings)
    """The compilation; merging is for the points of ``taus``, not for that of a budget."""
    bench: BenchSettings = field(default_factory=BenchSettings)
    """The timing."""

    def __post_init__(self) -> None:
        if self.repair is not None and not self.select.has_budget:
            raise ConfigError("repair needs a budget: give select.target_macs")
        for tau in self.taus:
            require_positive("taus", tau)
        for name, values in (("taus", self.taus), ("ablations", self.ablations)):
            if not values or len(set(values)) < len(values):
                listed = ", ".join(map(str, values)) or "none"
                raise ConfigError(f"{name} must be one or more different ones, got {listed}")


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """Fine-tune a compact model, give the dense one the same repair, and measure both."""

    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    """Of both."""
    repair_dense: bool = True
    """Whether the dense model is repaired too."""
    repaired_dense: str | None = None
    """A run directory whose repaired dense model is taken, if its settings are the same."""
    bench: BenchSettings = field(default_factory=BenchSettings)
    """The timing."""

    def __post_init__(self) -> None:
        if self.repaired_dense is not None and not self.repair_dense:
            raise ConfigError(
                f"repaired_dense is {self.repaired_dense!r} and repair_dense is false: "
                "leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class CutWords:
    """How to ask for a cut, in the words of an interface."""

    circuit: str = "a run directory or circuit.json"
    """What gives a circuit."""
    budget: str = "target-macs 0.2, or target-latency 0.25"
    merging: str = "merge what came of it: vitcut cut RUN --merge"
    """What follows a cut to a budget whose streams are to be merged."""


def require_budget_or(
    select: Budget,
    circuit: object | None,
    *,
    merge: bool = False,
    words: CutWords | None = None,
) -> None:
    """Check that a cut has a budget or a circuit, not both, and merges no budget.

    Raises:
        ConfigError: It has neither or both, or a budget is to be merged.
    """
    said = words or CutWords()
    if circuit is None and not select.has_budget:
        raise ConfigError(f"cut needs a circuit ({said.circuit}), or a budget: {said.budget}")
    if circuit is not None and select.has_budget:
        raise ConfigError("cut takes a circuit or a budget, got both: leave one of them out")
    if select.has_budget and merge:
        raise ConfigError(
            "merge brings edges back to a circuit that is there, got a budget: cut to the "
            f"budget first, then {said.merging}"
        )
