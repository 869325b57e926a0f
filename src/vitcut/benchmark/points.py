"""Measure a dense model and the points made of it: accuracy on test images, interleaved latency."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from vitcut.benchmark.bootstrap import paired_interval
from vitcut.benchmark.evaluation import Evaluation, compare, evaluate
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.compact.operations import dense_macs
from vitcut.errors import ConfigError
from vitcut.images.load import Images, normalise
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing
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
        positions_kept_fraction=1.0,
        macs=dense_macs(model.weights.shape),
        params=sum(tensor.numel() for tensor in model.module.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def add_accuracy(point: Point, found: Evaluation) -> Point:
    """A point with what its model answered."""
    return replace(
        point,
        accuracy_fine=found.accuracy_fine,
        accuracy_coarse=found.accuracy_coarse,
        kl=found.kl,
        images=found.images,
        confusion=found.confusion,
    )


def measure_accuracy(
    images: Images,
    model: tuple[Point, nn.Module, Preprocessing],
    against: tuple[Point, nn.Module, Preprocessing] | Evaluation | None = None,
) -> tuple[Results, Evaluation]:
    """Evaluate a model on the test images, beside another one if there is one; nothing is timed.

    Args:
        images: Of the task of both.
        model: What is known of it, its module, and how it takes images.
        against: The other one, or what it answered on the same images: the reference of the KL
            divergence and of the difference.

    Raises:
        ConfigError: The other one was evaluated on other images.
    """
    point, module, preprocessing = model
    other, points = None, [point]
    if against is not None:
        answered = isinstance(against, Evaluation)
        start = Point(name=against.name or "the other") if answered else against[0]
        # Two modules of one class have the same name.
        name = f"{start.name} (2)" if start.name == point.name else start.name
        points.append(replace(start, name=name))
        if answered and against.fingerprint not in {None, images.fingerprint}:
            raise ConfigError(
                "the other model was evaluated on other images or for another task: evaluate both "
                "on the same"
            )
        task = images.task
        other = against if answered else evaluate(against[1], images.test, task, against[2])
        other = replace(other, name=name, fingerprint=images.fingerprint)
    found = evaluate(module, images.test, images.task, preprocessing, reference=other)
    found = replace(found, name=point.name, against=other, fingerprint=images.fingerprint)
    if other is not None:
        difference = compare(points[0].name, found, points[1].name, other)
        found = replace(found, difference=difference)
    measured = [found] if other is None else [found, other]
    results = Results(
        task=images.task.name,
        machine=describe_machine(),
        points=tuple(map(add_accuracy, points, measured)),
    )
    return results, found


def evaluate_points(model: Model, images: Images, points: Points) -> dict[str, Evaluation]:
    """What the dense model and each point answer on the test images, by name.

    The class-only model computes the dense one's function, which is checked when it is compiled: it
    has the same answers, and is not run again.
    """
    task, preprocessing = images.task, model.preprocessing
    # All on the device of the dense model: only then are their times comparable.
    for _, module in points.values():
        module.to(model.weights.device)
    dense = evaluate(model.module, images.test, task, preprocessing)
    return {DENSE: dense} | {
        name: replace(dense, kl=0.0)
        if name == CLASS_ONLY
        else evaluate(module, images.test, task, preprocessing, reference=dense)
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
            add_accuracy(point, found[name]),
            **_change(found, name, seed=settings.seed),
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
