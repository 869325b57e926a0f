"""Scores of parts: what methods that rank parts return."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """One score in nats per part of a graph; NaN where there is no such part."""

    heads: NDArray[np.float64]
    """Shape [blocks, heads, kinds]."""
    neurons: NDArray[np.float64]
    """Shape [blocks, kinds, neurons]."""
    edges: NDArray[np.float64] | None
    """Shape [sources, targets]; None where they were not asked for."""
