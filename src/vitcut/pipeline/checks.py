"""Checks of the machine at hand: what there is, and how long a compact model's operations take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.plan import ViTShape
from vitcut.compiler.calibrate import Measured, fit_costs, relative_errors
from vitcut.compiler.cost import CostModel
from vitcut.compiler.planning import plan_circuit
from vitcut.graph import Graph
from vitcut.model.tracing import read_model
from vitcut.pipeline.costs import cost_model, save_costs
from vitcut.pipeline.subject import load_dense
from vitcut.progress import say

_BATCHES = (1, 64)
_HELD_OUT = 4
"""Every fourth model is predicted only."""
_WITH_EDGES = 3
"""Every third circuit cuts edges."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What measuring some compact models here came to."""

    models: int
    """How many were measured, at each of two batch sizes."""
    error_before: float
    """Median of |predicted / measured - 1| with the costs so far, on models not fitted to."""
    error_after: float
    """The same with the fitted costs."""


def calibrate(model: str, *, models: int, seconds: float, seed: int = 0) -> Calibration:
    """Measure random compact models in ONNX Runtime on one thread, and fit the costs to them.

    Args:
        model: Gives the sizes; its weights do not matter.
        models: How many circuits.
        seconds: Time spent on each, for each batch size.
        seed: Of the circuits.
    """
    weights = read_model(load_dense(model).model)
    shape, graph = weights.shape, weights.split_graph
    circuits = list(random_circuits(graph, shape, models, seed))
    measured = measure_circuits(shape, circuits, seconds=seconds)
    fitted, held_out = divide(measured, models)
    costs = cost_model(1), fit_costs(fitted, CostModel())
    before, after = (float(np.median(abs(relative_errors(held_out, item)))) for item in costs)
    save_costs(fit_costs(measured, CostModel()))
    return Calibration(models=models, error_before=before, error_after=after)


def random_circuits(graph: Graph, shape: ViTShape, count: int, seed: int) -> Iterator[Circuit]:
    """Circuits from nearly all parts to nearly none; every third cuts edges of a block as well.

    Later blocks lose more than earlier ones, patches more than the class token. Random edges of all
    blocks would give every target a stream of its own: a graph that takes minutes to export.
    """
    random = np.random.default_rng(seed)
    depth = np.linspace(1.0, 0.4, graph.num_layers)[:, None]
    groups = np.linspace(1.0, 0.6, graph.num_kinds)[None]
    for number in range(count):
        heads, neurons = (random.uniform(0.02, 1.2) * depth * groups for _ in range(2))
        kept_heads = (
            random.random((graph.num_layers, graph.num_heads, graph.num_kinds)) < (heads[:, None])
        )
        kept_heads[:, 0, 0] = True
        kept_neurons = (
            random.random((graph.num_layers, graph.num_kinds, shape.hidden)) < (neurons[..., None])
        )
        circuit = Circuit.of_parts(graph, heads=kept_heads, neurons=kept_neurons, ablation="linear")
        if number % _WITH_EDGES == 0:
            edges = random.random(circuit.kept.shape) < random.uniform(0.3, 1.0)
            edges[: graph.num_kinds] = True
            layer = random.integers(graph.num_layers)
            edges[:, [target.layer != layer for target in graph.targets]] = True
            circuit = replace(circuit, kept=circuit.kept & edges)
        yield circuit


def measure_circuits(
    shape: ViTShape, circuits: Sequence[Circuit], *, seconds: float
) -> list[Measured]:
    """Latencies of freshly initialised compact models in ONNX Runtime on one thread.

    Half of them are planned for one image, half for many, and all are measured at both.
    """
    say(f"measuring {len(circuits)} compact models in ONNX Runtime on one thread")
    images = torch.zeros(max(_BATCHES), shape.channels, shape.image_size, shape.image_size)
    plans = [
        plan_circuit(shape, circuit, CostModel(batch=_BATCHES[number // _HELD_OUT % 2]))
        for number, circuit in enumerate(circuits)
    ]
    models = {f"model {number}": CompactViT(plan).eval() for number, plan in enumerate(plans)}
    config = BenchSettings(runtimes=("onnxruntime",), batches=_BATCHES, seconds=seconds)
    report = measure_latency(models, images, config, baselines=())
    latencies = [{item.batch: item.median_ms for item in own} for own in report.latencies.values()]
    return [
        Measured(plan=plan, batch=batch, latency_ms=own[batch])
        for batch in _BATCHES
        for plan, own in zip(plans, latencies, strict=True)
    ]


def divide(measured: Sequence[Measured], models: int) -> tuple[list[Measured], list[Measured]]:
    """Latencies to fit costs to, and those of models that are held out at every batch size.

    Args:
        measured: As `measure_circuits` gives it: all models at one batch size, then at the next.
        models: How many.
    """
    held_out = [number % models % _HELD_OUT == 1 for number in range(len(measured))]
    pairs = list(zip(measured, held_out, strict=True))
    return [item for item, out in pairs if not out], [item for item, out in pairs if out]
