"""A compact model in a run or model directory, and what is known of it. How it came is `points`."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from vitcut.circuit import Circuit
from vitcut.compact.artefact import CIRCUIT, CONFIG, TENSORS
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs
from vitcut.errors import ArtefactError, ModelError, TaskError
from vitcut.model.loading import weight_hash
from vitcut.pipeline.folder import choose_point
from vitcut.pipeline.points import MODEL_FOLDER, RECORD_FILE, point_name
from vitcut.pipeline.stages import circuit_point, num_bytes, num_params
from vitcut.pipeline.subject import Subject
from vitcut.results import Point, Results

_UNKNOWN = "cut"
"""The name of a point of which nothing is known."""


@dataclass(frozen=True, kw_only=True)
class StoredCut:
    """A compact model as it lies on disk."""

    folder: Path
    """The model directory."""
    model: CompactViT
    point: Point
    """What is known of it, measurements left out; it has no paths."""
    weight_hash: str

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> "StoredCut":
        """Load what a path means: a model directory, or a run directory's model.

        Args:
            path: A model directory, a run directory with ``model/``, or one with points.
            name: Which point.

        Raises:
            ArtefactError: There is no model, or several and ``name`` does not choose, or it is
                damaged.
        """
        folder = _find(path, name)
        model = CompactViT.from_pretrained(folder)
        point = replace(_known(folder), params=num_params(model), bytes=num_bytes(model))
        return cls(
            folder=folder,
            model=model,
            point=replace(point, macs=count_macs(model.plan)),
            weight_hash=weight_hash(model),
        )

    def point_from(self, out: Path) -> Point:
        """Its point in the results of another run directory."""
        circuit = self.folder / CIRCUIT
        there = circuit.is_file()
        return replace(
            self.point,
            model=os.path.relpath(self.folder, out),
            circuit=os.path.relpath(circuit, out) if there else None,
        )


def require_cut_of(model: CompactViT, subject: Subject) -> None:
    """Check that a compact model was cut from this model, for this task, and can learn.

    What the compact model does not say of itself is not checked.

    Raises:
        ModelError: It was cut from another model, or sees nothing of the image.
        TaskError: It tells other classes or groups apart.
    """
    require_sight(model)
    info, task = model.info, subject.task
    if info.source_sha256 not in {None, subject.model.weight_hash}:
        raise ModelError(
            f"the compact model was cut from weights that hash to {str(info.source_sha256)[:12]}, "
            f"those of {subject.model.name!r} hash to {subject.model.weight_hash[:12]}: give the "
            "model that it was cut from"
        )
    groups = tuple(task.group_of_class.tolist())
    same = (
        info.class_names in {(), task.class_names}
        and info.group_names in {(), task.groups}
        and info.group_of_class in {(), groups}
        and model.plan.shape.num_classes == len(task.classes)
    )
    if not same:
        raise TaskError(
            f"the compact model's classes or groups are not those of task {task.name!r}: use the "
            "label file that it was cut for"
        )


def require_sight(model: CompactViT) -> None:
    """Refuse a model whose logits are the same for every image.

    Raises:
        ModelError: It is one.
    """
    if not model.plan.readout or not model.plan.embeds:
        raise ModelError(
            "the compact model gives every image the same logits, so there is nothing to train: "
            "cut less"
        )


def _find(path: Path, name: str | None) -> Path:
    if name is None:
        for folder in (path / MODEL_FOLDER, path):
            if _is_model(folder):
                return folder
    points = sorted(path.glob(f"points/*/{MODEL_FOLDER}"))
    found = {folder.parent.name: folder for folder in points if _is_model(folder)}
    if not found:
        raise ArtefactError(
            f"no compact model at {path}: expected a run directory that `vitcut cut` wrote, or a "
            f"model directory with {CONFIG} and {TENSORS}"
        )
    return choose_point(found, name, path)


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / TENSORS).is_file()


def _known(folder: Path) -> Point:
    """From the record of the cut, else from the results beside it, else from the circuit."""
    record, results = folder.parent / RECORD_FILE, folder.parent / "results.json"
    for path in (record, results):
        points = Results.load(path).points if folder.name == MODEL_FOLDER and path.exists() else ()
        for point in points:
            if path == record or point.model == MODEL_FOLDER:
                return _unmeasured(point)
    if not (folder / CIRCUIT).is_file():
        return Point(name=_UNKNOWN)
    circuit = Circuit.load(folder / CIRCUIT)
    name = point_name(circuit.method, circuit.discovered_under, circuit.tau)
    return circuit_point(name, circuit)


def _unmeasured(point: Point) -> Point:
    return replace(
        point,
        accuracy_fine=None,
        accuracy_coarse=None,
        kl=None,
        images=None,
        latency=(),
        confusion=None,
        circuit=None,
        model=None,
    )
