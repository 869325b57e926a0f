"""Fitting a cost model to latencies that were measured on some machine.

Measuring them is left to the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from vitcut.compact.plan import Plan
from vitcut.compiler.cost import CostModel, Unit, count_operations
from vitcut.errors import ConfigError

_PRIOR_WEIGHT = 0.03
"""How strongly each cost is drawn to the one it starts from: what the measured plans do not tell
apart keeps its proportions."""
_LEAST, _MOST = 0.05, 20.0
"""What a cost may become, as a multiple of the one it starts from."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The latency of one compact model."""

    plan: Plan
    batch: int
    """Images per call."""
    latency_ms: float


def fit_costs(measured: Sequence[Measured], start: CostModel) -> CostModel:
    """The costs that explain measured latencies best.

    All costs are scaled to the machine's speed; then the sum of squared relative errors is
    minimised, plus that of how far each cost is from where it starts. Costs stay positive.

    Args:
        measured: Models that differ in what they do, at several batch sizes.
        start: Costs of a similar machine.

    Raises:
        ConfigError: There is nothing measured.
    """
    if not measured:
        raise ConfigError("costs are fitted to measured latencies, got none")
    units: tuple[Unit, ...] = get_args(Unit)
    slower = 1 / float(np.median(1 + relative_errors(measured, start)))
    start = replace(
        start, nanoseconds={unit: slower * cost for unit, cost in start.nanoseconds.items()}
    )
    rows = np.array([_terms(item, start, units) for item in measured])
    rows = np.vstack([rows, _PRIOR_WEIGHT * np.sqrt(len(measured)) * np.eye(len(units))])
    targets = np.ones(len(rows))
    targets[len(measured) :] = _PRIOR_WEIGHT * np.sqrt(len(measured))
    factors = _bounded_least_squares(rows, targets)
    nanoseconds = {
        unit: float(start.nanoseconds[unit] * factor)
        for unit, factor in zip(units, factors, strict=True)
    }
    return replace(start, nanoseconds=nanoseconds)


def relative_errors(measured: Sequence[Measured], costs: CostModel) -> NDArray[np.float64]:
    """Predicted over measured latency less 1, one for each."""
    return np.array(
        [
            replace(costs, batch=item.batch).latency_ms(item.plan) / item.latency_ms - 1
            for item in measured
        ]
    )


def _terms(item: Measured, costs: CostModel, units: Sequence[Unit]) -> list[float]:
    """What each unit takes of the measured time by the costs that there are."""
    counts = count_operations(item.plan, replace(costs, batch=item.batch))
    return [counts[unit] * costs.nanoseconds[unit] / 1e6 / item.latency_ms for unit in units]


def _bounded_least_squares(
    rows: NDArray[np.float64], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Coordinate descent; the problem is convex, so it ends at the optimum."""
    factors = np.ones(rows.shape[1])
    squares = (rows**2).sum(axis=0)
    for _ in range(2000):
        before = factors.copy()
        for column in range(rows.shape[1]):
            rest = targets - rows @ factors + rows[:, column] * factors[column]
            factors[column] = np.clip(rows[:, column] @ rest / squares[column], _LEAST, _MOST)
        if np.abs(factors - before).max() < 1e-7:
            break
    return factors
