"""A dense model as one value: module, checked weights, preprocessing and labels."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcut.compact.info import ModelInfo
from vitcut.errors import ModelError, TaskError, UnsupportedModelError
from vitcut.labels import Labels
from vitcut.model.classes import find_labels, keep_rows
from vitcut.model.foreign import labels_in
from vitcut.model.saving import save_dense
from vitcut.model.tracing import read_model
from vitcut.model.weights import ViTWeights
from vitcut.preprocessing import Preprocessing
from vitcut.progress import say
from vitcut.task import Task, unknown_classes
from vitcut.tensors import hash_tensors


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Model:
    """A dense ViT that can be searched, cut, evaluated and used as a teacher.

    ``weights`` is read from ``module`` once, when the model is loaded, and must reproduce its
    logits. Neither is changed afterwards: change a copy, and load that.
    """

    module: nn.Module
    """From normalised pixels to logits; in eval mode, on the device of the weights."""
    name: str
    """How the user named it."""
    weights: ViTWeights
    preprocessing: Preprocessing
    labels: Labels | None
    """The class of each logit; None if the source does not say."""
    weight_hash: str
    """SHA-256 over names, shapes, types and values of the weights, in hex."""
    origin: Mapping[str, Any] | None = None
    """Arguments of `load_model` that load this model again; None for a module."""
    run: Path | None = None
    """The run directory that it was loaded from, if any."""
    card: str = "A Vision Transformer, saved by vitcut.\n"
    """The text of README.md in its folder."""
    kept_classes: tuple[str, ...] | None = None
    """The ids of the task's classes, once `for_task` has dropped all other logits."""

    @classmethod
    def of(
        cls, module: nn.Module, name: str, preprocessing: Preprocessing, labels: Labels | None
    ) -> "Model":
        """Read and check a module; it is put into eval mode and otherwise not changed.

        Raises:
            ModelError: A weight is NaN or infinite.
            UnsupportedModelError: The module has a feature that is not understood.
        """
        for key, tensor in module.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise ModelError(
                    f"{name!r} has weights that are not finite, in {key}: expected a whole, "
                    "trained model"
                )
        weights = read_model(module)
        if weights.num_classes == 1:
            raise UnsupportedModelError(
                f"not supported: {name!r} gives one logit, a regression or a yes/no of its own: "
                "expected a classifier with a logit for each of two classes or more; retrain it "
                "with two"
            )
        return cls(
            module=module.eval(),
            name=name,
            weights=weights,
            preprocessing=preprocessing,
            labels=labels,
            weight_hash=weight_hash(module),
        )

    def for_task(self, task: Task, data: Labels) -> "Model":
        """The same model with only the logits of a task's fine classes, in the task's order.

        Its weight hash stays that of the whole model.

        Args:
            task: A task that names its classes by their ids.
            data: The classes of the data. They tell what the logits stand for if the model does
                not.

        Raises:
            TaskError: The task has a class that the model lacks.
            UnsupportedModelError: The classifier cannot leave rows out.
        """
        if self.kept_classes == task.class_ids:
            return self
        num_classes = self.weights.num_classes
        known, told = find_labels(self.labels, self.name, num_classes, data, task)
        for line in told:
            say(f"model: {self.name} {line}")
        position = {class_id: at for at, class_id in enumerate(known.ids)}
        unknown = [class_id for class_id in task.class_ids if class_id not in position]
        if unknown:
            raise TaskError(unknown_classes(task.name, unknown, known))
        rows = [position[class_id] for class_id in task.class_ids]
        labels = Labels(owner=self.name, ids=task.class_ids, names=task.class_names)
        if rows == list(range(num_classes)):
            return replace(self, labels=labels, kept_classes=task.class_ids)
        if len(rows) < num_classes:
            say(
                f"model: {self.name} keeps {len(rows)} of its {num_classes} logits, those of "
                f"task {task.name!r}"
            )
        weights = self.weights
        return replace(
            self,
            module=keep_rows(self.module, weights, rows),
            weights=replace(
                weights, head_weight=weights.head_weight[rows], head_bias=weights.head_bias[rows]
            ),
            labels=labels,
            kept_classes=task.class_ids,
        )

    def info_for(self, task: Task) -> ModelInfo:
        """What a user of this model, or of what is made of it, needs to know.

        Args:
            task: The classes that its logits stand for, and their groups.
        """
        return ModelInfo(
            preprocessing=self.preprocessing,
            class_names=task.class_names,
            group_names=task.groups,
            group_of_class=tuple(task.group_of_class.tolist()),
            source_model=self.public_name,
            source_sha256=self.weight_hash,
        )

    def with_labels(self, names: Sequence[str] | Mapping[Any, str]) -> "Model":
        """The same model, whose logits stand for these classes, in this order.

        Args:
            names: A list, or names by the number of the logit.

        Raises:
            ModelError: There are more or fewer names than logits, or they are no texts.
        """
        if len(names) != self.weights.num_classes:
            raise ModelError(
                f"labels names {len(names)} classes, {self.name!r} has {self.weights.num_classes} "
                "logits: expected one name for each, in their order"
            )
        return replace(self, labels=labels_in("labels", f"model {self.name!r}", names))

    @property
    def public_name(self) -> str | None:
        """What published files call it: no path of this machine, nor a run directory's name."""
        place = None if self.origin is None else str(self.origin.get("model", ""))
        if self.run is not None or place is None:
            return None if self.run is not None else Path(self.name).name
        return Path(place).name if Path(place).is_absolute() else place

    @property
    def license(self) -> str | None:
        """The licence of the weights, if timm or their folder states one."""
        stated = getattr(self.module, "pretrained_cfg", {})
        # timm states that of its own weights for every model of an architecture.
        known = self.hub_id is not None or stated.get("source") == "local-dir"
        return stated.get("license") if known else None

    @property
    def hub_id(self) -> str | None:
        """Where the Hub has these weights; None if they came from elsewhere."""
        given = self.origin or {}
        prefix, _, name = str(given.get("model", "")).partition(":")
        if prefix == "timm" and not given.get("random_weights"):
            return getattr(self.module, "pretrained_cfg", {}).get("hf_hub_id")
        return name.partition("@")[0] if prefix == "hf-hub" else None

    def to(self, device: torch.device | str) -> "Model":
        """The same model on another device; this one is left where it is."""
        if torch.device(device) == self.weights.device:
            return self
        module = deepcopy(self.module).to(device)
        return replace(self, module=module, weights=self.weights.to(device=device))

    def save(self, folder: Path) -> None:
        """Write a folder in the format of the model's library, which `load_model` reads back.

        Raises:
            ModelError: The module is of a class of its own, or nothing says what its classes are.
        """
        if self.labels is None:
            raise ModelError(f"{self.name!r} does not name its classes: use model.for_task first")
        save_dense(
            self.module,
            folder,
            preprocessing=self.preprocessing,
            labels=self.labels,
            card=self.card,
        )

    @classmethod
    def load(cls, folder: Path) -> "Model":
        """Read what `save` wrote.

        Raises:
            ModelError: The folder is damaged.
        """
        from vitcut.model.load import load  # imports this file

        return load(folder)

    def __repr__(self) -> str:
        shape = self.weights.shape
        return (
            f"Model({self.name!r}, {shape.num_layers} blocks x {shape.num_heads} heads, width "
            f"{shape.width}, {shape.num_classes} classes, {shape.image_size} px)"
        )


def weight_hash(module: nn.Module) -> str:
    """The SHA-256 over names, shapes, types and values of a module's weights, in hex."""
    return hash_tensors(module.state_dict().items())
