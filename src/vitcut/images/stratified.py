"""Seeded choices that treat all classes alike, for splits and calibration images."""

import numpy as np
from numpy.typing import NDArray


def choose_evenly(labels: NDArray[np.int64], count: int, *, seed: int) -> NDArray[np.int64]:
    """Choose ``count`` positions, equally many of each class as long as they last.

    A larger count includes the choice of a smaller one.

    Args:
        labels: Class numbers, shape [images].
        count: At most ``len(labels)``.
        seed: Equal seeds give equal choices.

    Returns:
        Ascending positions, shape [count].
    """
    rank, keys = _rank_in_class(labels, seed)
    return np.sort(np.lexsort((keys, rank))[:count])


def choose_fraction(labels: NDArray[np.int64], fraction: float, *, seed: int) -> NDArray[np.bool_]:
    """Choose a fraction of every class, rounded, but at least one image.

    Args:
        labels: Class numbers, shape [images].
        fraction: Between 0 and 1.
        seed: Equal seeds give equal choices.

    Returns:
        Whether each image is chosen, shape [images].
    """
    rank, _ = _rank_in_class(labels, seed)
    _, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    quota = np.maximum(1, np.round(sizes * fraction))
    return rank < quota[members]


def _rank_in_class(
    labels: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A random rank of each image within its class, from 0, and the random keys it comes from."""
    keys = np.random.default_rng(seed).random(len(labels))
    order = np.lexsort((keys, labels))
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    # Sorted by class, the rank is the position less the position where the class starts.
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return rank, keys
