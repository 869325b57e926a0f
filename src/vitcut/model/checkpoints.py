"""Bare checkpoints: a state dict in a file, loaded into a model of a library that it fits exactly.

Training tools put the weights under wrappers and prefixes, and other tensors beside them. Wherever
the weights of a patch embedding are, there is a ViT; what lies beside it is left out only if it
cannot be a part of the model.
"""

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from vitcut.errors import ConfigError, ModelError, one_line, shortage
from vitcut.model.foreign import LOAD_ERRORS, listed, told_misfits
from vitcut.model.model import Model
from vitcut.model.timm_folders import create_timm, require_architecture, timm_preprocessing
from vitcut.preprocessing import WHOLE, Preprocessing, per_channel
from vitcut.progress import say
from vitcut.shapes import Tensor

OWN_SIZES = "vit"
"""The architecture of a plain ViT whose sizes are those of its weights."""
_TORCHVISION = "torchvision:"
_HEAD, _PATCHES, _POSITIONS = "head.weight", "patch_embed.proj.weight", "pos_embed"
_TORCHVISION_PATCHES = "conv_proj.weight"
_DEEPEST = 6
"""Wrappers within wrappers that are looked into."""
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged)(?![a-z])")
"""Of several copies of the weights, the one of such a name is the averaged one."""
_INSIDE = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch puts into names where a part of a model was compiled or sharded."""


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """The weights of one ViT in a file, and the tensors beside it."""

    where: tuple[str, ...]
    """Wrappers and the prefix that the names were under."""
    own: dict[str, Tensor]
    """By the names of the library."""
    beside: dict[str, Tensor]

    @property
    def told(self) -> str:
        """Where it was, for messages."""
        return " > ".join(self.where) or "no wrapper"


def load_checkpoint(
    path: Path,
    *,
    arch: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    num_heads: int | None = None,
) -> Model:
    """Build a model by name and fill it with the weights of a file.

    The number of classes comes from the classifier; sizes of images and patches, and the number of
    channels, from the patch and position embeddings.

    Args:
        path: A .safetensors file, or one of ``torch.save``.
        arch: timm's name of the architecture, torchvision:NAME, or vit for one whose sizes are all
            those of the weights.
        mean: The mean of the images that it was trained on; None takes the library's.
        std: Their standard deviation, likewise.
        num_heads: Heads per block, if the architecture is vit.

    Raises:
        ModelError: The file cannot be read without running code that it contains, there is no such
            architecture, or the weights do not fit it.
        ConfigError: The sizes of a vit are not known.
    """
    if arch is None:
        beside = (path.parent / "config.json").is_file()
        folder = f", or give the folder {path.parent}, whose config.json says it" if beside else ""
        raise ModelError(
            f"{path} holds weights only: say which architecture they are of, such as "
            "--arch deit_tiny_patch16_224 or --arch torchvision:vit_b_16, or for sizes of your own "
            f"--arch vit with --num-heads{folder}"
        )
    found = _find_weights(_read(path), path)
    if found.where:
        say(f"model: the weights of {path.name} are under {found.told}")
    with torch.random.fork_rng(devices=[]):
        model, taken = _build(arch, found, mean, std, num_heads, path)
    own = model.state_dict()
    weights, beside = dict(found.own), dict(found.beside)
    beside |= {key: weights.pop(key) for key in weights.keys() - own.keys()}
    left = sorted(key for key, tensor in beside.items() if _is_no_layer(key, tensor))
    unexpected = beside.keys() - left
    mismatched = [
        (key, weights[key].shape, own[key].shape)
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if told := told_misfits(own.keys() - weights.keys(), unexpected, mismatched):
        raise ModelError(
            f"{path} does not fit {arch}: {told}: give the architecture that it was trained as"
            + (", or save the state_dict() of the ViT alone" if unexpected else "")
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
    if left:
        say(f"model: left out of {path.name}, as no part of the ViT: {listed(left)}")
    model.load_state_dict(weights)
    return Model.of(model, str(path), taken, None)


def _build(
    arch: str,
    found: _Weights,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    num_heads: int | None,
    path: Path,
) -> tuple[nn.Module, Preprocessing]:
    """A freshly initialised model in the sizes of the weights, and its preprocessing."""
    weights = found.own
    if arch == OWN_SIZES:
        return _build_own(found, mean, std, num_heads, path)
    if num_heads is not None:
        raise ConfigError(
            f"num-heads is for arch {OWN_SIZES}, got it with {arch!r}, which says how many there "
            "are: leave it out"
        )
    of_torchvision = _PATCHES not in weights
    if arch.startswith(_TORCHVISION) != of_torchvision:
        written, remedy = (
            ("torchvision", "torchvision:NAME") if of_torchvision else ("timm", "NAME")
        )
        raise ModelError(
            f"{path} has the names of {written}'s ViTs, which do not fit {arch}: give "
            f"--arch {remedy} of the architecture that it was trained as, or --arch {OWN_SIZES}"
        )
    if of_torchvision:
        from vitcut.model.torchvision_models import (
            HEAD,
            build_torchvision,
            torchvision_preprocessing,
        )

        name = arch.removeprefix(_TORCHVISION)
        _num_classes(found, HEAD, path)
        model = build_torchvision(name, weights)
        taken = torchvision_preprocessing(name, model)
        channels = len(taken.mean)
        return model, replace(
            taken,
            mean=per_channel(mean or taken.mean, channels, "mean"),
            std=per_channel(std or taken.std, channels, "std"),
        )
    require_architecture(arch)
    classes = _num_classes(found, _HEAD, path)
    model = create_timm(arch, num_classes=classes)
    sizes: dict[str, Any] = dict(timm_sizes(model, weights))
    if "fc_norm.weight" in weights.keys() - model.state_dict().keys():
        # As in MAE: the norm comes after the mean of the patches.
        sizes["global_pool"] = "avg"
    if sizes:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        say(f"model: {arch} with {told}, by its weights")
        model = create_timm(arch, num_classes=classes, **sizes)
    return model, timm_preprocessing(model, arch, mean=mean, std=std)


def _build_own(
    found: _Weights,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    num_heads: int | None,
    path: Path,
) -> tuple[nn.Module, Preprocessing]:
    """A plain ViT by the shapes of its weights; how many heads there are, none of them says."""
    weights, given = found.own, {"num-heads": num_heads, "mean": mean, "std": std}
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        raise ConfigError(
            f"arch {OWN_SIZES} takes its sizes from {path.name}, which does not say "
            f"{' and '.join(missing)}: give what the model was trained with"
        )
    if _PATCHES in weights:
        _num_classes(found, _HEAD, path)
        build = vit_of_shapes
    else:
        from vitcut.model.torchvision_models import HEAD, torchvision_of_shapes

        _num_classes(found, HEAD, path)
        build = torchvision_of_shapes
    problem = f"{path} is no plain ViT with {num_heads} heads per block"
    try:
        model, size, sizes = build(weights, num_heads or 0)
    except KeyError as error:
        raise ModelError(f"{problem}: it has no {error}, which says a size") from None
    except LOAD_ERRORS as error:
        raise ModelError(f"{problem}: {one_line(error)}") from None
    told = ", ".join(f"{name} {value}" for name, value in sizes.items())
    say(f"model: {told}, by its weights; taken as usual: GELU, LayerNorm with eps 1e-6")
    channels = weights[_PATCHES if _PATCHES in weights else _TORCHVISION_PATCHES].shape[1]
    return model, Preprocessing(
        image_size=size,
        mean=per_channel(mean, channels, "mean"),
        std=per_channel(std, channels, "std"),
        framing=replace(WHOLE, channels=channels),
    )


def vit_of_shapes(
    weights: Mapping[str, Tensor], num_heads: int
) -> tuple[nn.Module, int, dict[str, Any]]:
    """A timm ``VisionTransformer`` in the sizes of some weights.

    Args:
        weights: By timm's names.
        num_heads: Heads per block.

    Returns:
        The model, freshly initialised; the side of its images, in pixels; and its sizes, by the
        names of timm.

    Raises:
        KeyError: Weights that say a size are missing.
        ValueError: The position embeddings can be those of several image sizes, or of none.
    """
    width, channels, patch, _ = weights[_PATCHES].shape
    first = "blocks.0."
    tokens = {
        name: weights[f"{name}_token"].shape[1]
        for name in ("cls", "reg")
        if f"{name}_token" in weights
    }
    count, prefix = weights[_POSITIONS].shape[1], sum(tokens.values())
    # Prefix tokens have positions or, with no_embed_class, not: of a square, n**2 + prefix or n**2.
    sides = {own: math.isqrt(max(count - own, 0)) for own in (prefix, 0)}
    fitting = {own: side for own, side in sides.items() if side > 0 and side**2 == count - own}
    if len(fitting) != 1:
        raise ValueError(
            f"{count} position embeddings and {prefix} prefix tokens do not tell the number of "
            "patches, expected a square"
        )
    [(embedded, side)] = fitting.items()
    hidden = len(weights[f"{first}mlp.fc1.weight"])
    reads_patches = "fc_norm.weight" in weights or "cls" not in tokens
    sizes: dict[str, Any] = {
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": len(weights[_HEAD]),
        "global_pool": "avg" if reads_patches else "token",
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": num_heads,
    }
    model = VisionTransformer(
        **sizes,
        # timm rounds down: half a neuron more keeps the quotient from losing one.
        mlp_ratio=(hidden + 0.5) / width,
        qkv_bias=f"{first}attn.qkv.bias" in weights,
        qk_norm=f"{first}attn.q_norm.weight" in weights,
        init_values=1.0 if f"{first}ls1.gamma" in weights else None,
        class_token="cls" in tokens,
        reg_tokens=tokens.get("reg", 0),
        no_embed_class=prefix > 0 and embedded == 0,
        pre_norm="norm_pre.weight" in weights,
        fc_norm="fc_norm.weight" in weights,
    )
    return model, side * patch, sizes


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


class _StandIn:
    """In place of an object of a class that is not torch's: holds nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Ignore whatever the file says of it."""

    def __setstate__(self, _: Any) -> None:
        """Ignore whatever the file says of it."""


def _read(path: Path) -> Any:
    """What a file holds, without running any code of it.

    Args, callbacks and the like that tools save beside the weights become stand-ins.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return dict(load_file(path))
        try:
            unknown = get_unsafe_globals_in_checkpoint(path)
        except ValueError:
            unknown = []  # The format of torch before 1.6 cannot be looked through.
        stand_ins: list[Any] = [(type(name, (_StandIn,), {}), name) for name in unknown]
        with safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than weights, so that loading it could run code that it contains, "
            "or is damaged: save model.state_dict() alone, best as .safetensors"
        ) from None
    except LOAD_ERRORS as error:
        if shortage(error):
            raise
        if "TorchScript" in str(error):
            raise ModelError(
                f"{path} is a TorchScript program: expected weights: save model.state_dict() of "
                "the model that it was made from"
            ) from None
        raise ModelError(
            f"cannot read {path} ({one_line(error)}): download or copy it again"
        ) from None
    whole = [content, *(content.values() if isinstance(content, dict) else ())]
    modules = [type(one).__name__ for one in whole if isinstance(one, _StandIn)]
    if isinstance(content, _StandIn) or (modules and not any(_state_dicts(content, ()))):
        raise ModelError(
            f"{path} holds no plain weights but a whole pickled {modules[0]}, and loading that "
            "could run code of the file: load it where you trust it, and save model.state_dict() "
            "alone"
        )
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _state_dicts(
    content: Any, where: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every set of named tensors in a file, with the names of the wrappers around it."""
    if not isinstance(content, Mapping) or len(where) > _DEEPEST:
        return
    tensors = {
        _INSIDE.sub("", key): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield where, tensors
    for key, value in content.items():
        yield from _state_dicts(value, (*where, str(key)))


def _find_weights(content: Any, path: Path) -> _Weights:
    """The one ViT in a file; of several copies, the averaged one.

    Raises:
        ModelError: There is none, or several that differ.
    """
    dicts = list(_state_dicts(content, ()))
    found: list[_Weights] = []
    for where, tensors in dicts:
        prefixes = [
            name.removesuffix(anchor)
            for anchor in (_PATCHES, _TORCHVISION_PATCHES)
            for name in tensors
            if name == anchor or name.endswith(f".{anchor}")
        ]
        for prefix in prefixes:
            others = tuple(one for one in prefixes if one != prefix and one.startswith(prefix))
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix) and not (others and name.startswith(others))
            }
            taken = tuple(one for one in prefixes if one)
            beside = {} if not prefix else {
                name: one for name, one in tensors.items() if not name.startswith(taken)
            }  # fmt: skip
            at = (*where, prefix) if prefix else where
            found.append(_Weights(where=at, own=own, beside=beside))
    if not found:
        names = [name for _, tensors in dicts for name in tensors]
        hint = "expected those of a ViT, by the names of timm or torchvision"
        if any(name.endswith("patch_embeddings.projection.weight") for name in names):
            hint = "a model of transformers: give the folder with its config.json"
        what = f"found {listed(names)}" if names else "no weights are in it"
        raise ModelError(f"{path} has no {_PATCHES} or {_TORCHVISION_PATCHES} ({what}): {hint}")
    averaged = [one for one in found if _AVERAGED.search(one.told)]
    if len(found) > 1 and len(averaged) == 1:
        return averaged[0]
    first, *others = found
    if any(not _are_equal(first.own, one.own) for one in others):
        told = ", ".join(one.told for one in found)
        raise ModelError(
            f"{path} holds {len(found)} models that differ (under {told}): save the state_dict() "
            "of the one that you mean alone"
        )
    return first


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _is_no_layer(name: str, tensor: Tensor) -> bool:
    """Whether a tensor beside a ViT is a counter, a measurement, or the class weights of a loss."""
    of_a_loss = re.search("crit|loss", name) is not None and tensor.ndim < 2
    return of_a_loss or not tensor.is_floating_point()


def _num_classes(found: _Weights, head: str, path: Path) -> int:
    weights = found.own
    if head not in weights:
        layers = [
            f"{name} {list(tensor.shape)}"
            for name, tensor in {**weights, **found.beside}.items()
            if tensor.ndim == 2 and not re.search(r"(blocks|layers)\.", name)
        ]
        seen = (
            f"found {listed(layers)}: if that is one linear layer on the ViT's features, make it "
            f"the classifier in Python (model.{head.removesuffix('.weight')} = that layer) and "
            "save model.state_dict()"
            if layers
            else "found none: a backbone without a classifier; save the model with the linear one "
            "that it was trained with"
        )
        raise ModelError(f"{path} has no {head}, the weights of a linear classifier; {seen}")
    weight = weights[head]
    if weight.ndim != 2 or not len(weight):
        raise ModelError(
            f"{path} has {head} of shape {list(weight.shape)}: expected [classes, features], the "
            "weights of a linear classifier"
        )
    return len(weight)
