"""The latency protocol: several models timed in turn, in one runtime, at one batch size.

Load comes and goes on a machine, so models are compared round by round: in every round each is
timed once, in a shuffled order, and a speed-up is the median of the ratios within rounds.
"""

import gc
import math
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vitcut.benchmark.bootstrap import median_interval
from vitcut.benchmark.load import foreign_cores, read_cpu_times
from vitcut.benchmark.settings import BenchSettings
from vitcut.errors import ConfigError
from vitcut.names import RuntimeName
from vitcut.progress import Meter, say
from vitcut.results import Comparison, Latency
from vitcut.runtimes.session import Session, prepare_sessions, torch_threads
from vitcut.shapes import Float, Tensor

_WARM_UP_CALLS = 3
_WARM_UP_MS = 50.0
_MAX_ROUNDS = 300
_BUSY_FRACTION = 0.25
"""Of all cores: what other processes may use before samples are said to spread."""


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """What timing several models gave."""

    latencies: dict[str, tuple[Latency, ...]]
    """By model, one for each runtime and batch size."""
    comparisons: tuple[Comparison, ...]
    """Of every model with every other that is a baseline."""


def measure_latency(
    models: Mapping[str, nn.Module],
    images: Float[Tensor, "images channels y x"],
    config: BenchSettings,
    *,
    baselines: tuple[str, ...],
) -> LatencyReport:
    """Time models in turn in every runtime and at every batch size of the settings.

    Args:
        models: By name; each takes the same images.
        images: Normalised; repeated where a batch needs more.
        config: Runtimes, batch sizes, threads and time.
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
    examples = [_first(images, batch) for batch in config.batches]
    latencies: dict[str, list[Latency]] = {name: [] for name in models}
    comparisons: list[Comparison] = []
    for runtime in config.runtimes:
        prepared = _prepare(models, examples, runtime, config.threads)
        for position, example in enumerate(examples):
            sessions = {name: several[position] for name, several in prepared.items()}
            before = read_cpu_times()
            samples = time_sessions(sessions, example, config)
            _say_if_busy(foreign_cores(before, read_cpu_times()))
            for name, session in sessions.items():
                latencies[name].append(_latency(session, samples[name]))
                comparisons += [
                    _compare(name, baseline, session, samples, config.seed)
                    for baseline in baselines
                    if name != baseline
                ]
    return LatencyReport(
        latencies={name: tuple(items) for name, items in latencies.items()},
        comparisons=tuple(comparisons),
    )


def time_sessions(
    sessions: Mapping[str, Session],
    example: Float[Tensor, "batch channels y x"],
    config: BenchSettings,
) -> dict[str, NDArray[np.float64]]:
    """Time sessions of one runtime and batch size in turn.

    Args:
        sessions: By name.
        example: The batch that each of them runs.
        config: Threads, time and seed.

    Returns:
        For each session its milliseconds per batch, shape [rounds]; samples with the same number
        belong to the same round.
    """
    rng = np.random.default_rng(config.seed)
    names = list(sessions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with torch_threads(config.threads), _without_garbage_collection():
        calls = {
            name: _calls_per_sample(session, example, config) for name, session in sessions.items()
        }
        round_ms = sum(
            _sample_ms(sessions[name], example, calls[name]) * calls[name] for name in names
        )
        rounds = _rounds(round_ms, len(names), config)
        session = sessions[names[0]]
        label = f"timing {len(names)} models, {session.runtime}, batch {len(example)}"
        with Meter(label, rounds, unit="rounds") as meter:
            for _ in range(rounds):
                for position in rng.permutation(len(names)):
                    name = names[position]
                    samples[name].append(_sample_ms(sessions[name], example, calls[name]))
                meter.advance()
    return {name: np.array(values) for name, values in samples.items()}


def _first(images: Tensor, batch: int) -> Tensor:
    """The first images, from the start again where there are too few."""
    return images.repeat(math.ceil(batch / len(images)), 1, 1, 1)[:batch].contiguous()


def _prepare(
    models: Mapping[str, nn.Module], examples: list[Tensor], runtime: RuntimeName, threads: int
) -> dict[str, tuple[Session, ...]]:
    """For each model one session per example."""
    sessions: dict[str, tuple[Session, ...]] = {}
    with Meter(f"converting for {runtime}", len(models), unit="models") as meter:
        for name, module in models.items():
            sessions[name] = prepare_sessions(runtime, module, examples, threads=threads)
            meter.advance()
    return sessions


def _calls_per_sample(session: Session, example: Tensor, config: BenchSettings) -> int:
    """Warm a session up, and count the calls that make a sample long enough to be timed."""
    calls_ms: list[float] = []
    while len(calls_ms) < _WARM_UP_CALLS or sum(calls_ms) < _WARM_UP_MS:
        calls_ms.append(_sample_ms(session, example, 1))
    return math.ceil(config.min_sample_ms / min(calls_ms))


def _sample_ms(session: Session, example: Tensor, calls: int) -> float:
    """Milliseconds per call, over that many calls."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        session.run(example)
    return (time.perf_counter_ns() - start) / calls / 1e6


def _rounds(round_ms: float, models: int, config: BenchSettings) -> int:
    wanted = int(config.seconds * 1000 * models / round_ms)
    return max(config.min_rounds, min(wanted, _MAX_ROUNDS))


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


def _compare(
    name: str,
    baseline: str,
    session: Session,
    samples: Mapping[str, NDArray[np.float64]],
    seed: int,
) -> Comparison:
    ratios = samples[baseline] / samples[name]
    low, high = median_interval(ratios, seed=seed)
    return Comparison(
        point=name,
        against=baseline,
        runtime=session.runtime,
        batch=session.batch,
        threads=session.threads,
        ratio=float(np.median(ratios)),
        low=low,
        high=high,
    )


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


def _say_if_busy(foreign: float | None) -> None:
    cores = os.cpu_count() or 1
    if foreign is not None and foreign > _BUSY_FRACTION * cores:
        say(
            f"other processes kept {foreign:.1f} of {cores} cores busy meanwhile: these latencies "
            "spread"
        )
