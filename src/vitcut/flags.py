"""Flags that several verbs share, and how typed flags become settings. The verbs are in `verbs`."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from vitcut.errors import ConfigError

if TYPE_CHECKING:
    from vitcut.images.settings import DataSettings
    from vitcut.model.given import Given

T = TypeVar("T")


def take(namespace: Namespace, settings: type[T], **given: Any) -> T:
    """Build a settings dataclass from flat flags of the same names."""
    values: dict[str, Any] = {}
    for item in fields(settings):  # pyright: ignore[reportArgumentType]
        if item.name not in given and item.name in namespace:
            value = namespace[item.name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return settings(**values, **given)


def add_common(parser: ArgumentParser, out: str) -> None:
    """``--config`` and ``--out``."""
    parser.add_argument("--config", action="config")
    parser.add_argument("--out", type=Path, default=Path(out), help="Folder for the results.")


def add_data(parser: ArgumentParser) -> None:
    """``--source`` and what goes with it."""
    parser.add_argument(
        "--source",
        type=str | None,
        default=None,
        help="Images: a Tiny ImageNet .zip or folder, a folder of class folders, a .parquet file, "
        "a Hugging Face dataset id, or 'drawn'; Tiny ImageNet is downloaded when it is left out.",
    )
    parser.add_argument(
        "--skip_bad_images", type=bool, default=False, help="Leave out images that do not decode."
    )


def add_subject(parser: ArgumentParser) -> None:
    """``--source``, ``--task`` and ``--model``."""
    add_data(parser)
    parser.add_argument(
        "--task", type=str | None, default=None, help="A shipped task's name, or a label file."
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="'animals' (the default), a run directory, a folder of timm or transformers, "
        "timm:NAME, hf-hub:REPOSITORY, or a file of weights (.safetensors, .pth) with --arch.",
    )
    parser.add_argument(
        "--arch",
        type=str | None,
        default=None,
        help="The architecture of a --model that is a file of weights: timm's name, or "
        "torchvision:NAME.",
    )
    for name, what in (("mean", "shifted"), ("std", "divided")):
        parser.add_argument(
            f"--{name}",
            type=str | None,
            default=None,
            help=f"What pixels from 0 to 1 are {what} by for a --model that is a file of weights: "
            "0.5, or one number per channel: 0.485,0.456,0.406.",
        )
    parser.add_argument(
        "--random_weights",
        type=bool,
        default=False,
        help="Build --model timm:NAME with random weights, without network.",
    )
    parser.add_argument(
        "--image_size",
        type=int | None,
        default=None,
        help="Build --model timm:NAME for images of so many pixels per side, instead of its own; "
        "position embeddings are brought to that size.",
    )


def data_of(namespace: Namespace, **given: Any) -> "DataSettings":
    """The data settings that ``--source`` and its like say."""
    from vitcut.images.settings import DataSettings

    source = namespace.source
    return at_home(DataSettings(source=source, skip_bad_images=namespace.skip_bad_images, **given))


def given_of(namespace: Namespace) -> "Given":
    """What the flags say of the model besides where it is.

    Raises:
        ConfigError: A number is none, or out of range.
    """
    from vitcut.model.given import Given

    return Given(
        arch=namespace.arch,
        mean=_numbers_of(namespace, "mean"),
        std=_numbers_of(namespace, "std"),
        random_weights=namespace.random_weights,
        image_size=namespace.image_size,
    )


def at_home(data: "DataSettings") -> "DataSettings":
    """A path as source is kept absolute: a run directory is read from other places too."""
    if data.source is not None and Path(data.source).exists():
        return replace(data, source=str(Path(data.source).resolve()))
    return data


def _numbers_of(namespace: Namespace, name: str) -> tuple[float, ...] | None:
    """The numbers of a flag that takes one, or several with commas between them."""
    typed = namespace[name]
    if typed is None:
        return None
    try:
        return tuple(float(item) for item in str(typed).strip("[]").split(","))
    except ValueError:
        raise ConfigError(
            f"{name} must be a number, or several with commas between them, got {typed!r}"
        ) from None
