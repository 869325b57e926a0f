"""Checks of the machine at hand: what there is, and how long a compact model's operations take."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchConfig
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.plan import Plan, ViTShape
from vitcut.compiler.calibration import Measured, fit_costs, relative_errors
from vitcut.compiler.cost import CostModel
from vitcut.compiler.planning import plan_circuit, shape_of
from vitcut.graph import Graph
from vitcut.intervention.tracing import read_model
from vitcut.pipeline.costs import cost_model, save_costs
from vitcut.progress import say
from vitcut.vits.loading import load_model

_BATCHES = (1, 64)
_HELD_OUT = 3
"""Every third model is predicted only."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What measuring some compact models here came to."""

    models: int
    """How many were measured, at each of two batch sizes."""
    error_before: float
    """Median of |predicted / measured - 1| with the costs so far, on models not fitted to."""
    error_after: float
    """The same with the fitted costs."""
    costs: CostModel


def calibrate(model: str, *, models: int, seconds: float, seed: int = 0) -> Calibration:
    """Measure random compact models in ONNX Runtime on one thread, and fit the costs to them.

    Args:
        model: Gives the sizes; its weights do not matter.
        models: How many circuits.
        seconds: Time spent on each, for each batch size.
        seed: Of the circuits.
    """
    weights = read_model(load_model(model).model)
    shape, graph = shape_of(weights), weights.split_graph
    plans = [plan_circuit(shape, circuit) for circuit in random_parts(graph, shape, models, seed)]
    measured = measure_plans(plans, seconds=seconds)
    fitted, held_out = _divide(measured)
    start = cost_model(1)
    costs = fit_costs(fitted, start)
    errors = [float(np.median(abs(relative_errors(held_out, item)))) for item in (start, costs)]
    save_costs(fit_costs(measured, start))
    return Calibration(models=models, error_before=errors[0], error_after=errors[1], costs=costs)


def random_parts(graph: Graph, shape: ViTShape, count: int, seed: int) -> Iterator[Circuit]:
    """Circuits of heads and neurons, from nearly all to nearly none of them.

    Later blocks lose more than earlier ones, patches more than the class token.
    """
    random = np.random.default_rng(seed)
    depth = np.linspace(1.0, 0.4, graph.num_layers)[:, None]
    groups = np.linspace(1.0, 0.6, graph.num_groups)[None]
    for _ in range(count):
        heads, neurons = (random.uniform(0.02, 1.2) * depth * groups for _ in range(2))
        kept_heads = (
            random.random((graph.num_layers, graph.num_heads, graph.num_groups)) < (heads[:, None])
        )
        kept_heads[:, 0, 0] = True
        kept_neurons = (
            random.random((graph.num_layers, graph.num_groups, shape.hidden)) < (neurons[..., None])
        )
        yield Circuit.of_parts(graph, heads=kept_heads, neurons=kept_neurons, ablation="linear")


def measure_plans(plans: list[Plan], *, seconds: float) -> list[Measured]:
    """Latencies of freshly initialised compact models in ONNX Runtime on one thread."""
    shape = plans[0].shape
    models = {f"model {number}": CompactViT(plan).eval() for number, plan in enumerate(plans)}
    say(f"measuring {len(plans)} compact models in ONNX Runtime on one thread")
    config = BenchConfig(runtimes=("onnxruntime",), batches=_BATCHES, seconds=seconds)
    images = torch.zeros(max(_BATCHES), shape.channels, shape.image_size, shape.image_size)
    report = measure_latency(models, images, config, baselines=())
    return [
        Measured(plan=plan, batch=item.batch, latency_ms=item.median_ms)
        for plan, items in zip(plans, report.latencies.values(), strict=True)
        for item in items
    ]


def _divide(measured: list[Measured]) -> tuple[list[Measured], list[Measured]]:
    of_model = [number // len(_BATCHES) for number in range(len(measured))]
    held_out = [number % _HELD_OUT == 0 for number in of_model]
    pairs = list(zip(measured, held_out, strict=True))
    return [item for item, out in pairs if not out], [item for item, out in pairs if out]
