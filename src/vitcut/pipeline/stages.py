"""The stages on one model and task: find circuits, cut them, measure what came of it.

Each takes and gives values; run directories and resuming are left to ``run`` and ``commands``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vitcut.benchmark.evaluation import Evaluation, evaluate
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.artefact import ModelInfo
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs, dense_macs
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.settings import CutSettings
from vitcut.compiler.verify import Exactness, verify
from vitcut.discovery.acdc import acdc
from vitcut.discovery.cache import Cache, require_room
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import CircuitError
from vitcut.images.images import ImageSet
from vitcut.images.pairs import make_pairs
from vitcut.images.stratified import choose_evenly
from vitcut.masked.fill import Fill
from vitcut.masked.oracle import Examples, Oracle
from vitcut.pipeline.costs import cost_model
from vitcut.pipeline.fills import Fills
from vitcut.pipeline.merging import merge, merge_facts
from vitcut.pipeline.subject import Subject
from vitcut.results import Point, Results
from vitcut.runtime import describe_machine
from vitcut.settings import as_plain

DENSE = "dense"
CLASS_ONLY = "class-only"
"""The uncut circuit, compiled: exact, and the fairer baseline (its last block is class-only)."""
DENSE_REPAIRED = "dense-repaired"
"""The dense model, fine-tuned as the cut one was: what a repair is compared with."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A compact model and the proof that it computes the masked model."""

    model: CompactViT
    circuit: Circuit
    """Under the ablation that it was cut with."""
    fill: Fill
    """What stands in for what it cuts."""
    exactness: Exactness
    faithfulness: dict[str, Any]
    """KL on the calibration images under the ablations of discovery and of the cut; what merging
    came to, where that was asked for."""


class Discovery:
    """One model, one set of pairs; a circuit for any tau, all from the same cached activations."""

    def __init__(self, subject: Subject, config: DiscoverSettings) -> None:
        """Draw the pairs and trace their images.

        Raises:
            ConfigError: Fewer training images than asked for, or too little memory allowed.
        """
        self._subject = subject
        self._config = config
        examples = examples_of(subject, config)
        # Before the oracle measures the full model, which takes minutes of a large one.
        require_room(subject.weights, examples, config)
        self._oracle = Oracle(subject.weights, examples, config.ablation, tokens=config.tokens)
        self._cache = Cache.build(subject.weights, self._oracle, config)

    def find(self, tau: float, *, log: Path | None = None) -> Circuit:
        """Search the circuit for one tau; ``log`` is appended to, or continued after a kill."""
        config = replace(self._config, tau=tau)
        weights = self._subject.weights
        search = acdc(weights, self._oracle, config, cache=self._cache, log=log)
        provenance: dict[str, Any] = {
            "model": self._subject.model.name,
            "weight_hash": self._subject.model.weight_hash,
            "images_fingerprint": self._subject.images.fingerprint,
            "settings": as_plain(config),
            "kl": search.kl,
            "pairs": len(self._oracle.examples.clean),
            "node_evaluations": search.node_evaluations,
            "oracle_calls": search.oracle_calls,
            "precision": search.precision,
            "seconds": None if search.seconds is None else round(search.seconds, 2),
        }
        return Circuit(
            graph=self._oracle.graph,
            kept=search.kept,
            ablation=config.ablation,
            method=config.method,
            task=self._subject.task.name,
            tau=tau,
            provenance=provenance,
        )


def examples_of(subject: Subject, config: DiscoverSettings) -> Examples:
    """The calibration images and their pairing."""
    images = subject.images.calibration(config.images, seed=config.seed)
    groups = subject.task.group_of_class[images.labels]
    pairs = make_pairs(groups, config.pairs, seed=config.seed)
    return Examples(
        pixels=subject.normalise(images.all()),
        clean=pairs.clean,
        corrupted=pairs.corrupted,
        group_of_class=subject.group_of_class,
    )


def cut_circuit(
    subject: Subject,
    circuit: Circuit,
    config: CutSettings,
    *,
    fills: Fills | None = None,
) -> Cut:
    """Compile a circuit, check the result, and measure it again under the cut's ablation.

    Streams are merged before that where the settings say so; a linear fill is fitted to the merged
    circuit.

    Args:
        subject: The model and images that the circuit was found on.
        circuit: Under any ablation.
        config: The ablation of the cut, and on what it is checked.
        fills: To share what they compute between circuits.

    Raises:
        CircuitError: The circuit is of another model.
        ExactnessError: The compact model does not compute the masked one.
    """
    _require_same_weights(subject, circuit)
    costs = cost_model(config.batch)
    parent = circuit.with_ablation(config.ablation_for(circuit.ablation))
    final = merge(subject, parent, costs) if config.merge else parent
    fills = fills or Fills(subject, config)
    fill = fills.of(final)
    model = compile_circuit(subject.weights, final, fill, costs=costs)
    model.info = _model_info(subject)
    val = subject.images.val
    chosen = choose_evenly(val.labels, min(config.verify_images, len(val)), seed=config.seed)
    pixels = subject.normalise(val.read(chosen))
    exactness = verify(model, subject.weights, final, fill, pixels)
    faithfulness = _faithfulness(subject, circuit, final, model)
    if config.merge:
        before = None
        if final is not parent:
            before = compile_circuit(subject.weights, parent, fills.of(parent), costs=costs)
        faithfulness["merge"] = merge_facts(subject, before, model, final)
    return Cut(
        model=model,
        circuit=final,
        fill=fill,
        exactness=exactness,
        faithfulness=faithfulness,
    )


def evaluate_points(
    subject: Subject, points: Mapping[str, tuple[Point, nn.Module]]
) -> dict[str, Evaluation]:
    """What the dense model and each point answer on the test images, by name."""
    images = subject.images.test
    dense = _evaluated(subject, subject.model.model, images)
    others = {
        name: _evaluated(subject, model, images, dense) for name, (_, model) in points.items()
    }
    return {DENSE: dense, **others}


def measure(
    subject: Subject,
    points: Mapping[str, tuple[Point, nn.Module]],
    config: BenchSettings,
    *,
    evaluations: Mapping[str, Evaluation] | None = None,
) -> Results:
    """Accuracy on the test images and interleaved latency, of the dense model and points.

    Args:
        subject: The dense model and the images.
        points: By name: what is known of a point so far, and its model.
        config: Runtimes, batch sizes and times.
        evaluations: What `evaluate_points` gave, where it is there already.
    """
    found = evaluate_points(subject, points) if evaluations is None else evaluations
    results = Results(task=subject.task.name, machine=describe_machine())
    everything = {DENSE: (dense_point(subject), subject.model.model), **points}
    models = {name: model for name, (_, model) in everything.items()}
    measured = {name: _with_accuracy(point, found[name]) for name, (point, _) in everything.items()}
    # Few images are repeated to fill the largest batch.
    positions = np.resize(np.arange(len(subject.images.test)), max(config.batches))
    pixels = subject.normalise(subject.images.test.read(positions))
    baselines = tuple(name for name in (DENSE, CLASS_ONLY) if name in models)
    report = measure_latency(models, pixels, config, baselines=baselines)
    timed = {
        name: replace(point, latency=report.latencies[name]) for name, point in measured.items()
    }
    others = tuple(point for name, point in timed.items() if name != DENSE)
    return replace(results, dense=timed[DENSE], points=others, comparisons=report.comparisons)


def dense_point(subject: Subject) -> Point:
    """What is known of the dense model before it is measured."""
    graph = subject.weights.graph
    return Point(
        name=DENSE,
        edges_total=graph.num_useful_edges,
        edges_kept=graph.num_useful_edges,
        heads_total=graph.num_layers * graph.num_heads,
        heads_kept=graph.num_layers * graph.num_heads,
        neurons_kept_fraction=1.0,
        macs=dense_macs(subject.weights.shape),
        params=num_params(subject.model.model),
        bytes=num_bytes(subject.model.model),
    )


def class_only(subject: Subject, *, batch: int = 64) -> tuple[Point, CompactViT]:
    """The second baseline of every cut: the uncut circuit, compiled; it is not saved."""
    circuit = Circuit.full(subject.weights.graph, ablation="zero")
    cut = cut_circuit(subject, circuit, CutSettings(ablation="zero", batch=batch))
    return cut_point(CLASS_ONLY, cut), cut.model


def cut_point(
    name: str,
    cut: Cut,
    *,
    seconds: float | None = None,
    circuit: str | None = None,
    model: str | None = None,
) -> Point:
    """What is known of a cut model before it is measured.

    Args:
        name: Of the point.
        cut: The compact model and its circuit.
        seconds: That finding and cutting it took.
        circuit: Path of the circuit, relative to the results file.
        model: Path of the model directory, relative to the results file.
    """
    return replace(
        circuit_point(name, cut.circuit),
        macs=count_macs(cut.model.plan),
        max_abs_diff=cut.exactness.max_abs_diff,
        seconds=seconds,
        faithfulness=cut.faithfulness,
        circuit=circuit,
        model=model,
        params=num_params(cut.model),
        bytes=num_bytes(cut.model),
    )


def circuit_point(name: str, circuit: Circuit) -> Point:
    """What a circuit says of itself."""
    graph = circuit.graph
    return Point(
        name=name,
        method=circuit.method,
        granularity="edge" if circuit.neurons is None else "part",
        ablation=circuit.ablation,
        tau=circuit.tau,
        edges_total=graph.num_useful_edges,
        edges_kept=circuit.num_kept,
        heads_total=graph.num_layers * graph.num_heads,
        heads_kept=circuit.num_heads_kept,
        neurons_kept_fraction=circuit.neurons_kept_fraction,
    )


def num_params(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(tensor.numel() for tensor in model.parameters())


def num_bytes(model: nn.Module) -> int:
    """What a model's weights take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _with_accuracy(point: Point, found: Evaluation) -> Point:
    return replace(
        point,
        accuracy_fine=found.accuracy_fine,
        accuracy_coarse=found.accuracy_coarse,
        kl=found.kl,
        images=found.images,
        confusion=found.confusion,
    )


def _evaluated(
    subject: Subject, model: nn.Module, images: ImageSet, dense: Evaluation | None = None
) -> Evaluation:
    return evaluate(
        model,
        images,
        group_of_class=subject.task.group_of_class,
        preprocess=subject.normalise,
        reference_log_probs=None if dense is None else dense.log_probs,
    )


def _faithfulness(
    subject: Subject, found: Circuit, final: Circuit, model: CompactViT
) -> dict[str, Any]:
    """KL on the images of discovery, then and now; None where there are no such images."""
    settings, kl = found.provenance.get("settings"), found.provenance.get("kl")
    if settings is None or kl is None:
        return {"discovery": None, "cut": None}
    discovery = {"ablation": found.discovered_under, "kl": kl}
    if found.provenance.get("images_fingerprint") != subject.images.fingerprint:
        return {"discovery": discovery, "cut": None}
    images = subject.images.calibration(settings["images"], seed=settings["seed"])
    dense = _evaluated(subject, subject.model.model, images)
    as_cut = _evaluated(subject, model, images, dense).kl
    return {"discovery": discovery, "cut": {"ablation": final.ablation, "kl": as_cut}}


def _require_same_weights(subject: Subject, circuit: Circuit) -> None:
    found, own = circuit.provenance.get("weight_hash"), subject.model.weight_hash
    if found not in {None, own}:
        raise CircuitError(
            f"the circuit was found in a model whose weights hash to {str(found)[:12]}, those of "
            f"{subject.model.name!r} hash to {own[:12]}: use the model that it was found in"
        )


def _model_info(subject: Subject) -> ModelInfo:
    task = subject.task
    return ModelInfo(
        mean=subject.model.mean,
        std=subject.model.std,
        class_names=task.class_names,
        group_names=task.groups,
        group_of_class=tuple(task.group_of_class.tolist()),
        source_model=subject.model.name,
        source_sha256=subject.model.weight_hash,
        framing=subject.images.framing,
    )
