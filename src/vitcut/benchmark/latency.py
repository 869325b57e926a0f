"""The latency protocol: several models timed in turn, in one runtime, at one batch size.

Load on a machine comes and goes, so models are compared round by round: every round times each
model once, in a shuffled order, and a speed-up is the median of the ratios within rounds.
"""

import gc
import math
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vitcut.benchmark.bootstrap import bootstrap_interval
from vitcut.benchmark.settings import BenchSettings
from vitcut.errors import ConfigError
from vitcut.progress import Meter, say
from vitcut.results import Comparison, Latency
from vitcut.runtimes.session import Session, prepare_sessions, torch_threads
from vitcut.shapes import Float, Tensor

_WARM_UP_CALLS = 3
_WARM_UP_MS = 50.0
_MAX_ROUNDS = 300
_BUSY_FRACTION = 0.25
"""Of all cores: what other processes may use before latencies are said to spread."""
_STAT = Path("/proc/stat")
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Of the line "cpu": user, nice, system, irq, softirq, steal; not idle and iowait."""
_LEAST_LOAD_S = 0.2
"""The kernel counts in ticks of 10 ms, too coarse for anything shorter."""


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """The result of timing several models."""

    latencies: dict[str, tuple[Latency, ...]]
    """By model, one for each runtime and batch size."""
    comparisons: tuple[Comparison, ...]
    """Of every model with every other that is a baseline."""


def measure_latency(
    models: Mapping[str, nn.Module],
    images: Float[Tensor, "images channels y x"],
    settings: BenchSettings,
    *,
    baselines: tuple[str, ...],
) -> LatencyReport:
    """Time models in turn in every runtime and at every batch size of the settings.

    Args:
        models: By name; each takes the same images.
        images: Normalised; repeated where a batch needs more.
        settings: Runtimes, batch sizes, threads and time.
        baselines: The models that all others are compared with.

    Raises:
        ConfigError: A baseline is not among the models, or there are no images.
        ExactnessError: A runtime computes something else than torch.
    """
    unknown = [name for name in baselines if name not in models]
    if unknown:
        raise ConfigError(f"baselines must be among {', '.join(models)}, got {unknown[0]!r}")
    if not len(images):
        raise ConfigError("timing needs at least one image, got none")
    examples = [
        images.repeat(math.ceil(batch / len(images)), 1, 1, 1)[:batch].contiguous()
        for batch in settings.batches
    ]
    latencies: dict[str, list[Latency]] = {name: [] for name in models}
    comparisons: list[Comparison] = []
    for runtime in settings.runtimes:
        prepared: dict[str, tuple[Session, ...]] = {}
        with Meter(f"converting for {runtime}", len(models), unit="models") as meter:
            for name, module in models.items():
                prepared[name] = prepare_sessions(
                    runtime, module, examples, threads=settings.threads
                )
                meter.advance()
        for position, example in enumerate(examples):
            sessions = {name: several[position] for name, several in prepared.items()}
            before = read_cpu_times()
            samples = time_sessions(sessions, example, settings)
            foreign, cores = foreign_cores(before, read_cpu_times()), os.cpu_count() or 1
            if foreign is not None and foreign > _BUSY_FRACTION * cores:
                say(
                    f"other processes kept {foreign:.1f} of {cores} cores busy meanwhile: these "
                    "latencies spread"
                )
            for name, session in sessions.items():
                latencies[name].append(_latency(session, samples[name]))
                for baseline in baselines:
                    if name == baseline:
                        continue
                    ratios = samples[baseline] / samples[name]
                    low, high = bootstrap_interval(ratios, np.median, seed=settings.seed)
                    comparisons.append(
                        Comparison(
                            point=name,
                            against=baseline,
                            runtime=runtime,
                            batch=session.batch,
                            threads=session.threads,
                            ratio=float(np.median(ratios)),
                            low=low,
                            high=high,
                        )
                    )
    return LatencyReport(
        latencies={name: tuple(items) for name, items in latencies.items()},
        comparisons=tuple(comparisons),
    )


def time_sessions(
    sessions: Mapping[str, Session],
    example: Float[Tensor, "batch channels y x"],
    settings: BenchSettings,
) -> dict[str, NDArray[np.float64]]:
    """Time sessions of one runtime and batch size in turn.

    Args:
        sessions: By name.
        example: The batch that each of them runs.
        settings: Threads, time and seed.

    Returns:
        For each session its milliseconds per batch, shape [rounds]; samples with the same number
        belong to the same round.
    """
    rng = np.random.default_rng(settings.seed)
    names = list(sessions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    # The way of the images to a GPU is not timed.
    examples = {name: example.to(session.device) for name, session in sessions.items()}
    with torch_threads(settings.threads), _without_garbage_collection():
        calls, round_ms = dict[str, int](), 0.0
        for name, session in sessions.items():
            # Warm up: the fastest of these calls says how many make a sample that can be timed.
            calls_ms: list[float] = []
            while len(calls_ms) < _WARM_UP_CALLS or sum(calls_ms) < _WARM_UP_MS:
                calls_ms.append(_sample_ms(session, examples[name], 1))
            calls[name] = math.ceil(settings.min_sample_ms / min(calls_ms))
            round_ms += calls[name] * min(calls_ms)
        wanted = int(settings.seconds * 1000 * len(names) / round_ms)
        rounds = max(settings.min_rounds, min(wanted, _MAX_ROUNDS))
        runtime = sessions[names[0]].runtime
        label = f"timing {len(names)} models, {runtime}, batch {len(example)}"
        with Meter(label, rounds, unit="rounds") as meter:
            for _ in range(rounds):
                for position in rng.permutation(len(names)):
                    name = names[position]
                    took = _sample_ms(sessions[name], examples[name], calls[name])
                    samples[name].append(took)
                meter.advance()
    return {name: np.array(values) for name, values in samples.items()}


def _sample_ms(session: Session, example: Tensor, calls: int) -> float:
    """Milliseconds per call, over that many calls."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        session.run(example)
    return (time.perf_counter_ns() - start) / calls / 1e6


@contextmanager
def _without_garbage_collection() -> Generator[None]:
    """Keep the collector from pausing a sample."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _latency(session: Session, samples: NDArray[np.float64]) -> Latency:
    p10, median, p90 = (float(value) for value in np.percentile(samples, (10, 50, 90)))
    return Latency(
        runtime=session.runtime,
        device=session.device,
        dtype=session.dtype,
        batch=session.batch,
        threads=session.threads,
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        images_per_s=session.batch * 1000 / median,
    )


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """Seconds since some moment in the past."""

    machine_s: float
    """Of all cores together, busy."""
    own_s: float
    """Of this process, on all its threads."""
    wall_s: float


def read_cpu_times() -> CpuTimes | None:
    """The CPU time spent so far; None where the system does not tell, which only Linux does."""
    if not _STAT.exists():
        return None
    ticks = [int(field) for field in _STAT.read_text().partition("\n")[0].split()[1:]]
    own = os.times()
    return CpuTimes(
        machine_s=sum(ticks[field] for field in _BUSY_FIELDS) / os.sysconf("SC_CLK_TCK"),
        own_s=own.user + own.system,
        wall_s=own.elapsed,
    )


def foreign_cores(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Cores that other processes kept busy between two readings, on average.

    None where a reading is missing, or where they are too close to each other to tell.
    """
    if before is None or after is None or after.wall_s - before.wall_s < _LEAST_LOAD_S:
        return None
    own_s = after.own_s - before.own_s
    foreign_s = after.machine_s - before.machine_s - own_s
    return max(0.0, foreign_s / (after.wall_s - before.wall_s))
