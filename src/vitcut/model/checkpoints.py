"""Bare checkpoints: a state dict in a file, loaded into a model of a library that it fits exactly.

timm's own ``load_state_dict`` strips prefixes key by key and does not say so; here a wrapper or a
prefix must hold for all weights, and is reported.
"""

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitcut.errors import ModelError, one_line
from vitcut.model.foreign import LOAD_ERRORS, listed, told_misfits
from vitcut.model.model import Model
from vitcut.model.timm_folders import create_timm, timm_preprocessing
from vitcut.preprocessing import Preprocessing, per_channel
from vitcut.progress import say
from vitcut.shapes import Tensor

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries that hold the weights, in the order in which they are tried: averaged ones first."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Put before every name by DataParallel, torch.compile and Lightning."""
_TORCHVISION = "torchvision:"
_HEAD, _PATCHES, _POSITIONS = "head.weight", "patch_embed.proj.weight", "pos_embed"


def load_checkpoint(
    path: Path,
    *,
    arch: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Model:
    """Build a model by name and fill it with the weights of a file.

    The number of classes comes from the classifier; sizes of images and patches, and the number of
    channels, from the patch and position embeddings.

    Args:
        path: A .safetensors, .pth, .pt or .bin file.
        arch: timm's name of the architecture, or torchvision:NAME.
        mean: The mean of the images that it was trained on; None takes the library's.
        std: Their standard deviation, likewise.

    Raises:
        ModelError: The file cannot be read without running code that it contains, there is no such
            architecture, or the weights do not fit it.
    """
    if arch is None:
        beside = (path.parent / "config.json").is_file()
        folder = f", or give the folder {path.parent}, whose config.json says it" if beside else ""
        raise ModelError(
            f"{path} holds weights only: say which architecture they are of, such as "
            f"--arch deit_tiny_patch16_224 or --arch torchvision:vit_b_16{folder}"
        )
    weights = _read_weights(path)
    with torch.random.fork_rng(devices=[]):
        model, taken = _build(arch, weights, mean, std, path)
    own = model.state_dict()
    mismatched = [
        (key, weights[key].shape, own[key].shape)
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    missing, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
    if told := told_misfits(missing, unexpected, mismatched):
        raise ModelError(
            f"{path} does not fit {arch}: {told}: give the architecture that it was trained as"
        )
    # load_state_dict would cast these to floats without a word; quantised ones lose their scale.
    odd = [
        f"{key} {weights[key].dtype}"
        for key, tensor in own.items()
        if tensor.is_floating_point() and not weights[key].is_floating_point()
    ]
    if odd:
        raise ModelError(
            f"{path} has weights that are not floating-point numbers: {listed(odd)}; expected "
            "those that the model was trained with: save them in float32, not quantised"
        )
    model.load_state_dict(weights)
    return Model.of(model, str(path), taken, None)


def _build(
    arch: str,
    weights: dict[str, Tensor],
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    path: Path,
) -> tuple[nn.Module, Preprocessing]:
    """A freshly initialised model in the sizes of the weights, and its preprocessing."""
    if arch.startswith(_TORCHVISION):
        from vitcut.model.torchvision_models import (
            HEAD,
            build_torchvision,
            torchvision_preprocessing,
        )

        name = arch.removeprefix(_TORCHVISION)
        _num_classes(weights, HEAD, path)
        model = build_torchvision(name, weights)
        taken = torchvision_preprocessing(name, model)
        channels = len(taken.mean)
        return model, replace(
            taken,
            mean=per_channel(mean or taken.mean, channels, "mean"),
            std=per_channel(std or taken.std, channels, "std"),
        )
    classes = _num_classes(weights, _HEAD, path)
    model = create_timm(arch, num_classes=classes)
    if sizes := timm_sizes(model, weights):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        say(f"model: {arch} with {told}, by its weights")
        model = create_timm(arch, num_classes=classes, **sizes)
    return model, timm_preprocessing(model, arch, mean=mean, std=std)


def timm_sizes(model: Any, weights: dict[str, Tensor]) -> dict[str, int]:
    """Sizes in which the weights' patch and position embeddings differ from a model's own.

    Returns:
        ``in_chans``, ``patch_size`` and ``img_size`` for ``timm.create_model``, as far as they
        differ.
    """
    own: dict[str, Tensor] = model.state_dict()
    patches = weights.get(_PATCHES)
    if patches is None or patches.ndim != 4 or _PATCHES not in own:
        return {}
    found = {"in_chans": patches.shape[1], "patch_size": patches.shape[-1]}
    before = {"in_chans": own[_PATCHES].shape[1], "patch_size": own[_PATCHES].shape[-1]}
    # Other classes of timm have positions for other sets of tokens.
    positions = weights.get(_POSITIONS) if isinstance(model, (VisionTransformer, Eva)) else None
    if positions is not None and positions.ndim == 3 and _POSITIONS in own:
        # [1, prefix + patches, width]; with no_embed_class only patches have positions.
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        side = math.isqrt(max(positions.shape[1] - prefix, 0))
        if side**2 == positions.shape[1] - prefix:
            found["img_size"] = side * patches.shape[-1]
            embed: Any = model.patch_embed
            before["img_size"] = embed.img_size[0]
    return {name: size for name, size in found.items() if size != before[name]}


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, without the wrappers and prefixes that training tools put around it."""
    try:
        if path.suffix == ".safetensors":
            content: Any = dict(load_file(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than weights, so that loading it could run code that it contains, "
            "or is damaged: save model.state_dict() alone, best as .safetensors"
        ) from None
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot read {path} ({one_line(error)}): download or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected a state dict")

    stripped: list[str] = []
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None):
        content = content[wrapper]
        stripped.append(wrapper)
    odd = [
        str(key)
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if odd or not content:
        what = f"entries that are not named tensors: {listed(odd)}" if odd else "no weights"
        raise ModelError(f"{path} holds {what}; expected a state dict")
    while prefix := next((one for one in _PREFIXES if all(k.startswith(one) for k in content)), ""):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
        stripped.append(prefix)
    if stripped:
        say(f"model: the weights of {path.name} are under {' > '.join(stripped)}")
    return content


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
