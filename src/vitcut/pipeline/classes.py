"""Which classes a model's logits are, and the model of a task: the rows of its classes alone."""

from dataclasses import replace

from vitcut.errors import ModelError, TaskError
from vitcut.framing import Framing
from vitcut.images.images import TaskImages, labels_of, task_images
from vitcut.images.prepare import prepare
from vitcut.images.settings import DataSettings
from vitcut.labels import Labels
from vitcut.model.adapters import read_weights
from vitcut.model.classifier import keep_rows
from vitcut.model.loading import LoadedModel
from vitcut.model.weights import ViTWeights
from vitcut.progress import say
from vitcut.task import Task, unknown_classes
from vitcut.wordnet import imagenet_names


def load_images_for(model: LoadedModel, config: DataSettings, task: Task) -> TaskImages:
    """The images of a task whose classes, and rest, are the model's; at the size that it takes.

    Raises:
        DataError: The source cannot be used, or a class has too few images to be split.
        TaskError: The task names a class that the model or the data lacks.
    """
    config = replace(config, image_size=model.image_size)
    framing = model.framing or Framing(channels=len(model.mean))
    prepared = prepare(config, framing)
    known, _ = _labels(model, _num_classes(model), labels_of(prepared), task)
    return task_images(prepared, config, task.among(known), framing)


def fit(
    model: LoadedModel, weights: ViTWeights, images: TaskImages
) -> tuple[LoadedModel, ViTWeights]:
    """The model whose logits are a task's fine classes, in their order, and its weights.

    Args:
        model: Its weight hash stays.
        weights: What was read of it.
        images: Of the task.

    Raises:
        TaskError: The task has a class that the model lacks.
        UnsupportedModelError: The classifier is not understood well enough to leave rows out.
    """
    task = images.task
    known, told = _labels(model, weights.num_classes, images.data_labels, task)
    if told is not None:
        say(f"model: {model.name} does not say its classes: {told}")
    position = {class_id: at for at, class_id in enumerate(known.ids)}
    unknown = [class_id for class_id in task.class_ids if class_id not in position]
    if unknown:
        raise TaskError(unknown_classes(task.name, unknown, known))
    rows = [position[class_id] for class_id in task.class_ids]
    if rows == list(range(weights.num_classes)):
        return model, weights
    if len(rows) < weights.num_classes:
        say(
            f"model: {model.name} keeps {len(rows)} of its {weights.num_classes} logits, those of "
            f"task {task.name!r}"
        )
    fitted = replace(
        model,
        model=keep_rows(model.model, weights, rows),
        class_ids=task.class_ids,
        class_names=task.class_names,
    )
    head, bias = weights.head_weight[rows], weights.head_bias[rows]
    return fitted, replace(weights, head_weight=head, head_bias=bias)


def _called(labels: tuple[str, ...], data: Labels, task: Task) -> tuple[str, ...]:
    """What the data calls a model's classes; labels that are texts are names of them."""
    if not set(labels).isdisjoint(data.ids):
        return labels
    ids = dict(zip(map(str.casefold, data.names), data.ids, strict=True))
    ids |= {item.name.casefold(): item.id for item in task.classes}
    found = tuple(ids.get(label.casefold(), label) for label in labels)
    return found if len(set(found)) == len(found) else labels


def _num_classes(model: LoadedModel) -> int:
    known = model.class_ids
    return read_weights(model.model).num_classes if known is None else len(known)


def _labels(model: LoadedModel, count: int, data: Labels, task: Task) -> tuple[Labels, str | None]:
    """The classes of a model's logits, and how they were told where it does not say them."""
    owner = f"model {model.name!r}"
    if model.class_ids is not None:
        names = model.class_names or model.class_ids
        if len(model.class_ids) != count:
            raise ModelError(
                f"{owner} names {len(model.class_ids)} classes and gives {count} logits: expected "
                "as many; mend its config.json"
            )
        return Labels(owner=owner, ids=_called(model.class_ids, data, task), names=names), None
    if len(data.ids) == count:
        told = f"its {count} logits are taken as the data's classes, in the order of their ids"
        return replace(data, owner=owner), told
    own = set(data.ids)
    if len(task.classes) == count and own.issuperset(task.class_ids):
        names = tuple(item.name for item in task.classes)
        told = f"its {count} logits are taken as the task's classes, in the order of their ids"
        return Labels(owner=owner, ids=task.class_ids, names=names), told
    imagenet = imagenet_names()
    if len(imagenet) == count and not own.isdisjoint(imagenet):
        labels = Labels(owner=owner, ids=tuple(imagenet), names=tuple(imagenet.values()))
        return labels, f"its {count} logits are taken as ImageNet-1k's classes, in the usual order"
    numbers = tuple(map(str, range(count)))
    if own.isdisjoint(numbers):
        also = ", or by ImageNet's WordNet ids" if count == len(imagenet) else ""
        raise TaskError(
            f"{owner} does not say what its classes are: it has {count} classes, task "
            f"{task.name!r} has {len(task.classes)}, the data {len(data.ids)}: use a label file "
            f"or data of as many, or call the data's classes by position, 0 to {count - 1}{also}"
        )
    told = f"its {count} logits are taken as the data's classes that are called by their position"
    return Labels(owner=owner, ids=numbers, names=numbers), told
