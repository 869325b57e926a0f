"""Bootstrap intervals: how far a median or a mean of samples could be off by chance."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_CHUNK = 64
"""Resamples held in memory at a time."""
_PERCENTILES = (2.5, 97.5)


def median_interval(samples: NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median of samples, shape [samples]."""
    return _interval(samples, np.median, seed)


def mean_interval(samples: NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of samples, shape [samples]."""
    return _interval(samples, np.mean, seed)


def _interval(
    samples: NDArray[np.float64], statistic: Callable[..., NDArray[np.float64]], seed: int
) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    drawn: list[NDArray[np.float64]] = []
    for start in range(0, _RESAMPLES, _CHUNK):
        rows = min(_CHUNK, _RESAMPLES - start)
        picks = rng.integers(0, len(samples), size=(rows, len(samples)))
        drawn.append(statistic(samples[picks], axis=1))
    low, high = np.percentile(np.concatenate(drawn), _PERCENTILES)
    return float(low), float(high)
