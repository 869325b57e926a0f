"""Bootstrap intervals: how far a median or a mean of samples could be off by chance."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import ConfigError

_RESAMPLES = 2000
_CHUNK = 64
"""Resamples held in memory at a time."""


def bootstrap_interval(
    samples: NDArray[np.float64], statistic: Callable[..., NDArray[np.float64]], *, seed: int
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic.

    Args:
        samples: Shape [samples].
        statistic: ``np.mean`` or ``np.median``, or what else takes an array and an ``axis``.
        seed: Of the resampling.

    Returns:
        Low and high end.
    """
    rng = np.random.default_rng(seed)
    drawn: list[NDArray[np.float64]] = []
    for start in range(0, _RESAMPLES, _CHUNK):
        rows = min(_CHUNK, _RESAMPLES - start)
        picks = rng.integers(0, len(samples), size=(rows, len(samples)))
        drawn.append(statistic(samples[picks], axis=1))
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return float(low), float(high)


def paired_interval(
    correct: NDArray[np.bool_], reference: NDArray[np.bool_], *, seed: int
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a difference in accuracy, images drawn in pairs.

    Pairs leave out what both models have in common, such as images that are hard for both.

    Args:
        correct: Whether a model is right, shape [images].
        reference: Whether the model that it is compared with is right on the same images.
        seed: Seed of the bootstrap.

    Returns:
        Low and high end of accuracy(model) - accuracy(reference), as fractions of 1.
    """
    if correct.shape != reference.shape or not correct.size:
        raise ConfigError(
            f"a paired comparison needs the same images, one or more: got {correct.size} and "
            f"{reference.size}"
        )
    difference = correct.astype(np.float64) - reference.astype(np.float64)
    return bootstrap_interval(difference, np.mean, seed=seed)
