"""What a model's logits stand for, and copies of a model that give only some of them."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from vitcut.errors import ModelError, TaskError, UnsupportedModelError
from vitcut.labels import Labels
from vitcut.model.adapters import read_weights
from vitcut.model.weights import ViTWeights
from vitcut.task import Task
from vitcut.wordnet import find_synsets, imagenet_names


def find_labels(
    labels: Labels | None, name: str, num_classes: int, data: Labels, task: Task
) -> tuple[Labels, str | None]:
    """The classes of a model's logits, and how they were guessed if the model does not say.

    Args:
        labels: The classes that the model names, if it does.
        name: The model's name, for messages.
        num_classes: The number of its logits.
        data: The classes of the data.
        task: May name classes by position, or have as many classes as the model.

    Raises:
        ModelError: The model names more or fewer classes than it has logits.
        TaskError: Nothing says what the logits stand for.
    """
    owner = f"model {name!r}"
    if labels is not None:
        if len(labels.ids) != num_classes:
            raise ModelError(
                f"{owner} names {len(labels.ids)} classes and gives {num_classes} logits: expected "
                "as many; correct its config.json"
            )
        return Labels(owner=owner, ids=_data_ids(labels.ids, data, task), names=labels.names), None
    own, imagenet = set(data.ids), imagenet_names()
    positions = tuple(map(str, range(num_classes)))
    if len(data.ids) == num_classes:
        ids, names, whose = data.ids, data.names, "the data's classes, in the order of their ids"
    elif len(task.classes) == num_classes and own.issuperset(task.class_ids):
        ids, names = task.class_ids, task.class_names
        whose = "the task's classes, in the order of their ids"
    elif len(imagenet) == num_classes and (not own.isdisjoint(imagenet) or names_imagenet(task)):
        ids, names = tuple(imagenet), tuple(imagenet.values())
        whose = "ImageNet-1k's classes, in the usual order"
    elif not own.isdisjoint(positions):
        ids, names, whose = positions, positions, "the data's classes named by position"
    elif set(task.class_ids) <= set(positions):
        ids, names, whose = positions, positions, "the label file's classes named by position"
    else:
        also = ", or by ImageNet's WordNet ids" if num_classes == len(imagenet) else ""
        raise TaskError(
            f"{owner} does not say what its classes are: it has {num_classes} classes, task "
            f"{task.name!r} has {len(task.classes)}, the data {len(data.ids)}: use a label file or "
            f"data of as many classes, or name the data's classes by position, 0 to "
            f"{num_classes - 1}{also}; or train it for the data's classes: vitcut train --model"
        )
    told = f"its {num_classes} logits are taken as {whose}"
    return Labels(owner=owner, ids=ids, names=names), told


def _data_ids(ids: tuple[str, ...], data: Labels, task: Task) -> tuple[str, ...]:
    """What the data calls a model's classes, where the model's labels are texts."""
    if not set(ids).isdisjoint(data.ids):
        return ids
    id_of = dict(zip(map(str.casefold, data.names), data.ids, strict=True))
    id_of |= {item.name.casefold(): item.id for item in task.classes}
    found = tuple(id_of.get(label.casefold(), label) for label in ids)
    if found != ids and len(set(found)) == len(found):
        return found
    names = imagenet_names()
    # The same thousand names in the same order: ImageNet's.
    same = [label.casefold() for label in ids] == [name.casefold() for name in names.values()]
    return tuple(names) if same else ids


def names_imagenet(task: Task) -> bool:
    """Whether a task names classes or ancestors of ImageNet-1k, and nothing else but positions."""
    written = [own for own in task.class_ids if not own.isdecimal()]
    return bool(written) and all(map(find_synsets, written))


def keep_rows(model: nn.Module, weights: ViTWeights, rows: Sequence[int]) -> nn.Module:
    """A copy of a model that gives only some of its logits, in the order of ``rows``.

    Args:
        model: A model of any library, or your own.
        weights: The weights read from it.
        rows: Positions of the logits to keep.

    Raises:
        UnsupportedModelError: The classifier is not a linear layer with the rows that were read.
    """
    head, kept = weights.head_weight, list(rows)
    fewer = deepcopy(model)
    found = _classifier_layers(fewer, weights)
    for layer in found:
        for name, old in list(layer.named_parameters()):
            fresh = nn.Parameter(old.detach()[kept].clone(), requires_grad=old.requires_grad)
            setattr(layer, name, fresh)
        layer.out_features = len(kept)
    again = read_weights(fewer) if found else weights
    if not torch.equal(again.head_weight, head[kept]) or not torch.equal(
        again.head_bias, weights.head_bias[kept]
    ):
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} for some of its classes: {len(found)} of its "
            "layers look like the classifier, expected nn.Linear alone; name every class in the "
            "label file, or give it a 'rest'"
        )
    _set_num_classes(fewer, len(kept))
    return fewer


def with_new_head(
    model: nn.Module, weights: ViTWeights, num_classes: int
) -> tuple[nn.Module, list[nn.Linear]]:
    """A copy of a model with a new classifier, of zeros, for other classes.

    Args:
        model: A model of any library, or your own.
        weights: The weights read from it.
        num_classes: Of the new classifier.

    Returns:
        The copy, and its classifier: one layer, or two whose mean are the logits.

    Raises:
        UnsupportedModelError: The classifier is not made of linear layers that can be found.

    Source:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2: a head of zeros for fine-tuning.
    """
    fresh = deepcopy(model)
    found = _classifier_layers(fresh, weights)
    features = sum(layer.in_features for layer in found)
    if features != weights.head_weight.shape[1]:
        raise UnsupportedModelError(
            f"not supported: a new head for {type(model).__name__}: {len(found)} of its layers "
            "look like the classifier, expected nn.Linear alone; choose a model of timm, "
            "torchvision or transformers"
        )
    for layer in found:
        layer.weight = nn.Parameter(layer.weight.new_zeros(num_classes, layer.in_features))
        layer.bias = nn.Parameter(layer.weight.new_zeros(num_classes))
        layer.out_features = num_classes
    _set_num_classes(fresh, num_classes)
    return fresh, found


def _classifier_layers(model: nn.Module, weights: ViTWeights) -> list[nn.Linear]:
    """The classifier, or both whose mean was read (a distillation token has its own)."""
    head, width = weights.head_weight, weights.width
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features == len(head)
        and any(
            torch.equal(layer.weight.detach()[:, :width] * share, part)
            for part in head.split(width, dim=1)
            for share in (1, 0.5)
        )
    ]


def _set_num_classes(model: nn.Module, num_classes: int) -> None:
    if isinstance(getattr(model, "num_classes", None), int):
        setattr(model, "num_classes", num_classes)  # noqa: B010 - torch types attributes as modules
