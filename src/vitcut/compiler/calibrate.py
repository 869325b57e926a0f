"""Fit a cost model to the machine at hand: measure random compact models in ONNX Runtime."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.plan import Plan, ViTShape
from vitcut.compiler.cost import CostModel, Unit
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import ConfigError
from vitcut.graph import Graph
from vitcut.progress import say
from vitcut.settings import require_at_least

_BATCHES = (1, 64)
_HELD_OUT = 4
"""Every fourth model is predicted only."""
_WITH_EDGES = 3
"""Every third circuit cuts edges."""
_PRIOR_WEIGHT = 0.03
"""How strongly each cost is drawn to the one it starts from, so that costs that the measured plans
do not tell apart keep their proportions."""
_LEAST, _MOST = 0.05, 20.0
"""What a cost may become, as a multiple of the one it starts from."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The latency of one compact model."""

    plan: Plan
    batch: int
    """Images per call."""
    latency_ms: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Costs fitted to this machine, and how well they predict."""

    costs: CostModel
    """Fitted to all models that were measured."""
    models: int
    """How many were measured, at each of two batch sizes."""
    error_before: float
    """Median of |predicted / measured - 1| with the costs used so far, on held-out models."""
    error_after: float
    """The same with costs fitted to the other models."""


def calibrate(
    shape: ViTShape,
    graph: Graph,
    *,
    models: int,
    seconds: float,
    seed: int = 0,
    costs: CostModel | None = None,
) -> Calibration:
    """Measure random compact models in ONNX Runtime on one thread, and fit costs to them.

    Nothing is written: ``calibration.costs.save(path)`` keeps the costs.

    Args:
        shape: The sizes of the original model; its weights do not matter.
        graph: Its graph, per token kind.
        models: How many circuits to compile and measure; at least 3.
        seconds: Time spent on each model and batch size.
        seed: Seed of the circuits.
        costs: The costs used so far, whose errors are given for comparison; the shipped costs if
            None. The fit starts from the shipped costs in any case, so that calibrating again and
            again does not drift.

    Raises:
        ConfigError: There are too few models, or no time.
    """
    require_at_least("models", models, 3)
    say(f"measuring {models} compact models in ONNX Runtime on one thread")
    images = torch.zeros(max(_BATCHES), shape.channels, shape.image_size, shape.image_size)
    # Half of them are planned for one image, half for many, and all are measured at both sizes.
    plans = [
        plan_circuit(shape, circuit, CostModel(batch=_BATCHES[number // _HELD_OUT % 2]))
        for number, circuit in enumerate(random_circuits(graph, shape, models, seed))
    ]
    compact = {f"model {number}": CompactViT(plan).eval() for number, plan in enumerate(plans)}
    config = BenchSettings(runtimes=("onnxruntime",), batches=_BATCHES, seconds=seconds)
    report = measure_latency(compact, images, config, baselines=())
    measured = [
        Measured(plan=plan, batch=batch, latency_ms=own[number].median_ms)
        for number, batch in enumerate(_BATCHES)
        for plan, own in zip(plans, report.latencies.values(), strict=True)
    ]
    # A model is held out at every batch size, as its latencies resemble each other.
    seen, unseen = (
        [
            item
            for number, item in enumerate(measured)
            if (number % models % _HELD_OUT == 1) == held_out
        ]
        for held_out in (False, True)
    )
    before, after = (
        float(np.median(abs(relative_errors(unseen, item))))
        for item in (costs or CostModel(), fit_costs(seen, CostModel()))
    )
    fitted = fit_costs(measured, CostModel())
    return Calibration(costs=fitted, models=models, error_before=before, error_after=after)


def random_circuits(graph: Graph, shape: ViTShape, count: int, seed: int) -> Iterator[Circuit]:
    """Circuits from nearly all parts to nearly none; every third cuts edges of a block as well.

    Later blocks lose more than earlier ones, patches more than the class token. Random edges of all
    blocks would give every target a stream of its own: a graph that takes minutes to export.
    """
    random = np.random.default_rng(seed)
    depth = np.linspace(1.0, 0.4, graph.num_layers)[:, None]
    kinds = np.linspace(1.0, 0.6, graph.num_kinds)[None]
    for number in range(count):
        # Shares of heads and of neurons that are kept, shape [blocks, kinds].
        heads, neurons = (random.uniform(0.02, 1.2) * depth * kinds for _ in range(2))
        kept_heads = (
            random.random((graph.num_layers, graph.num_heads, graph.num_kinds)) < heads[:, None]
        )
        kept_heads[:, 0, 0] = True
        kept_neurons = (
            random.random((graph.num_layers, graph.num_kinds, shape.hidden)) < neurons[..., None]
        )
        circuit = Circuit.of_parts(graph, heads=kept_heads, neurons=kept_neurons, ablation="linear")
        if number % _WITH_EDGES == 0:
            edges = random.random(circuit.kept.shape) < random.uniform(0.3, 1.0)
            edges[: graph.num_kinds] = True
            layer = random.integers(graph.num_layers)
            edges[:, [target.layer != layer for target in graph.targets]] = True
            circuit = replace(circuit, kept=circuit.kept & edges)
        yield circuit


def fit_costs(measured: Sequence[Measured], start: CostModel) -> CostModel:
    """The costs that explain measured latencies best.

    All costs are first scaled to the machine's speed. Then factors f of the costs minimise the sum
    of squared relative errors, sum_i (sum_u f_u t_iu - 1)^2, where t_iu is the share of the
    measured time of model i that unit u is predicted to take, plus the prior's
    weight^2 x models x sum_u (f_u - 1)^2. Costs stay positive.

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
    shares = [
        [counts[unit] * start.nanoseconds[unit] / 1e6 / item.latency_ms for unit in units]
        for item in measured
        for counts in [replace(start, batch=item.batch).count(item.plan)]
    ]
    prior = _PRIOR_WEIGHT * np.sqrt(len(measured))
    rows = np.vstack([np.array(shares), prior * np.eye(len(units))])
    targets = np.concatenate([np.ones(len(measured)), np.full(len(units), prior)])
    factors = _bounded_least_squares(rows, targets)
    nanoseconds = {
        unit: float(start.nanoseconds[unit] * factor)
        for unit, factor in zip(units, factors, strict=True)
    }
    return replace(start, nanoseconds=nanoseconds, origin="calibrated")


def relative_errors(measured: Sequence[Measured], costs: CostModel) -> NDArray[np.float64]:
    """Predicted / measured latency - 1 of each model."""
    return np.array(
        [
            replace(costs, batch=item.batch).latency_ms(item.plan) / item.latency_ms - 1
            for item in measured
        ]
    )


def _bounded_least_squares(
    rows: NDArray[np.float64], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Factors between the bounds, by coordinate descent.

    The problem is convex and its bounds are per coordinate, so it ends at the optimum.
    """
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
