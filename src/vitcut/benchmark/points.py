"""Measure a dense model and the points made of it: accuracy on test images, interleaved latency."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from vitcut.benchmark.bootstrap import paired_interval
from vitcut.benchmark.evaluation import Evaluation, evaluate
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.compact.operations import dense_macs
from vitcut.images.load import Images, normalise
from vitcut.model.model import Model
from vitcut.results import CLASS_ONLY, DENSE, Point, Results
from vitcut.runtime import describe_machine

Points = Mapping[str, tuple[Point, nn.Module]]
"""By name: what is known of a point so far, and its model."""


def dense_point(model: Model, *, name: str = DENSE) -> Point:
    """What is known of a dense model before it is measured."""
    graph = model.weights.graph
    tensors = model.module.state_dict().values()
    return Point(
        name=name,
        edges_total=graph.num_useful_edges,
        edges_kept=graph.num_useful_edges,
        heads_total=graph.num_layers * graph.num_heads,
        heads_kept=graph.num_layers * graph.num_heads,
        neurons_kept_fraction=1.0,
        macs=dense_macs(model.weights.shape),
        params=sum(tensor.numel() for tensor in model.module.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def evaluate_points(model: Model, images: Images, points: Points) -> dict[str, Evaluation]:
    """What the dense model and each point answer on the test images, by name."""
    task, preprocessing = images.task, model.preprocessing
    dense = evaluate(model.module, images.test, task, preprocessing)
    return {DENSE: dense} | {
        name: evaluate(module, images.test, task, preprocessing, reference=dense)
        for name, (_, module) in points.items()
    }


def measure(
    model: Model,
    images: Images,
    points: Points,
    settings: BenchSettings,
    *,
    evaluations: Mapping[str, Evaluation] | None = None,
) -> Results:
    """Measure the dense model and all points, each latency in turn with those of the others.

    Args:
        model: The dense model, for the task of the images.
        images: Accuracy is measured on their test split.
        points: The points.
        settings: Runtimes, batch sizes and times.
        evaluations: What `evaluate_points` gave, where it is there already.
    """
    found = evaluate_points(model, images, points) if evaluations is None else evaluations
    everything = {DENSE: (dense_point(model), model.module), **points}
    # Few images are repeated to fill the largest batch.
    positions = np.resize(np.arange(len(images.test)), max(settings.batches))
    report = measure_latency(
        {name: module for name, (_, module) in everything.items()},
        normalise(images.test.read(positions), model.preprocessing),
        settings,
        baselines=tuple(name for name in (DENSE, CLASS_ONLY) if name in everything),
    )
    measured = {
        name: replace(
            point,
            accuracy_fine=found[name].accuracy_fine,
            accuracy_coarse=found[name].accuracy_coarse,
            **_change(found, name, seed=settings.seed),
            kl=found[name].kl,
            images=found[name].images,
            confusion=found[name].confusion,
            latency=report.latencies[name],
        )
        for name, (point, _) in everything.items()
    }
    dense = measured.pop(DENSE)
    return Results(
        task=images.task.name,
        machine=describe_machine(),
        dense=dense,
        points=tuple(measured.values()),
        comparisons=report.comparisons,
    )


def _change(found: Mapping[str, Evaluation], name: str, *, seed: int) -> dict[str, float | None]:
    """The interval of a point's change in coarse accuracy; none for the dense model itself."""
    if name == DENSE:
        return {"change_low": None, "change_high": None}
    own, dense = found[name].correct_coarse, found[DENSE].correct_coarse
    low, high = paired_interval(own, dense, seed=seed)
    return {"change_low": low, "change_high": high}
