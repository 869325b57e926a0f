"""What the Python interface is given, checked before anything is computed.

What is done with it is left to ``api``.
"""

from dataclasses import fields, replace
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeVar

from torch import nn

from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.errors import ConfigError, TaskError
from vitcut.framing import Framing
from vitcut.images.images import TaskImages
from vitcut.model.loading import LoadedModel
from vitcut.pipeline.settings import CutWords
from vitcut.pipeline.stages import Cut
from vitcut.task import Task

T = TypeVar("T")
U = TypeVar("U")

IN_PYTHON = CutWords(
    circuit="what vitcut.discover or vitcut.Circuit.load gives",
    budget="target_macs=0.2, or target_latency=0.25",
    merging="vitcut.cut(model, images, cut.circuit, merge=True)",
)
"""How to ask `vitcut.cut`."""

_KINDS: dict[type, tuple[str, str]] = {
    LoadedModel: ("what vitcut.load_model gives", "vitcut.load_model(...)"),
    TaskImages: (
        "what vitcut.load_images gives",
        "vitcut.load_images(source, task=..., model=model)",
    ),
    Circuit: ("what vitcut.discover gives", "vitcut.Circuit.load(path)"),
    CompactViT: ("a CompactViT", "vitcut.CompactViT.from_pretrained(folder)"),
}
"""What each kind of argument is called, and what gives one."""


def require_kind(value: object, kind: type) -> None:
    """Refuse an argument of another kind, and say what gives the right one.

    Raises:
        ConfigError: It is of another kind.
    """
    if isinstance(value, kind):
        return
    expected, remedy = _KINDS[kind]
    if isinstance(value, Cut):
        remedy = f"give its {'circuit' if kind is Circuit else 'model'}"
    elif kind is LoadedModel and isinstance(value, nn.Module):
        remedy = "vitcut.load_model(module, mean=..., std=...)"
    raise ConfigError(f"expected {expected}, got {type(value).__name__}: {remedy}")


def numbers_of(name: str, given: Any) -> tuple[float, ...] | None:
    """One number, or one per channel, as a tuple.

    Raises:
        ConfigError: They are no numbers.
    """
    if given is None:
        return None
    listed = [given] if isinstance(given, (Real, str)) else given
    try:
        return tuple(float(item) for item in listed)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, or one per channel, got {given!r}") from None


def configured(kind: type[T], given: dict[str, Any]) -> T:
    """The settings of one kind.

    Raises:
        ConfigError: One is unknown or out of range.
    """
    _require_known(given, _names_of(kind))
    return kind(**given)


def configured_both(first: type[T], second: type[U], given: dict[str, Any]) -> tuple[T, U]:
    """Two settings from one set of names; what both have goes to both.

    Raises:
        ConfigError: One is unknown or out of range.
    """
    names = [_names_of(kind) for kind in (first, second)]
    _require_known(given, [*names[0], *names[1]])
    one, other = ({key: value for key, value in given.items() if key in own} for own in names)
    return first(**one), second(**other)


def require_made_for(
    image_size: int, framing: Framing | None, channels: int, images: TaskImages
) -> None:
    """Check that images were made as a model takes them.

    Raises:
        ConfigError: They were not.
    """
    if image_size != images.image_size:
        raise ConfigError(
            f"the model takes images of {image_size} pixels, got {images.image_size}: give "
            f"load_images model=..., or image_size={image_size}"
        )
    wanted = framing or replace(images.framing, channels=channels)
    for item in fields(Framing):
        own, got = getattr(wanted, item.name), getattr(images.framing, item.name)
        if own != got:
            raise ConfigError(
                f"the model takes images with {item.name} {own}, got {got}: give load_images "
                "model=..."
            )


def require_names(class_names: tuple[str, ...] | None, task: Task) -> None:
    """Check that a compact model's classes, where it names them, are those of a task.

    Raises:
        TaskError: They are not.
    """
    if not class_names:
        return
    # Hugging Face's labels are texts: a folder's name, or what a person calls the class.
    either = [{item.id, item.name} for item in task.classes]
    if len(either) != len(class_names) or any(
        name not in names for name, names in zip(class_names, either, strict=True)
    ):
        raise TaskError(
            f"the model's classes are not those of task {task.name!r}: use the label file that it "
            "was made for"
        )


def _names_of(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]


def _require_known(given: dict[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"no setting {name!r}: {hint}")
