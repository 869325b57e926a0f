"""What a model's logits stand for, and copies of a model that give only some of them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from vitcut.errors import ModelError, TaskError, UnsupportedModelError
from vitcut.labels import Labels, plain_name
from vitcut.model.adapters import read_weights
from vitcut.model.weights import ViTWeights
from vitcut.task import Task
from vitcut.wordnet import find_synsets, imagenet_labels, known_synsets, with_wordnet_ids


def find_labels(
    labels: Labels | None, name: str, num_classes: int, data: Labels, task: Task
) -> tuple[Labels, list[str]]:
    """The classes of a model's logits, called as the data calls them.

    Args:
        labels: The classes that the model names, if it does.
        name: The model's name, for messages.
        num_classes: The number of its logits.
        data: The classes of the data.
        task: May say what the model calls a class, name classes by position, or have as many
            classes as the model.

    Returns:
        The classes; each has the id of the data's class that it is, else its WordNet id, else its
        own. And what the user should know of how they were found, a line each.

    Raises:
        ModelError: The model names more or fewer classes than it has logits.
        TaskError: Nothing says what the logits stand for, or their order is in doubt.
    """
    owner, told = f"model {name!r}", list[str]()
    data = with_wordnet_ids(data)
    if labels is None:
        labels, how = _unnamed(owner, num_classes, data, task)
        told.append(f"does not name its classes: its {num_classes} logits are taken as {how}")
    elif len(labels.ids) != num_classes:
        raise ModelError(
            f"{owner} names {len(labels.ids)} classes and gives {num_classes} logits: expected "
            "as many; correct its config.json"
        )
    shared = {own for own, count in Counter(labels.ids).items() if count > 1}
    unique = tuple(
        f"{own} (logit {at})" if own in shared else own for at, own in enumerate(labels.ids)
    )
    labels = with_wordnet_ids(replace(labels, owner=owner, ids=unique))
    ids = [min(also, default=own) for own, also in zip(unique, labels.also, strict=True)]
    pairs = {at: data.ids[there] for at, there in labels.match(data).items()}
    # A person may have named the data's class as the model does: crescent is "a crescent".
    for item in task.classes:
        places = labels.called(item.name)
        if item.id in data.ids and item.id not in pairs.values() and len(places) == 1:
            pairs.setdefault(places[0], item.id)
    # What the label file says outright goes before what was matched.
    for written, logit in task.model.items():
        at, there = labels.find(logit), data.called(written)
        if at is None or len(there) != 1:
            unknown, whose = (logit, labels) if at is None else (written, data)
            raise TaskError(
                f"task {task.name!r} says in 'model' that {written} is {logit}, but "
                f"{whose.owner} has {'no' if at is None or not there else 'several'} {unknown!r}: "
                f"nearest are {', '.join(whose.nearest(unknown) or whose.ids[:3])}"
            )
        pairs = {place: own for place, own in pairs.items() if own != data.ids[there[0]]}
        pairs[at] = data.ids[there[0]]
    # A class that is not the data's may not go by the id of one that is.
    theirs = set(data.ids)
    ids = [
        pairs.get(at, f"{own} (logit {at})" if own in theirs else own) for at, own in enumerate(ids)
    ]
    renamed = [
        at
        for at, own in sorted(pairs.items())
        if own in task.class_ids
        and own not in labels.also[at]
        and plain_name(own) not in {plain_name(unique[at]), plain_name(labels.names[at])}
    ]
    if renamed:
        first = ", ".join(f"{pairs[at]} is {labels.names[at]!r}" for at in renamed[:3])
        more = ", ..." if len(renamed) > 3 else ""
        told.append(f"has {len(renamed)} of the data's classes under other names: {first}{more}")
    also = tuple(more | {own} for own, more in zip(unique, labels.also, strict=True))
    return replace(labels, ids=tuple(ids), also=also), told


def names_imagenet(task: Task) -> bool:
    """Whether most of what a task names, but for positions, are ImageNet-1k's or above it."""
    written = [own for own in task.class_ids if not own.isdecimal()]
    return 2 * sum(bool(find_synsets(own)) for own in written) > len(written)


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which 2 comes before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def _without_accents(name: str) -> str:
    """How a name is sorted where accents are typed apart (as macOS does) or do not count."""
    parts = unicodedata.normalize("NFKD", name.casefold())
    return "".join(part for part in parts if not unicodedata.combining(part))


def _unnamed(owner: str, num_classes: int, data: Labels, task: Task) -> tuple[Labels, str]:
    """The classes of a model that names none, by their number, and what decided."""
    usual, positions = imagenet_labels(), tuple(map(str, range(num_classes)))
    of_positions = Labels(owner=owner, ids=positions, names=positions)
    if task.model and set(task.class_ids) <= task.model.keys():
        # Logits that the label file does not mention must match nothing by chance.
        return of_positions, "the label file says, by position"
    candidates = ((data.stated, "data's"), (data.ids, "data's"), (task.class_ids, "task's"))
    for given, whose in candidates:
        if len(given) == num_classes and set(given) <= {*data.ids, *data.stated}:
            ids, rule = _in_order(given, data, owner, task)
            name_of = dict(zip(data.ids, data.names, strict=True))
            names = tuple(name_of.get(own, own) for own in ids)
            return Labels(owner=owner, ids=ids, names=names), f"the {whose} classes, {rule}"
    is_imagenet = not set(data.ids).isdisjoint(usual.ids) or names_imagenet(task)
    if len(usual.ids) == num_classes and is_imagenet:
        return usual, "ImageNet-1k's classes, in the usual order"
    if not set(data.ids).isdisjoint(positions):
        return of_positions, "the data's classes named by position"
    if set(task.class_ids) <= set(positions):
        return of_positions, "the label file's classes named by position"
    also = ", or by ImageNet's WordNet ids" if num_classes == len(usual.ids) else ""
    raise TaskError(
        f"{owner} does not say what its classes are: it has {num_classes} classes, task "
        f"{task.name!r} has {len(task.classes)}, the data {len(data.ids)}: name them with --labels "
        "FILE, one per line; or use a label file or data of as many classes, or name the data's "
        f"classes by position, 0 to {num_classes - 1}{also}; or train it for the data's classes: "
        "vitcut train --model"
    )


def _in_order(
    ids: tuple[str, ...], data: Labels, owner: str, task: Task
) -> tuple[tuple[str, ...], str]:
    """The data's classes in the order that is stated, or that all who sort names agree on.

    Raises:
        TaskError: They do not agree.
    """
    if set(ids) <= set(data.stated):
        return tuple(
            own for own in data.stated if own in set(ids)
        ), f"in the order of {data.stated_by}"
    readings = {
        "string order": sorted(ids),
        "natural order": sorted(ids, key=_by_number),
        "order whatever case and accents": sorted(sorted(ids), key=_without_accents),
    }
    if set(ids) == set(map(str, range(len(ids)))):
        return tuple(readings["natural order"]), "in the order of their numbers"
    if len(ids) == len(imagenet_labels().ids) == len(known := known_synsets(data)):
        readings["ImageNet's order"] = [data.ids[known[key]] for key in imagenet_labels().ids]
    of_groups = {item.group: data.called(item.id) for item in task.classes}
    listed = [data.ids[at] for group in task.groups for at in of_groups.get(group, ())]
    if sorted(listed) == sorted(ids):  # one class each, as in "classes: [c, a, b]"
        readings["the label file's order"] = listed
    strings = readings["string order"]
    for other, found in readings.items():
        if found != strings:
            first = next(at for at, own in enumerate(found) if own != strings[at])
            shown = slice(max(0, first - 2), first + 4)
            both = "; ".join(
                f"{name} {'... ' if shown.start else ''}{', '.join(order[shown])}, ..."
                for name, order in (("string order", strings), (other, found))
            )
            raise TaskError(
                f"{owner} does not name its classes, and the data's {len(ids)} can be sorted in "
                f"two ways: {both}: write their names into a file, one per line, in the order of "
                "the model's logits, and give it as --labels FILE (in Python labels= of load_model)"
            )
    return tuple(strings), "in the order of their names"


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
