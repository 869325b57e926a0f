"""What every stage works on: a dense model, its weights, and the images of a task."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.errors import ArtefactError, ConfigError, TaskError
from vitcut.images.images import ImageSet, TaskImages, to_float
from vitcut.images.settings import DataSettings
from vitcut.model.given import NOTHING, Given
from vitcut.model.loading import LoadedModel, load_model
from vitcut.model.tracing import read_model
from vitcut.model.weights import ViTWeights
from vitcut.names import SHIPPED_MODEL
from vitcut.pipeline.classes import fit, load_images_for
from vitcut.pipeline.folder import RunFolder
from vitcut.settings import as_plain
from vitcut.shapes import Float, Int, Tensor
from vitcut.store import read_json, write_json
from vitcut.task import Task, parse_task

_ORIGIN_VERSION = 1
ORIGIN_FILE = "origin.json"
OWN_MODEL = "."
"""An origin's model that lies in the run directory itself, wherever that is moved."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run's model and images come from; ``origin.json`` of a run directory."""

    model: str
    """As `load_model` takes it, or `OWN_MODEL`; paths are absolute."""
    given: Given = NOTHING
    """What was said of it besides."""
    task: Task
    written: Task | None = None
    """As the label file has it, where ``task`` calls its classes by what it means in the data."""
    data: DataSettings
    images_fingerprint: str | None = None
    """Of the images, their splits and the task; None until they were loaded."""
    weight_hash: str | None = None
    """Of a model that was there before the run; None until it was loaded, or if it is trained."""

    @classmethod
    def own(cls, images: TaskImages, data: DataSettings, written: Task) -> "Origin":
        """The origin of a run that trains its own model for a task as a label file has it."""
        return cls(
            model=OWN_MODEL,
            task=images.task,
            written=None if written == images.task else written,
            data=data,
            images_fingerprint=images.fingerprint,
        )

    def loaded(self, subject: "Subject") -> "Origin":
        """This origin, once its images and its model were loaded."""
        return replace(
            self,
            images_fingerprint=subject.images.fingerprint,
            weight_hash=subject.model.weight_hash,
        )

    def claim(self, folder: RunFolder) -> None:
        """Claim a run directory for this origin, or check that it was begun with the same.

        Raises:
            ArtefactError: Images, label file or weights changed since the run was begun.
        """
        path = folder.path / ORIGIN_FILE
        if folder.begun and path.exists():
            earlier = Origin.load(folder.path)
            if earlier.images_fingerprint != self.images_fingerprint:
                raise _changed(folder, "images or another label file")
            if earlier.weight_hash != self.weight_hash:
                raise _changed(folder, "weights")
        folder.claim()
        content = {
            **self.settings(),
            "images_fingerprint": self.images_fingerprint,
            "weight_hash": self.weight_hash,
        }
        write_json(path, {"format_version": _ORIGIN_VERSION, **content})

    @classmethod
    def of_run(cls, model: str) -> "Origin | None":
        """The origin of the run directory that is given as model; None where it is none.

        Raises:
            ArtefactError: Its ``origin.json`` is damaged.
        """
        folder = Path(model)
        shipped = model == SHIPPED_MODEL
        return None if shipped or not (folder / ORIGIN_FILE).exists() else cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "Origin":
        """Read ``origin.json`` of a run directory.

        Raises:
            ArtefactError: The folder is no run directory, or the file is damaged.
        """
        path = folder / ORIGIN_FILE
        content = read_json(path, kind="run", newest_version=_ORIGIN_VERSION)
        try:
            task = parse_task(json.dumps(content["task"]), origin=str(path))
            written = content.get("written")
            if written is not None:
                written = parse_task(json.dumps(written), origin=str(path))
            own = content["model"] == OWN_MODEL
            model = str(folder.resolve()) if own else content["model"]
            return cls(
                model=model,
                given=Given.from_dict(content),
                task=task,
                written=written,
                data=DataSettings(**content["data"]),
                images_fingerprint=content["images_fingerprint"],
                weight_hash=content["weight_hash"],
            )
        except (KeyError, TypeError, TaskError, ConfigError) as error:
            raise ArtefactError(f"{path} is damaged: {error!r}") from None

    def settings(self) -> dict[str, Any]:
        """What a run directory's settings say of it."""
        # Named only where it was given: run directories of before knew none of it.
        special = self.given.to_dict()
        if self.written is not None:
            special["written"] = self.written.to_dict()
        data = as_plain(self.data)
        return {"model": self.model, **special, "task": self.task.to_dict(), "data": data}

    def load_model(self) -> LoadedModel:
        """Load the model.

        Raises:
            ModelError: It cannot be loaded.
            ConfigError: What was given is for another kind of model, or transformers is not
                installed.
        """
        return load_model(self.model, self.given)

    def load_subject(
        self, model: LoadedModel | None = None, weights: ViTWeights | None = None
    ) -> "Subject":
        """Load and read the model, then prepare the images as it takes them.

        Args:
            model: This origin's, where it was loaded already.
            weights: What `read_model` gave of it, where it was read already.

        Raises:
            UnsupportedModelError: The model has a feature that is not understood.
            DataError: The source cannot be used.
            TaskError: The task does not fit the data or the model.
            ModelError: The model cannot be loaded.
        """
        model = self.load_model() if model is None else model
        # Before the images, which may be fetched and decoded for many minutes.
        weights = read_model(model.model) if weights is None else weights
        return Subject.of(model, load_images_for(model, self.data, self.task), weights)


def load_dense(model: str, given: Given = NOTHING) -> LoadedModel:
    """Load a dense model; a run directory means the one that it trained, or that it is about.

    Args:
        model: A run directory, or anything else that `load_model` takes.
        given: What is said of it besides; for the rest what the run says of its own.

    Raises:
        ModelError: It cannot be loaded.
        ConfigError: What was given is for another kind of model.
        ArtefactError: The run directory's ``origin.json`` is damaged.
    """
    origin = Origin.of_run(model)
    if origin is None:
        return load_model(model, given)
    return load_model(origin.model, given.over(origin.given))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A dense model together with the images of the task that it is cut for."""

    model: LoadedModel
    """Its logits are the task's fine classes, in their order."""
    weights: ViTWeights
    """Of the model, checked against it."""
    images: TaskImages

    @classmethod
    def of(
        cls, model: LoadedModel, images: TaskImages, weights: ViTWeights | None = None
    ) -> "Subject":
        """A loaded model for the images of a task; logits that are not the task's go.

        Args:
            model: The model.
            images: The images.
            weights: What `read_model` gave of the model, where it was read already.

        Raises:
            UnsupportedModelError: The model has a feature that is not understood.
            TaskError: The task has a class that the model lacks.
        """
        weights = read_model(model.model) if weights is None else weights
        fitted, weights = fit(model, weights, images)
        return cls(model=fitted, weights=weights, images=images)

    @property
    def task(self) -> Task:
        """The task of the images."""
        return self.images.task

    @property
    def group_of_class(self) -> Int[Tensor, "classes"]:
        """The group number of each class of the model."""
        return torch.from_numpy(self.task.group_of_class)

    def normalise(self, images: NDArray[np.uint8]) -> Float[Tensor, "images channels y x"]:
        """uint8 images as the model takes them, in float32."""
        return to_float(images, mean=self.model.mean, std=self.model.std)

    def calibration(self, count: int, *, seed: int) -> ImageSet:
        """Training images, as many of each class; all of them where there are fewer."""
        return self.images.calibration(min(count, len(self.images.train)), seed=seed)


def _changed(folder: RunFolder, what: str) -> ArtefactError:
    return ArtefactError(
        f"{folder.path} was begun with other {what} (their hash is not the one in {ORIGIN_FILE}): "
        "choose another --out"
    )
