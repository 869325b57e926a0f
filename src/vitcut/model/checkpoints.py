"""Bare checkpoints: a state dict in a file, brought into the names and shapes of a library's model.

Models that bring their architecture along are left to `loading`.
"""

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitcut.errors import ModelError
from vitcut.model.loaded import listed, told_misfits
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing, per_channel
from vitcut.model.timm_folders import create_timm, timm_preprocessing
from vitcut.progress import say
from vitcut.shapes import Tensor

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries that hold the weights, in the order in which they are looked for."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
_TORCHVISION = "torchvision:"
_HEAD, _PATCHES, _POSITIONS = "head.weight", "patch_embed.proj.weight", "pos_embed"
_POSITIONED = (VisionTransformer, Eva)
"""Classes whose position embedding tells the image size; others give positions to other tokens."""
_READ_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
    AssertionError, SafetensorError,
)  # fmt: skip
"""What the readers raise for a damaged file."""


def load_checkpoint(
    path: Path,
    *,
    arch: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Model:
    """Build the model of a name and fill it from a file.

    The head says how many classes there are, patch and position embedding give the sizes of
    images and patches and the channels.

    Args:
        path: A .safetensors, .pth, .pt or .bin file.
        given: The architecture, and how images were normalised.

    Raises:
        ModelError: The file cannot be read without running code that it brings, there is no such
            architecture, or the weights are not the architecture's.
    """
    if arch is None:
        beside = (path.parent / "config.json").is_file()
        folder = f", or give the folder {path.parent}, whose config.json says it" if beside else ""
        raise ModelError(
            f"{path} holds weights only: say which architecture they are of, such as "
            f"--arch deit_tiny_patch16_224 or --arch torchvision:vit_b_16{folder}"
        )
    weights = _stripped(_read(path), path)
    with torch.random.fork_rng(devices=[]):
        if arch.startswith(_TORCHVISION):
            model, taken = _torchvision(arch.removeprefix(_TORCHVISION), weights, path)
            taken = _normalised(taken, mean, std)
        else:
            model = _timm(arch, weights, path)
            taken = timm_preprocessing(model, arch, mean=mean, std=std)
    _require_same_names(model, weights, path, arch)
    _require_floats(model, weights, path)
    model.load_state_dict(weights)
    return Model.of(model, str(path), taken, None)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than weights, so that loading it could run code that it brings, or "
            "is damaged: save model.state_dict() alone, best as .safetensors"
        ) from None
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot read {path} ({reason}): get it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _stripped(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights under the model's own names; what was taken off them is said."""
    taken: list[str] = []
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None):
        content = content[wrapper]
        taken.append(wrapper)
    odd = [str(key) for key, value in content.items() if not _is_named_tensor(key, value)]
    if odd or not content:
        what = f"entries that are no named tensors: {listed(odd)}" if odd else "no weights"
        raise ModelError(f"{path} holds {what}; expected a state dict")
    while prefix := next((item for item in _PREFIXES if _all_begin(content, item)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
        taken.append(prefix)
    if taken:
        say(f"model: the weights of {path.name} are under {' > '.join(taken)}")
    return content


def _is_named_tensor(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _all_begin(content: dict[str, Any], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in content)


def _timm(arch: str, weights: dict[str, Tensor], path: Path) -> nn.Module:
    """A model of timm, in the sizes of the weights."""
    classes = {"num_classes": _num_classes(weights, _HEAD, path)}
    model = create_timm(arch, **classes)
    sizes = _sizes(model, weights)
    if sizes:
        say(f"model: {arch} with {', '.join(f'{k} {v}' for k, v in sizes.items())}, by its weights")
        model = create_timm(arch, **classes, **sizes)
    return model


def _sizes(model: Any, weights: dict[str, Tensor]) -> dict[str, int]:
    """Where patch and position embedding are of other sizes than the architecture's own."""
    own = model.state_dict()
    patches = weights.get(_PATCHES)
    known = isinstance(model, _POSITIONED)
    positions = weights.get(_POSITIONS) if known else None
    if patches is None or patches.ndim != 4 or _PATCHES not in own:
        return {}
    found = {"in_chans": patches.shape[1], "patch_size": patches.shape[-1]}
    before = {"in_chans": own[_PATCHES].shape[1], "patch_size": own[_PATCHES].shape[-1]}
    if positions is not None and positions.ndim == 3 and _POSITIONS in own:
        # Class token and registers have positions too, unless the architecture says otherwise.
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        side = math.isqrt(max(positions.shape[1] - prefix, 0))
        if side**2 == positions.shape[1] - prefix:
            found["img_size"] = side * patches.shape[-1]
            before["img_size"] = model.patch_embed.img_size[0]
    return {name: size for name, size in found.items() if size != before[name]}


def _torchvision(
    name: str, weights: dict[str, Tensor], path: Path
) -> tuple[nn.Module, Preprocessing]:
    from vitcut.model.torchvision_folders import HEAD, build_torchvision, torchvision_preprocessing

    _num_classes(weights, HEAD, path)
    model = build_torchvision(name, weights)
    return model, torchvision_preprocessing(name, model)


def _num_classes(weights: dict[str, Tensor], head: str, path: Path) -> int:
    if head not in weights:
        raise ModelError(
            f"{path} has no {head}, which says how many classes there are: expected the weights "
            f"of a classifier of that architecture, found {listed(sorted(weights))}"
        )
    weight = weights[head]
    if weight.ndim != 2 or not len(weight):
        raise ModelError(
            f"{path} has {head} of shape {list(weight.shape)}: expected [classes, features], the "
            "weights of a linear classifier"
        )
    return len(weight)


def _normalised(
    taken: Preprocessing, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Preprocessing:
    channels = len(taken.mean)
    mean, std = mean or taken.mean, std or taken.std
    return replace(
        taken, mean=per_channel(mean, channels, "mean"), std=per_channel(std, channels, "std")
    )


def _require_same_names(
    model: nn.Module, weights: dict[str, Tensor], path: Path, arch: str
) -> None:
    expected = model.state_dict()
    misfits = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": [
            f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
            for key in sorted(expected.keys() & weights.keys())
            if expected[key].shape != weights[key].shape
        ],
    }
    told = told_misfits(misfits)
    if told:
        raise ModelError(
            f"{path} does not fit {arch}: {told}: give the architecture that it was trained as"
        )


def _require_floats(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Refuse what torch would bring to floats in silence."""
    odd = [
        f"{key} {weights[key].dtype}"
        for key, own in model.state_dict().items()
        if own.is_floating_point() and not weights[key].is_floating_point()
    ]
    if odd:
        raise ModelError(
            f"{path} has weights that are no floating-point numbers: {listed(odd)}; expected "
            "those that the model was trained with: save them in float32, not quantised"
        )
