"""Settings of a whole run: one per stage, in one file. Loads no torch."""

from dataclasses import dataclass, field

from vitcut.benchmark.settings import BenchConfig
from vitcut.compiler.settings import CutConfig
from vitcut.config import require_positive
from vitcut.data.settings import DataConfig
from vitcut.discovery.settings import DiscoverConfig
from vitcut.errors import ConfigError
from vitcut.training.settings import TrainConfig
from vitcut.vits.settings import VitConfig


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
    """The search; its tau is replaced by each of ``taus``."""
    taus: tuple[float, ...] = (0.01,)
    """ACDC's thresholds in nats; one point each."""
    cut: CutConfig = field(default_factory=CutConfig)
    """The compilation."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    """The timing."""

    def __post_init__(self) -> None:
        for tau in self.taus:
            require_positive("taus", tau)
        if not self.taus or len(set(self.taus)) < len(self.taus):
            raise ConfigError(f"taus must be one or more different numbers, got {self.taus}")
