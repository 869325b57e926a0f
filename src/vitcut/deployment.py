"""A model as it is used: ready to answer pictures, with what its user needs to know."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitcut.compact.info import preprocessing_of
from vitcut.errors import ConfigError
from vitcut.inputs import images_of, require
from vitcut.labels import Labels
from vitcut.names import SHIPPED_MODEL
from vitcut.task import Task, all_classes_task, load_task

if TYPE_CHECKING:
    from torch import nn

    from vitcut.compact.info import ModelInfo
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.model.model import Model


def for_use(
    model: "Model | CompactViT | Cut", task: "str | Path | Task | None" = None
) -> "tuple[nn.Module, ModelInfo]":
    """A model as it answers pictures, and what a user of it needs to know, all of it filled in.

    Args:
        model: A cut has groups of its own.
        task: The groups of a dense model. By default those of its run directory, the shipped ones
            of "animals", or else every class is its own group.

    Raises:
        ConfigError: The task is for a cut, or a cut does not say how its images are made.
        TaskError: The model lacks classes of the task.
    """
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.model.model import Model

    compact = model.model if isinstance(model, Cut) else model
    if isinstance(compact, CompactViT):
        if task is not None:
            raise ConfigError("task is for a dense model, got it with a cut, which has its own")
        info = replace(compact.info, preprocessing=preprocessing_of(compact.info))
        return compact.eval(), info.complete(compact.plan.shape.num_classes)
    model = require(model, Model)
    named = tuple(map(str, range(model.weights.num_classes)))
    labels = model.labels or Labels(owner=f"model {model.name!r}", ids=named, names=named)
    if task is None and model.run is not None:
        _, task = images_of(model.run, image_size=model.preprocessing.image_size)
    elif task is None and model.name == SHIPPED_MODEL:
        task = SHIPPED_MODEL
    wanted = task if isinstance(task, Task) or task is None else load_task(task)
    wanted = all_classes_task(labels) if wanted is None else wanted.among(labels)
    model = model.for_task(wanted, labels)
    return model.module, model.info_for(wanted)
