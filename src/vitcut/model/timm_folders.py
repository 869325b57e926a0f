"""timm's models by name, from the hub and from local directories, with their preprocessing.

What a loaded model's parts are called is left to `timm_models`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import save_for_hf
from torch import nn

from vitcut.errors import ConfigError, ModelError
from vitcut.framing import Framing
from vitcut.labels import Labels
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing, per_channel
from vitcut.progress import say

_CONFIG = "config.json"
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError,
    SafetensorError, HfHubHTTPError,
)  # fmt: skip
"""What timm and its readers raise for weights or settings that do not fit."""


def load_timm(name: str, spec: str, image_size: int | None = None) -> Model:
    """Load pretrained weights.

    Args:
        name: As ``timm.create_model`` takes it, also ``local-dir:FOLDER`` or ``hf-hub:REPOSITORY``.
        spec: What was asked for.
        image_size: Height and width, in pixels, that position embeddings are brought to; None is
            the size of the weights.

    Raises:
        ModelError: There is no such model, or it is damaged.
        ConfigError: It cannot be built for images of that size.
    """
    sizes: dict[str, Any] = {}
    if image_size is not None:
        # Built without its weights first: what is wrong with a size is told before a download.
        _build_random(name, image_size)
        sizes["img_size"] = image_size
    try:
        model: Any = timm.create_model(name, pretrained=True, **sizes)
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load the model {spec!r}: {reason}") from None
    _refuse_fresh_classifier(model, spec)
    return Model.of(model, spec, timm_preprocessing(model, spec), _labels(model, spec))


def load_random(arch: str, image_size: int | None = None) -> Model:
    """The model of a name with random weights, the same on every call.

    Args:
        arch: What `timm.create_model` calls it.
        image_size: Height and width, in pixels; None is the architecture's own.

    Raises:
        ModelError: There is no such architecture.
        ConfigError: It cannot be built for images of that size.
    """
    model = _build_random(arch, image_size)
    say(f"model: {arch} has random weights, as was asked for")
    return Model.of(model, f"timm:{arch}", timm_preprocessing(model, arch), None)


def create_timm(arch: str, **sizes: Any) -> nn.Module:
    """The model of a name, freshly initialised, in sizes as ``timm.create_model`` takes them.

    Raises:
        ModelError: There is no such architecture, or not in these sizes.
        ConfigError: It takes no ``img_size``.
    """
    if not timm.is_model(arch):
        raise ModelError(f"timm has no architecture {arch!r}: timm.list_models('*vit*') lists them")
    try:
        return timm.create_model(arch, **sizes)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, TypeError) and "'img_size'" in reason:
            raise _takes_no_size(arch) from None
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        told = f"{arch} with {told}" if told else arch
        tagged = "; leave its tag out" if "tag" in reason else ""
        raise ModelError(f"timm cannot build {told}: {reason}{tagged}") from None


def timm_preprocessing(
    model: Any,
    spec: str,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Preprocessing:
    """What a timm model takes, by its configuration; its size is the one that it was built for.

    Args:
        model: Of timm.
        spec: What was asked for.
        mean: Takes the place of the configuration's; likewise ``std``.
        std: One number may stand for all channels.

    Raises:
        ModelError: Images are not square, are framed in a way that vitcut does not know, or
            nothing is known of their mean and standard deviation.
    """
    data: dict[str, Any] = resolve_model_data_config(model)
    patches: Any = getattr(model, "patch_embed", None)
    height, width = getattr(patches, "img_size", None) or data["input_size"][1:]
    if height != width:
        raise ModelError(f"{spec!r} takes images of {height} x {width}, expected square ones")
    projection = getattr(patches, "proj", None)
    channels = int(getattr(projection, "in_channels", data["input_size"][0]))
    mean = tuple(data["mean"]) if mean is None else mean
    std = tuple(data["std"]) if std is None else std
    if len(mean) not in {1, channels} or len(std) not in {1, channels}:
        raise ModelError(
            f"{spec!r} takes {channels} channels, mean and std are known of {len(mean)} and "
            f"{len(std)}: give --mean and --std, as the model was trained with"
        )
    return Preprocessing(
        image_size=height,
        mean=per_channel(mean, channels, "mean"),
        std=per_channel(std, channels, "std"),
        framing=_framing(data, channels, spec),
    )


def save_timm_folder(
    model: nn.Module,
    folder: Path,
    taken: Preprocessing,
    class_names: Mapping[str, str],
) -> dict[str, Any]:
    """Write a timm local directory; returns the content of its ``config.json``.

    Args:
        model: Built by ``timm.create_model``.
        folder: It exists.
        taken: What the model takes.
        class_names: By class id, in the order of the logits.
    """
    framing = taken.framing
    save_for_hf(
        model,
        str(folder),
        safe_serialization=True,
        model_config={
            "label_names": list(class_names),
            "label_descriptions": dict(class_names),
        },
        data_config={
            "input_size": (len(taken.mean), taken.image_size, taken.image_size),
            "mean": taken.mean,
            "std": taken.std,
            "crop_pct": framing.crop_fraction,
            "crop_mode": _CROP_MODES[framing.fit],
            "interpolation": framing.interpolation,
        },
    )
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    # timm copies these from the architecture's own pretrained weights, which these are not.
    for inherited in ("tag", "license"):
        config["pretrained_cfg"].pop(inherited, None)
    return config


_CROP_MODES = {"crop": "center", "squash": "squash"}
"""timm's word for each fit."""


def _build_random(arch: str, image_size: int | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if image_size is None:
            return create_timm(arch)
        model = create_timm(arch, img_size=image_size)
    patches: Any = getattr(model, "patch_embed", None)
    # Some that have other stems take the size without a word, and heed it elsewhere or nowhere.
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


def _framing(data: dict[str, Any], channels: int, spec: str) -> Framing:
    fits = {mode: fit for fit, mode in _CROP_MODES.items()}
    try:
        fit: Any = fits[data["crop_mode"]]
        return Framing(
            channels=channels,
            fit=fit,
            crop_fraction=data["crop_pct"],
            interpolation=data["interpolation"],
        )
    except KeyError:
        raise ModelError(
            f"{spec!r} has crop_mode {data['crop_mode']!r}, expected one of {', '.join(fits)}"
        ) from None
    except ConfigError as error:
        raise ModelError(f"{spec!r}: {error}") from None


def _labels(model: Any, spec: str) -> Labels | None:
    ids = model.pretrained_cfg.get("label_names")
    if not isinstance(ids, (list, tuple)):
        return None
    names = model.pretrained_cfg.get("label_descriptions") or {}
    if not isinstance(names, dict):
        raise ModelError(
            f"the model's label_descriptions are a {type(names).__name__}, expected "
            f"{{label: description}}: mend {_CONFIG}"
        )
    described = tuple(str(names.get(item, item)) for item in ids)
    return Labels(owner=f"model {spec!r}", ids=tuple(ids), names=described)


def _refuse_fresh_classifier(model: Any, spec: str) -> None:
    """Timm draws a new classifier without a word where the number of classes is another."""
    stored = model.pretrained_cfg.get("num_classes")
    if stored is not None and stored != model.num_classes:
        raise ModelError(
            f"{spec!r} was saved with {stored} classes, its configuration builds "
            f"{model.num_classes}, so that its classifier was never trained: correct {_CONFIG}"
        )
