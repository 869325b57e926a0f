"""The models and images that a user names: loaded, checked, and matched to each other."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vitcut.errors import ArtefactError, ConfigError, TaskError
from vitcut.images.settings import DataSettings
from vitcut.names import SHIPPED_MODEL
from vitcut.preprocessing import Preprocessing, numbers
from vitcut.runs import CONFIG_FILE, is_run, read_settings
from vitcut.settings import require_positive
from vitcut.task import Task, all_classes_task, load_task, parse_task

if TYPE_CHECKING:
    from torch import nn

    from vitcut.images.load import Images
    from vitcut.model.model import Model

T = TypeVar("T")

OWN = "."
"""A run's model that lies in the run directory itself, wherever that is moved."""


def load_model(
    model: "str | Path | nn.Module",
    *,
    arch: str | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
) -> "Model":
    """Load a dense model, read its weights, and check that they reproduce its logits.

    Args:
        model: "animals" (the shipped model), a run directory (the model that it trained or is
            about), a folder of timm or transformers, "timm:NAME", "hf-hub:REPOSITORY", or a file
            of bare weights (.safetensors, .pth). In Python also a ViT of timm, torchvision,
            transformers or a class with an adapter, which is copied, not changed.
        arch: Architecture of a file of bare weights: timm's name, or "torchvision:NAME".
        mean: On the scale 0 to 1: what pixels are shifted by, one number or one per channel
            (0.485,0.456,0.406). Needed with a module, possible with bare weights, refused with all
            else.
        std: What pixels are divided by afterwards; likewise.
        random_weights: Build "timm:NAME" with random weights, without network.
        image_size: Height and width, in pixels, of the images that "timm:NAME" is built for; its
            position embeddings are resized. None is the size of its weights.

    Raises:
        ModelError: There is no such model, it is damaged, or its weights are not finite.
        UnsupportedModelError: The model has a feature that is not understood.
        ConfigError: Something is given that is for another kind of model, or is out of range.
        ArtefactError: The run directory is damaged, or of another version.
    """
    from vitcut.model.load import load

    given: dict[str, Any] = {
        "arch": arch,
        "mean": numbers("mean", mean),
        "std": numbers("std", std),
        "random_weights": random_weights,
        "image_size": image_size,
    }
    typed = {
        name: value for name, value in given.items() if value is not None and value is not False
    }
    run, path = None, None
    if isinstance(model, (str, Path)):
        path = Path(model)
        if str(model) != SHIPPED_MODEL and is_run(path):
            run = path
            noted = read_settings(path).get("model")
            if not isinstance(noted, dict) or not noted.keys() <= {*given, "model", "weight_hash"}:
                raise ArtefactError(
                    f"{path / CONFIG_FILE} is damaged: its model is {noted!r}; run its command "
                    "again in a new directory"
                )
            stored = {key: value for key, value in noted.items() if key != "weight_hash"}
            model = stored.pop("model", OWN)
            given |= {**stored, **typed}
            typed = {**stored, **typed}
            if model == OWN:
                model = path / "dense"
        # A path is kept absolute: a run directory is read from other places too.
        if str(model) != SHIPPED_MODEL and Path(str(model)).exists():
            model = str(Path(str(model)).resolve())
    loaded = load(model, **given)
    for name in {"mean", "std"} & typed.keys():
        typed[name] = list(getattr(loaded.preprocessing, name))
    origin = {"model": str(model), **typed} if path is not None else None
    if run is not None:
        return replace(loaded, name=str(path), origin=origin, run=run)
    return replace(loaded, name=loaded.name if path is None else str(path), origin=origin)


def load_images(
    source: str | Path | None = None,
    *,
    task: "str | Path | Task | None" = None,
    model: "Model | None" = None,
    image_size: int | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    skip_bad_images: bool = False,
) -> "Images":
    """Prepare the images of a task; they are decoded once and kept in the cache.

    Args:
        source: A Tiny ImageNet .zip or folder, a folder or .zip of class folders, a .parquet file,
            a Hugging Face dataset id, or "drawn" (pictures drawn on the spot). None takes those of
            the run directory that the model was loaded from, else downloads Tiny ImageNet.
        task: A shipped task's name ("animals", "drawn"), a label file, or a `Task`. None takes the
            run directory's, else the one called like the model or source, else every class is its
            own group.
        model: Prepare images as this model takes them, its size, colours, crop and interpolation;
            positions and names in the label file are then of its classes, else of the data's.
        image_size: Height and width, in pixels; None is the model's, or 64 without a model.
        mean: Of a model to be trained: on the scale 0 to 1, what pixels are shifted by, one number
            or one per channel; None is ImageNet's.
        std: What pixels are divided by afterwards; likewise.
        seed: Of the splits that the data lacks, and of drawn pictures; those of a run directory
            stay as they are.
        val_fraction: Part of each class's training images that is set aside for choosing.
        skip_bad_images: Leave out images that do not decode, instead of stopping.

    Raises:
        DataError: The source cannot be used, or a class has too few images to be split.
        TaskError: There is no such task, or it does not fit the data or the model.
        ConfigError: A setting is out of range, or not the model's.
    """
    from vitcut.images.load import split
    from vitcut.images.prepare import prepare as prepare_images
    from vitcut.model.classes import find_labels
    from vitcut.model.model import Model

    if model is not None and (mean is not None or std is not None):
        raise ConfigError("the model says its own mean and std: leave them out of load_images")
    size = None if model is None else require(model, Model).preprocessing.image_size
    if None not in {size, image_size} and size != image_size:
        raise ConfigError(
            f"the model takes images of {size} pixels, got image_size={image_size}: leave it out"
        )
    settings = DataSettings(
        source=None if source is None else str(source),
        image_size=size or image_size or 64,
        seed=seed,
        val_fraction=val_fraction,
        skip_bad_images=skip_bad_images,
    )
    if model is not None and model.run is not None:
        # What is not said is the run's, but for the image size, which is the model's.
        stored: Any = read_settings(model.run).get("images")
        try:
            own = parse_task(json.dumps(stored.pop("task")), origin=str(model.run))
            del stored["fingerprint"]
            stored["image_size"] = settings.image_size
            base = DataSettings(**stored)
        except (KeyError, TypeError, AttributeError, TaskError, ConfigError) as error:
            raise ArtefactError(
                f"{model.run / CONFIG_FILE} is damaged: {error!r}; run its command again in a new "
                "directory"
            ) from None
        task = own if task is None else task
        skip = base.skip_bad_images or skip_bad_images
        source = base.source if source is None else str(source)
        settings = replace(base, source=source, skip_bad_images=skip)
    if task is None:
        named = [settings.source, None if model is None else model.name]
        task = next((name for name in named if name in {SHIPPED_MODEL, "drawn"}), None)
    if model is None:
        given = {"mean": numbers("mean", mean), "std": numbers("std", std)}
        known: Any = {}
        for name, value in given.items():
            if value is not None and len(value) not in {1, 3}:
                raise ConfigError(f"{name} must be one number or three, got {len(value)}")
            if value is not None:
                known[name] = value * 3 if len(value) == 1 else value
        for value in known.get("std", ()):
            require_positive("std", value)
        preprocessing = Preprocessing(image_size=settings.image_size, **known)
    else:
        preprocessing = model.preprocessing
    # A label file is read before images are fetched or decoded.
    wanted = task if isinstance(task, Task) or task is None else load_task(task)
    prepared = prepare_images(settings, preprocessing.framing)
    labels = prepared.labels
    wanted = wanted or all_classes_task(labels)
    if model is not None:
        classes = model.weights.num_classes
        labels, _ = find_labels(model.labels, model.name, classes, prepared.labels, wanted)
    return split(prepared, settings, wanted.among(labels), preprocessing)


_GIVEN_BY = {
    "Model": ("what vitcut.load_model gives", "vitcut.load_model(...)"),
    "Images": (
        "what vitcut.load_images gives",
        "vitcut.load_images(source, task=..., model=model)",
    ),
    "Circuit": ("what vitcut.discover gives", "vitcut.Circuit.load(path)"),
    "Cut": ("what vitcut.cut gives", "vitcut.CompactViT.from_pretrained(folder)"),
}
"""What each kind of argument is called, and what gives one."""


def require(value: Any, kind: type[T]) -> T:
    """Refuse an argument of another kind, and say what gives the right one."""
    if isinstance(value, kind):
        return value
    expected, remedy = _GIVEN_BY[kind.__name__]
    if type(value).__name__ == "Cut":
        remedy = f"give its {'circuit' if kind.__name__ == 'Circuit' else 'model'}"
    elif kind.__name__ == "Model" and hasattr(value, "state_dict"):
        remedy = "vitcut.load_model(module, mean=..., std=...)"
    raise ConfigError(f"expected {expected}, got {type(value).__name__}: {remedy}")


def for_images(model: "Model", images: "Images") -> "Model":
    """The model whose logits are the fine classes of the images' task, in their order."""
    from vitcut.images.load import Images
    from vitcut.model.model import Model

    require(model, Model)
    require_made_for(model.preprocessing, require(images, Images))
    return model.for_task(images.task, images.labels)


def require_made_for(wanted: Preprocessing, images: "Images") -> None:
    """Check that images were made as a model takes them; mean and std are applied later."""
    made = images.preprocessing
    if wanted.image_size != made.image_size:
        raise ConfigError(
            f"the model takes images of {wanted.image_size} pixels, got {made.image_size}: give "
            f"load_images model=..., or image_size={wanted.image_size}"
        )
    for name, own in vars(wanted.framing).items():
        got = getattr(made.framing, name)
        if own != got:
            raise ConfigError(
                f"the model takes images with {name} {own}, got {got}: give load_images model=..."
            )


def subject(model: "Model", images: "Images") -> dict[str, Any]:
    """What a run directory notes of the model and images that it is about."""
    origin = dict(model.origin or {"model": model.name})
    return {
        "model": {**origin, "weight_hash": model.weight_hash},
        "images": plain_images(images),
    }


def plain_images(images: "Images") -> dict[str, Any]:
    """What a run directory notes of the images that it is about."""
    return {**images.origin, "fingerprint": images.fingerprint}
