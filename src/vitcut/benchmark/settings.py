"""Settings of the benchmark stage; loads no torch. What they do stands in `latency`."""

from dataclasses import dataclass

from vitcut.errors import ConfigError
from vitcut.names import RuntimeName
from vitcut.runtimes.table import require_runtime
from vitcut.settings import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Where, and how long, models are timed in turn."""

    runtimes: tuple[RuntimeName, ...] = ("torch", "onnxruntime")
    """What executes the models."""
    batches: tuple[int, ...] = (1, 64)
    """Images per call."""
    threads: int = 1
    """CPU threads of one call."""
    seconds: float = 2.5
    """Time spent on each model, runtime and batch size, after warm-up."""
    min_rounds: int = 11
    """Samples of each model, though they take longer than `seconds`."""
    min_sample_ms: float = 5.0
    """Shorter calls are repeated until a sample lasts this long."""
    seed: int = 0
    """Of the order in a round, and of the bootstrap."""

    def __post_init__(self) -> None:
        for name in self.runtimes:
            require_runtime(name)
        for batch in self.batches:
            require_at_least("batch", batch, 1)
        for name in ("runtimes", "batches"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                listed = ", ".join(map(str, values)) or "none"
                raise ConfigError(f"{name} must be one or more different ones, got {listed}")
        require_at_least("threads", self.threads, 1)
        require_positive("seconds", self.seconds)
        require_at_least("min_rounds", self.min_rounds, 3)
        require_positive("min_sample_ms", self.min_sample_ms)
        require_at_least("seed", self.seed, 0)
