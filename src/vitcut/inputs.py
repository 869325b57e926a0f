"""Load the models and images that a user names, check them, and match them to each other."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import msgspec

from vitcut.compact.info import preprocessing_of
from vitcut.errors import ArtefactError, ConfigError, TaskError
from vitcut.extras import require_extra
from vitcut.hub import is_hub_id, require_there
from vitcut.images.settings import DataSettings
from vitcut.labels import Labels, read_labels
from vitcut.names import SHIPPED_MODEL
from vitcut.preprocessing import Preprocessing, numbers
from vitcut.progress import say
from vitcut.results import DENSE
from vitcut.runs import (
    CONFIG_FILE,
    RESULTS_FILE,
    Run,
    find_cut,
    find_run,
    has_cut,
    is_run,
    read_settings,
)
from vitcut.store import convert
from vitcut.task import (
    Task,
    TaskClass,
    all_classes_task,
    load_task,
    parse_task,
    positions_below,
)
from vitcut.wordnet import find_synsets, imagenet_labels

if TYPE_CHECKING:
    from torch import nn

    from vitcut.compact.info import ModelInfo
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.images.load import Images
    from vitcut.model.model import Model

T = TypeVar("T")

_AGAIN = "run its command again in a new directory"

OWN = "."
"""Marks a model that is in the run directory itself, wherever that is moved."""


def load_model(
    model: "str | Path | nn.Module",
    *,
    arch: str | None = None,
    num_heads: int | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
    labels: str | Path | Sequence[str] | Mapping[Any, str] | None = None,
    device: str = "cpu",
) -> "Model":
    """Load a dense model, read its weights, and check that they reproduce its logits.

    Args:
        model: "animals" (the shipped model), a run directory (the dense model that it trained or
            used), a timm or transformers folder, "timm:NAME", "hf-hub:REPOSITORY", or a weights
            file (.safetensors, .pth, .ckpt). In Python also a ViT from timm, torchvision or
            transformers, or of a class with an adapter; it is copied, not changed.
        arch: Architecture of a weights file: a timm name, "torchvision:NAME", or "vit" for a plain
            ViT of either library with sizes of its own, which the weights say.
        num_heads: Heads per block of a weights file whose arch is "vit", which no weights tell; and
            of a new model that is trained without a pretrained one (by default 8).
        mean: Mean to subtract from pixels on the scale 0 to 1: one number, or one per channel
            (0.485,0.456,0.406). Required for a module, optional for a weights file, and refused for
            anything else.
        std: Standard deviation to divide by afterwards; given like the mean.
        random_weights: Build "timm:NAME" with random weights, without network access.
        image_size: Height and width, in pixels, of the images that "timm:NAME" is built for; its
            position embeddings are resized. By default the size that its weights were trained at.
        labels: A text file with the names of the model's classes, one per line, in the order of its
            logits; in Python also a list, or names by number (``id2label``). It replaces names that
            the model has of its own.
        device: Where the model computes: cpu, cuda, cuda:N, or auto (cuda if there is one).

    Raises:
        ModelError: There is no such model, it is damaged, or its weights are not finite.
        UnsupportedModelError: The model has a feature that vitcut does not understand.
        ConfigError: An argument is out of range, or is for another kind of model.
        TaskError: ``labels`` cannot be read.
        ArtefactError: The run directory is damaged, or of another version.
    """
    given: dict[str, Any] = {
        "arch": arch,
        "num_heads": num_heads,
        "mean": numbers("mean", mean),
        "std": numbers("std", std),
        "random_weights": random_weights,
        "image_size": image_size,
        "labels": read_labels(Path(labels)) if isinstance(labels, (str, Path)) else labels,
    }
    typed = {
        name: value for name, value in given.items() if value is not None and value is not False
    }
    run, path = None, None
    if isinstance(model, (str, Path)):
        path = Path(model)
        if str(model) != SHIPPED_MODEL and is_run(path):
            run = path
            stored = _origin_of(path)
            model = stored.pop("model", OWN)
            given |= {**stored, **typed}
            typed = {**stored, **typed}
            if model == OWN:
                model = path / "dense"
        if str(model) != SHIPPED_MODEL:
            require_there(str(model))
            # A path is kept absolute: a run directory is read from other places too.
            model = str(Path(str(model)).resolve()) if Path(str(model)).exists() else model
    require_extra("cut", what="a dense model")
    from vitcut.model.load import load
    from vitcut.runtime import choose_device

    place = choose_device(device)
    named = given.pop("labels")
    loaded = load(model, **given).to(place)
    if named is not None:
        loaded = loaded.with_labels(named)
        typed["labels"] = list(loaded.labels.ids if loaded.labels else ())
    for name in {"mean", "std"} & typed.keys():
        typed[name] = list(getattr(loaded.preprocessing, name))
    origin = {"model": str(model), **typed} if path is not None else None
    if run is not None:
        return replace(loaded, name=str(path), origin=origin, run=run)
    return replace(loaded, name=loaded.name if path is None else str(path), origin=origin)


def load_either(
    model: "str | Path | nn.Module", *, point: str | None = None, device: str = "cpu", **dense: Any
) -> "Model | Cut":
    """Load a dense model, or the cut that a run or model directory holds.

    Args:
        model: The run directory of a cut, its model directory, or its id on the Hugging Face hub
            (org/name); or a dense model: "animals" (the shipped one), another run directory, a timm
            or transformers folder, "timm:NAME", "hf-hub:REPOSITORY", or a weights file
            (.safetensors, .pth).
        point: Which cut to take, if the run directory has several; "dense" takes its dense model.
        device: Where the model computes: cpu, cuda, cuda:N, or auto (cuda if there is one).
        **dense: The other arguments of `load_model`, for a dense model.

    Raises:
        ConfigError: An argument is for another kind of model.
        ArtefactError: The directory is damaged, or has several cuts and no point is given; or there
            is no such model on the hub.
        ModelError: As for `load_model`.
    """
    path = Path(model) if isinstance(model, (str, Path)) and str(model) != SHIPPED_MODEL else None
    on_hub = isinstance(model, str) and is_hub_id(model)
    if on_hub and point is not None:
        raise ConfigError(
            f"point chooses among the cuts of a run directory, got it with {model}, which is on "
            "the Hugging Face hub: leave it out"
        )
    is_cut = path is not None and (on_hub or (path.exists() and point) or has_cut(path))
    if path is None or point == DENSE or not is_cut:
        return load_model(model, device=device, **dense)
    for name, value in dense.items():
        if value is not None and value is not False:
            raise ConfigError(
                f"{name.replace('_', '-')} is for a dense model, got it with the cut in {path}: "
                "leave it out"
            )
    from vitcut.compact.artefact import resolve_folder
    from vitcut.compiler.cut import Cut
    from vitcut.runtime import choose_device

    place = choose_device(device)
    if on_hub:
        folder = resolve_folder(str(model), revision=None)
        if not has_cut(folder):
            raise ArtefactError(
                f"{model} on the Hugging Face hub is no model that vitcut cut: if it is a dense "
                f"one, give hf-hub:{model}"
            )
        # Called by its id: where it was downloaded to says nothing.
        found = replace(Cut.load(folder), name=str(model), folder=None)
    else:
        found = Cut.load(find_cut(path, point))
    found.model.to(place)
    return found


def load_images(
    source: str | Path | None = None,
    *,
    task: "str | Path | Task | None" = None,
    model: "Model | CompactViT | Cut | None" = None,
    image_size: int | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    skip_bad_images: bool = False,
    orientation: Literal["auto", "apply", "ignore"] = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    new_head: bool = False,
) -> "Images":
    """Prepare the images of a task; they are decoded once and kept in the cache.

    Args:
        source: A Tiny ImageNet .zip or folder, a folder or .zip of class folders, a .parquet file,
            a Hugging Face dataset id, or "drawn" (generated pictures). By default the images of the
            run directory that the model was loaded from, or else Tiny ImageNet, which is
            downloaded.
        task: A shipped task ("animals", "cats-dogs", "drawn") or a label file; in Python also a
            `Task`. By default each class is its own group; but a run directory keeps its task, a
            cut model its groups, and the shipped model "animals" and the source "drawn" have
            theirs.
        model: Prepare images for this model: its size, colours, crop and interpolation. Positions
            and names in the label file then refer to the model's classes instead of the data's.
        image_size: Height and width, in pixels. By default the model's, or 64 without a model.
        mean: For a model that is yet to be trained: mean to subtract from pixels on the scale 0 to
            1, one number or one per channel. By default ImageNet's.
        std: Standard deviation to divide by afterwards; given like the mean.
        seed: Seed for splits that the data lacks, and for drawn pictures; a run directory keeps its
            own.
        val_fraction: Fraction of each class's training images to set aside as the val split.
        skip_bad_images: Leave out images that cannot be decoded, instead of stopping.
        orientation: Whether to turn pictures as their EXIF entry says: apply, ignore, or auto (what
            the library does that the model's preprocessing comes from: transformers turns them,
            timm and torchvision do not).
        image_column: The column of a parquet file that holds the pictures; by default "image", or
            the only one.
        label_column: The column of a parquet file that holds the classes; by default label, labels,
            fine_label or class, or the only one.
        new_head: The model is to be trained for the classes of the data, with a new classifier, so
            the classes that it knows do not matter.

    Raises:
        DataError: The source cannot be used, or a class has too few images to split.
        TaskError: There is no such task, or it does not fit the data or the model.
        ConfigError: A setting is out of range, or does not match the model.
    """
    require_extra("cut", what="reading images of a task")
    from vitcut.images.load import split
    from vitcut.images.prepare import prepare as prepare_images
    from vitcut.model.classes import find_labels, names_imagenet
    from vitcut.model.model import Model

    if model is not None and (mean is not None or std is not None):
        raise ConfigError("the model says its own mean and std: leave them out of load_images")
    taken, run, own_task = (None, None, None) if model is None else _wanted_by(model)
    size = None if taken is None else taken.image_size
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
        orientation=orientation,
        image_column=image_column,
        label_column=label_column,
    )
    if run is not None and not (new_head and source is not None):
        # What is not said is the run's, but for the image size, which is the model's.
        base, own = images_of(run, image_size=settings.image_size)
        task = own if task is None else task
        skip = base.skip_bad_images or skip_bad_images
        typed = settings if source is not None else base
        settings = replace(
            base,
            source=typed.source,
            skip_bad_images=skip,
            orientation=base.orientation if orientation == "auto" else orientation,
            image_column=image_column or typed.image_column,
            label_column=label_column or typed.label_column,
        )
    if task is None:
        # A folder of one's own may be called animals.
        shipped = settings.source if settings.source == "drawn" else None
        if isinstance(model, Model) and not new_head and model.name == SHIPPED_MODEL:
            shipped = shipped or SHIPPED_MODEL
        task = own_task or shipped
    preprocessing = taken or _own_preprocessing(settings.image_size, mean, std)
    if settings.orientation != "auto":
        framing = replace(preprocessing.framing, orientation=settings.orientation)
        preprocessing = replace(preprocessing, framing=framing)
    # A label file is read before images are fetched or decoded.
    wanted = task if isinstance(task, Task) or task is None else load_task(task)
    prepared = prepare_images(settings, preprocessing.framing)
    labels = prepared.labels
    every_class = wanted is None
    if wanted is not None and wanted is own_task:
        _require_names(wanted, labels)
    wanted = all_classes_task(labels) if wanted is None else wanted.naming(labels)
    if isinstance(model, Model) and not new_head:
        classes = model.weights.num_classes
        labels, _ = find_labels(model.labels, model.name, classes, labels, wanted)
        if every_class:
            _require_fine_classes(prepared.labels, labels, settings.source, model.name)
    elif names_imagenet(wanted) and not any(
        labels.called(own) or positions_below(own, labels) for own in wanted.class_ids
    ):
        # For a model that knows ImageNet's classes and is not given here.
        labels = imagenet_labels()
    images = split(prepared, settings, wanted.among(labels), preprocessing)
    above = {item.id for item in wanted.classes} - {item.id for item in images.task.classes}
    if images.task.folders or any(not labels.called(own) for own in above):
        groups = "; ".join(images.task.describe()[:8])
        more = "; ..." if len(images.task.groups) > 8 else ""
        said = "the images are labelled with groups, " if images.task.folders else "groups "
        say(f"task {images.task.name!r}: {said}made of the model's classes: {groups}{more}")
    return images


def images_of(run: Path, *, image_size: int) -> tuple[DataSettings, Task]:
    """The images that a run directory used, at another size, and its task.

    Raises:
        ArtefactError: What it says of them is damaged.
    """
    stored: Any = read_settings(run).get("images")
    what = f"{run / CONFIG_FILE} does not describe images"
    try:
        task = parse_task(json.dumps(stored.pop("task")), origin=str(run))
        del stored["fingerprint"]
    except (KeyError, TypeError, AttributeError, TaskError) as error:
        raise ArtefactError(f"{what}: {error!r}; {_AGAIN}") from None
    data = convert(stored, DataSettings, what=what, remedy=_AGAIN)
    return replace(data, image_size=image_size), task


class _Origin(TypedDict, total=False):
    """What a run directory says of its model: the arguments of `load_model`, and its hash."""

    model: str
    arch: str
    mean: list[float]
    std: list[float]
    num_heads: int
    random_weights: bool
    image_size: int
    labels: list[str]
    weight_hash: str


def _origin_of(run: Path) -> dict[str, Any]:
    """The arguments of `load_model` that load a run directory's model.

    Raises:
        ArtefactError: What it says of it is damaged.
    """
    noted: Any = read_settings(run).get("model")
    try:
        known = msgspec.convert(noted, _Origin)
        if known.keys() != noted.keys():
            raise ValueError(f"unknown {', '.join(sorted(noted.keys() - known.keys()))}")
    except (msgspec.ValidationError, ValueError) as error:
        raise ArtefactError(
            f"{run / CONFIG_FILE} does not describe a model: {error}; {_AGAIN}"
        ) from None
    return {key: value for key, value in noted.items() if key != "weight_hash"}


def _own_preprocessing(
    image_size: int,
    mean: float | Sequence[float] | str | None,
    std: float | Sequence[float] | str | None,
) -> Preprocessing:
    """How images are made for a model that is yet to be trained.

    Raises:
        ConfigError: Mean or std is neither one number nor three, or out of range.
    """
    known: Any = {}
    for name, value in {"mean": numbers("mean", mean), "std": numbers("std", std)}.items():
        if value is not None:
            known[name] = value * 3 if len(value) == 1 else value
    return Preprocessing(image_size=image_size, **known)


def _require_fine_classes(data: Labels, labels: Labels, source: str | None, model: str) -> None:
    """Refuse data whose classes are none of the model's, but have the name of a WordNet ancestor.

    Raises:
        TaskError: They are.
    """
    unknown = [own for own in data.ids if labels.find(own) is None]
    if unknown and any(map(find_synsets, unknown)):
        words = ["vitcut", "suggest", *([] if source is None else ["--source", source])]
        words += ["--model", model, "--out", "labels.yaml"]
        raise TaskError(
            f"{len(unknown)} of the data's {len(data.ids)} classes are none of {labels.owner}'s: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}; say with --task which "
            f"of its classes they stand for; for a proposal: {shlex.join(words)}"
        )


def run_of(model: "Model | CompactViT | Cut") -> Path | None:
    """The run directory that a model was loaded from, whose images are its own."""
    return _wanted_by(model)[1]


def _wanted_by(
    model: "Model | CompactViT | Cut",
) -> "tuple[Preprocessing, Path | None, Task | None]":
    """How a model takes images, the run directory it was loaded from, and a cut's own task."""
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.model.model import Model

    if isinstance(model, Cut):
        run = None if model.folder is None else find_run(model.folder)
        return preprocessing_of(model.model.info), run, _own_task(model.model.info)
    if isinstance(model, CompactViT):
        return preprocessing_of(model.info), None, _own_task(model.info)
    model = require(model, Model)
    return model.preprocessing, model.run, None


def _require_names(task: Task, labels: Labels) -> None:
    """Check that data calls a cut's classes by the names that the cut keeps.

    Raises:
        TaskError: It does not.
    """
    unknown = [name for name in task.class_ids if labels.find(name) is None]
    if unknown:
        raise TaskError(
            f"the data lacks {len(unknown)} of the {len(task.classes)} classes of the cut model, "
            f"which keeps their names only, such as {unknown[0]!r}: give the label file that it "
            "was cut for as task"
        )


def _own_task(info: "ModelInfo") -> Task | None:
    """The classes and groups that a compact model was cut for; None if it does not say."""
    if not info.class_names or len(info.group_of_class) != len(info.class_names):
        return None
    classes = (
        TaskClass(id=name, name=name, group=info.group_names[number])
        for name, number in zip(info.class_names, info.group_of_class, strict=True)
    )
    ordered = tuple(sorted(classes, key=lambda item: item.id))
    return Task(name="own", classes=ordered, groups=info.group_names)


_GIVEN_BY = {
    "Model": ("what vitcut.load_model gives", "vitcut.load_model(...)"),
    "Images": (
        "what vitcut.load_images gives",
        "vitcut.load_images(source, task=..., model=model)",
    ),
    "Circuit": ("what vitcut.discover gives", "vitcut.Circuit.load(path)"),
    "Cut": ("what vitcut.cut gives", "vitcut.CompactViT.from_pretrained(folder)"),
}
"""What each kind of argument is called in errors, and how to get one."""


def load_cut(cut: "Cut | CompactViT | str | Path", point: str | None) -> "Cut":
    """What a repair starts from: a cut in a directory, or as it was returned.

    Raises:
        ArtefactError: The directory holds no cut, is damaged, or has several and no point is given.
    """
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut

    if isinstance(cut, (str, Path)):
        return Cut.load(find_cut(Path(cut), point))
    return Cut(model=cut, circuit=None) if isinstance(cut, CompactViT) else require(cut, Cut)


def require(value: Any, kind: type[T]) -> T:
    """Refuse an argument of the wrong kind, and say how to get the right one."""
    if isinstance(value, kind):
        return value
    expected, remedy = _GIVEN_BY[kind.__name__]
    if type(value).__name__ == "Cut":
        remedy = f"give its {'circuit' if kind.__name__ == 'Circuit' else 'model'}"
    elif kind.__name__ == "Model" and hasattr(value, "state_dict"):
        remedy = "vitcut.load_model(module, mean=..., std=...)"
    raise ConfigError(f"expected {expected}, got {type(value).__name__}: {remedy}")


def for_images(model: "Model", images: "Images") -> "Model":
    """Return the model with one logit per fine class of the images' task, in its order."""
    from vitcut.images.load import Images
    from vitcut.model.model import Model

    require(model, Model)
    require_made_for(model.preprocessing, require(images, Images))
    if _orientation_was_chosen(images):
        # It was chosen for what is made with the images too.
        taken = replace(model.preprocessing, framing=images.preprocessing.framing)
        model = replace(model, preprocessing=taken)
    return model.for_task(images.task, images.labels)


def warn_if_no_better(model: "Model", images: "Images", run: Run) -> None:
    """Before anything is cut, say so if the model does not know the task.

    Args:
        model: From `for_images`.
        images: Val images are used.
        run: Nothing is said again where there are results.
    """
    from vitcut.benchmark.evaluation import warn_if_no_better as warn

    if not (run.path / RESULTS_FILE).exists():
        warn(model.module, images.val, images.task, model.preprocessing)


def require_made_for(wanted: Preprocessing, images: "Images") -> None:
    """Check that images were prepared as a model needs them; mean and std are applied later."""
    made = images.preprocessing
    if wanted.image_size != made.image_size:
        raise ConfigError(
            f"the model takes images of {wanted.image_size} pixels, got {made.image_size}: give "
            f"load_images model=..., or image_size={wanted.image_size}"
        )
    for name, own in vars(wanted.framing).items():
        got = getattr(made.framing, name)
        if name == "orientation" and (not images.num_turned or _orientation_was_chosen(images)):
            continue
        if own != got:
            raise ConfigError(
                f"the model takes images with {name} {own}, got {got}: give load_images model=..."
            )


def _orientation_was_chosen(images: "Images") -> bool:
    return images.origin.get("orientation", "auto") != "auto"


def require_classes_of(compact: "CompactViT", task: Task) -> None:
    """Check that a compact model gives the logits of a task's classes, in its order."""
    # Labels of transformers are texts: a folder's name, or what a person calls the class.
    info, known = compact.info, [{item.id, item.name} for item in task.classes]
    same = len(known) == len(info.class_names) and all(
        name in either for name, either in zip(info.class_names, known, strict=True)
    )
    if info.class_names and not same:
        raise TaskError(
            f"the model's classes are not those of task {task.name!r}: use the label file that it "
            "was made for"
        )


def subject(model: "Model", images: "Images") -> dict[str, Any]:
    """What a run directory records about its model and images."""
    origin = dict(model.origin or {"model": model.name})
    return {
        "model": {**origin, "weight_hash": model.weight_hash},
        "images": plain_images(images),
    }


def plain_images(images: "Images") -> dict[str, Any]:
    """What a run directory records about its images."""
    return {**images.origin, "fingerprint": images.fingerprint}
