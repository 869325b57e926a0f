"""Settings of a whole run: one per stage, in one file. Loads no torch."""

from dataclasses import dataclass, field

from vitcut.benchmark.settings import BenchConfig
from vitcut.compiler.settings import CutConfig
from vitcut.config import require_positive
from vitcut.discovery.settings import DiscoverConfig
from vitcut.errors import ConfigError
from vitcut.images.settings import DataConfig
from vitcut.model.settings import VitConfig
from vitcut.names import EdgeAblation
from vitcut.selection.settings import SelectConfig
from vitcut.training.settings import FinetuneConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Train a ViT, find its circuits at several tau, cut each, and measure all of them."""

    task: str = "animals"
    """Name of a shipped task, or path of a label file."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    vit: VitConfig = field(default_factory=VitConfig)
    """The dense model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Its training."""
    discover: DiscoverConfig = field(default_factory=DiscoverConfig)
    """The search; its tau and ablation are replaced by each of ``taus`` and ``ablations``."""
    taus: tuple[float, ...] = (0.01,)
    """ACDC's thresholds in nats; one point each."""
    ablations: tuple[EdgeAblation, ...] = ("resample",)
    """What stands in for cut edges while searching; each at every tau."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """One more point, cut to a budget under linear ablation; none where there is no budget."""
    repair: FinetuneConfig | None = None
    """The repair of that point; none if None."""
    cut: CutConfig = field(default_factory=CutConfig)
    """The compilation; merging is for the points of ``taus``, not for that of a budget."""
    bench: BenchConfig = field(default_factory=BenchConfig)
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
class RepairConfig:
    """Fine-tune a compact model, give the dense one the same repair, and measure both."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Of both."""
    repair_dense: bool = True
    """Whether the dense model is repaired too."""
    repaired_dense: str | None = None
    """A run directory whose repaired dense model is taken, if its settings are the same."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    """The timing."""

    def __post_init__(self) -> None:
        if self.repaired_dense is not None and not self.repair_dense:
            raise ConfigError(
                f"repaired_dense is {self.repaired_dense!r} and repair_dense is false: "
                "leave one of them out"
            )
