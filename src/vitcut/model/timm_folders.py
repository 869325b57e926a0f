"""timm's models by name, from the hub and from local directories, with their preprocessing."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import save_for_hf
from torch import nn

from vitcut.errors import ConfigError, ModelError, one_line
from vitcut.hub import hub_access
from vitcut.labels import Labels
from vitcut.model.foreign import labels_in, told_as
from vitcut.model.model import Model
from vitcut.preprocessing import Fit, Framing, Preprocessing, per_channel
from vitcut.progress import say

_CONFIG = "config.json"
_FITS: dict[str, Fit] = {"center": "crop", "squash": "squash"}
"""The fit that each of timm's crop modes stands for."""


def load_timm(name: str, spec: str, image_size: int | None = None) -> Model:
    """Load a pretrained model.

    Args:
        name: As in ``timm.create_model``, also ``local-dir:FOLDER`` or ``hf-hub:REPOSITORY``.
        spec: What the user asked for.
        image_size: Height and width in pixels, to which position embeddings are resampled; None
            keeps the size of the weights.

    Raises:
        ModelError: There is no such model, or it is damaged.
        ConfigError: It cannot be built for images of that size.
    """
    sizes: dict[str, Any] = {}
    if image_size is not None:
        # Built without weights first, so that a wrong size is refused before the download.
        _build_random(name, image_size)
        sizes["img_size"] = image_size
    local = name.startswith("local-dir:")
    if ":" not in name:
        # Refused before the network is asked.
        require_architecture(name)
    with told_as(f"cannot load the model {spec!r}"), nullcontext() if local else hub_access():
        model: Any = timm.create_model(name, pretrained=True, **sizes)
    # timm silently initialises a new classifier if the number of classes differs.
    stored = model.pretrained_cfg.get("num_classes")
    if stored is not None and stored != model.num_classes:
        raise ModelError(
            f"{spec!r} was saved with {stored} classes, its configuration builds "
            f"{model.num_classes}, so that its classifier was never trained: correct {_CONFIG}"
        )
    config = f"{name.removeprefix('local-dir:')}/{_CONFIG}" if local else f"{_CONFIG} of {spec!r}"
    preprocessing, labels = timm_preprocessing(model, spec, config=config), None
    ids = model.pretrained_cfg.get("label_names")
    if ids:
        names = model.pretrained_cfg.get("label_descriptions") or {}
        if not isinstance(ids, (list, tuple, dict)) or not isinstance(names, dict):
            raise ModelError(
                f"label_names in {config} are a {type(ids).__name__}, label_descriptions are a "
                f"{type(names).__name__}, expected [label, ...] or {{logit: label}}, and {{label: "
                "description}: correct it"
            )
        labels = labels_in(f"label_names in {config}", f"model {spec!r}", ids, names)
    elif ":" not in name and (subset := infer_imagenet_subset(model)) is not None:
        # timm's own weights, whose classes timm knows by their number.
        known = ImageNetInfo(subset)
        places = range(known.num_classes())
        labels = Labels(
            owner=f"model {spec!r}",
            ids=tuple(map(known.index_to_label_name, places)),
            names=tuple(known.index_to_description(at) for at in places),
        )
        say(f"model: {spec} has the classes of {subset}, as timm says")
    return Model.of(model, spec, preprocessing, labels)


def load_random(arch: str, image_size: int | None = None) -> Model:
    """Build a model by name with random weights, the same on every call.

    Args:
        arch: As in ``timm.create_model``.
        image_size: Height and width in pixels; None is the architecture's own.

    Raises:
        ModelError: There is no such architecture.
        ConfigError: It cannot be built for images of that size.
    """
    model = _build_random(arch, image_size)
    say(f"model: {arch} has random weights, as was asked for")
    return Model.of(model, f"timm:{arch}", timm_preprocessing(model, arch), None)


def create_timm(arch: str, **sizes: Any) -> nn.Module:
    """Build a freshly initialised model by name; ``sizes`` are those of ``timm.create_model``.

    Raises:
        ModelError: There is no such architecture, or not in these sizes.
        ConfigError: It does not take an ``img_size``.
    """
    require_architecture(arch)
    try:
        return timm.create_model(arch, **sizes)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        reason = one_line(error)
        if isinstance(error, TypeError) and "'img_size'" in reason:
            raise _takes_no_size(arch) from None
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        told = f"{arch} with {told}" if told else arch
        tagged = "; leave its tag out" if "tag" in reason else ""
        raise ModelError(f"timm cannot build {told}: {reason}{tagged}") from None


def require_architecture(arch: str) -> None:
    """Refuse a name that timm does not have, and propose similar ones.

    Raises:
        ModelError: There is no such architecture.
    """
    if timm.is_model(arch):
        return
    near = get_close_matches(arch, timm.list_models(), n=3, cutoff=0.7)
    listed = "timm.list_models('*vit*') lists them"
    hint = f"did you mean {' or '.join(near)}?" if near else listed
    raise ModelError(f"timm has no architecture {arch!r}: {hint}")


def timm_preprocessing(
    model: Any,
    spec: str,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    config: str | None = None,
) -> Preprocessing:
    """The preprocessing in a timm model's configuration, at the size that the model was built for.

    Args:
        model: A model of timm.
        spec: What the user asked for.
        mean: Overrides the configuration's mean; one number holds for all channels.
        std: Likewise.
        config: The file that they are from otherwise, for messages.

    Raises:
        ModelError: Images are not square, vitcut does not know how they are cropped, or mean and
            standard deviation are not known for all channels.
    """
    data: dict[str, Any] = resolve_model_data_config(model)
    patches: Any = getattr(model, "patch_embed", None)
    height, width = getattr(patches, "img_size", None) or data["input_size"][1:]
    if height != width:
        raise ModelError(f"{spec!r} takes images of {height} x {width}, expected square ones")
    # The configuration describes the pretrained weights; this model may have other channels.
    projection = getattr(patches, "proj", None)
    channels = int(getattr(projection, "in_channels", data["input_size"][0]))
    mean = tuple(data["mean"]) if mean is None else mean
    std = tuple(data["std"]) if std is None else std
    if len(mean) not in {1, channels} or len(std) not in {1, channels}:
        raise ModelError(
            f"{spec!r} takes {channels} channels, mean and std are known of {len(mean)} and "
            f"{len(std)}: give --mean and --std, as the model was trained with"
        )
    mean, std = per_channel(mean, channels, "mean"), per_channel(std, channels, "std")
    mode = data["crop_mode"]
    if mode not in _FITS:
        raise ModelError(f"{spec!r} has crop_mode {mode!r}, expected one of {', '.join(_FITS)}")
    try:
        framing = Framing(
            channels=channels,
            fit=_FITS[mode],
            crop_fraction=data["crop_pct"],
            interpolation=data["interpolation"],
        )
        return Preprocessing(image_size=height, mean=mean, std=std, framing=framing)
    except ConfigError as error:
        where = f" in {config}" if config else ""
        raise ModelError(f"{spec!r}: {error}{where}") from None


def save_timm_folder(
    model: nn.Module, folder: Path, taken: Preprocessing, class_names: Mapping[str, str]
) -> dict[str, Any]:
    """Write a timm local directory; returns the content of its ``config.json``.

    Args:
        model: Built by ``timm.create_model``.
        folder: An existing folder.
        taken: The model's preprocessing.
        class_names: By class id, in the order of the logits.
    """
    framing = taken.framing
    save_for_hf(
        model,
        str(folder),
        safe_serialization=True,
        model_config={"label_names": list(class_names), "label_descriptions": dict(class_names)},
        data_config={
            "input_size": (len(taken.mean), taken.image_size, taken.image_size),
            "mean": taken.mean,
            "std": taken.std,
            "crop_pct": framing.crop_fraction,
            "crop_mode": "center" if framing.fit == "crop" else framing.fit,
            "interpolation": framing.interpolation,
        },
    )
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    # timm copies these from the architecture's own pretrained weights, which these are not.
    for inherited in ("tag", "license"):
        config["pretrained_cfg"].pop(inherited, None)
    return config


def _build_random(arch: str, image_size: int | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if image_size is None:
            return create_timm(arch)
        model = create_timm(arch, img_size=image_size)
    patches: Any = getattr(model, "patch_embed", None)
    # Some architectures with other stems accept a size, but apply it elsewhere or not at all.
    if getattr(patches, "img_size", None) != (image_size, image_size):
        raise _takes_no_size(arch)
    patch_size: Any = to_2tuple(patches.patch_size)
    if any(image_size % side for side in patch_size):
        raise ConfigError(
            f"image-size must be a multiple of {max(patch_size)}, the patch size of {arch}, got "
            f"{image_size}"
        )
    return model


def _takes_no_size(arch: str) -> ConfigError:
    return ConfigError(f"timm's {arch} takes no image-size: leave it out")
