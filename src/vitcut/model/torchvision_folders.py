"""torchvision's ViTs from bare weights, and from folders, which torchvision has no format for.

What a model's parts are called is left to `torchvision_models`.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from vitcut.errors import ConfigError, ModelError, TaskError
from vitcut.framing import Framing
from vitcut.labels import Labels
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing
from vitcut.shapes import Tensor

HEAD = "heads.head.weight"
KIND = "torchvision"
"""The entry of ``config.json`` that names the sizes."""
_PATCHES, _POSITIONS = "conv_proj.weight", "encoder.pos_embedding"
_SIZES = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes")
_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError)


def build_torchvision(name: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build the model of a name, its image size and classes being those of some weights.

    Args:
        name: What ``torchvision.models.get_model`` calls it, such as vit_b_16.
        weights: By torchvision's names; ``heads.head.weight`` is there.

    Raises:
        ModelError: There is no such ViT.
    """
    known = models.list_models(include="vit_*")
    if name not in known:
        raise ModelError(f"torchvision has no ViT {name!r}: expected one of {', '.join(known)}")
    try:
        return models.get_model(name, weights=None, **_sizes(weights))
    except _ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"torchvision cannot build {name} of such sizes: {reason}") from None


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    found = {"num_classes": len(weights[HEAD])}
    patches, positions = weights.get(_PATCHES), weights.get(_POSITIONS)
    if patches is None or positions is None or (patches.ndim, positions.ndim) != (4, 3):
        return found
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    return {**found, "image_size": side * patches.shape[-1]}


def torchvision_preprocessing(name: str, model: nn.Module) -> Preprocessing:
    """What torchvision's own weights of an architecture take, at the model's size."""
    known = list(models.get_model_weights(name))
    presets: list[Any] = [weights.transforms() for weights in known]
    size = int(getattr(model, "image_size"))  # noqa: B009 - torch types attributes as modules
    # The first weights are ImageNet's at 224 pixels; fine-tuned ones of a larger size come later.
    preset = next((item for item in presets if item.crop_size == [size]), presets[0])
    return Preprocessing(
        image_size=size,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        framing=Framing(
            crop_fraction=preset.crop_size[0] / preset.resize_size[0],
            interpolation=preset.interpolation.value,
        ),
    )


def save_torchvision_folder(model: nn.Module, folder: Path, taken: Preprocessing) -> dict[str, Any]:
    """Write the weights; returns what ``config.json`` has to say to build the model again."""
    vit: Any = model
    tensors = {name: tensor.contiguous() for name, tensor in vit.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    framing = taken.framing
    return {
        KIND: {
            **{name: getattr(vit, name) for name in _SIZES},
            "num_layers": len(vit.encoder.layers),
            "num_heads": vit.encoder.layers[0].num_heads,
            "dropout": vit.dropout,
            "attention_dropout": vit.attention_dropout,
            "eps": vit.encoder.ln.eps,
        },
        "preprocessing": {
            "mean": list(taken.mean),
            "std": list(taken.std),
            "fit": framing.fit,
            "crop_fraction": framing.crop_fraction,
            "interpolation": framing.interpolation,
        },
    }


def load_torchvision_folder(folder: Path, spec: str, config: Mapping[str, Any]) -> Model:
    """Read what `save_torchvision_folder` wrote.

    Raises:
        ModelError: Configuration or weights are damaged, or not of one another.
    """
    try:
        sizes, taken = dict(config[KIND]), dict(config["preprocessing"])
        eps = sizes.pop("eps")
        model = VisionTransformer(**sizes, norm_layer=partial(nn.LayerNorm, eps=eps))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        preprocessing = Preprocessing(
            image_size=sizes["image_size"],
            mean=tuple(taken.pop("mean")),
            std=tuple(taken.pop("std")),
            framing=Framing(**taken),
        )
        labels = Labels(
            owner=f"model {spec!r}",
            ids=tuple(config["class_ids"]),
            names=tuple(config["class_names"]),
        )
    except (*_ERRORS, ConfigError, TaskError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load the model {spec!r}: {reason}") from None
    return Model.of(model, spec, preprocessing, labels)
