"""Settings of the benchmark stage. Loads no torch."""

from dataclasses import dataclass

from vitcut.errors import ConfigError
from vitcut.names import RuntimeName
from vitcut.settings import require_at_least, require_bounds, require_positive, require_runtime


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How models are timed; they take turns."""

    runtimes: tuple[RuntimeName, ...] = ("torch", "onnxruntime")
    """Runtimes that execute the models."""
    batches: tuple[int, ...] = (1, 64)
    """Images per call."""
    threads: int = 1
    """CPU threads per call."""
    seconds: float = 2.5
    """Time spent on each model, runtime and batch size, after warm-up."""
    min_rounds: int = 7
    """Least number of samples per model, even if they take longer than `seconds`."""
    min_sample_ms: float = 5.0
    """Shorter calls are repeated until a sample lasts this long."""
    seed: int = 0
    """Seed for the order of models within a round, and for the bootstrap."""

    def __post_init__(self) -> None:
        for name in self.runtimes:
            require_runtime(name)
        for batch in self.batches:
            require_bounds("batch", batch)
        for name in ("runtimes", "batches"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                listed = ", ".join(map(str, values)) or "none"
                raise ConfigError(f"{name} must be one or more different ones, got {listed}")
        require_at_least("min_rounds", self.min_rounds, 3)
        require_at_least("threads", self.threads, 1)
        require_bounds("seed", self.seed)
        for name in ("seconds", "min_sample_ms"):
            require_positive(name, getattr(self, name))
