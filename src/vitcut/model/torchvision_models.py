"""torchvision's ``VisionTransformer`` (vit_b_16 and its family): adapter, bare weights, folders.

torchvision has no folder format of its own, so `save_torchvision_folder` writes vitcut's.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision import models
from torchvision.models.vision_transformer import (
    Encoder,
    EncoderBlock,
    MLPBlock,
    VisionTransformer,
)

from vitcut.errors import ConfigError, ModelError, TaskError, one_line
from vitcut.labels import Labels
from vitcut.model.foreign import LOAD_ERRORS, told_as
from vitcut.model.model import Model
from vitcut.model.reading import Reading
from vitcut.model.weights import Activation, AttentionWeights, BlockWeights, ViTWeights
from vitcut.preprocessing import Framing, Preprocessing
from vitcut.shapes import Tensor

HEAD = "heads.head.weight"
KIND = "torchvision"
"""Entry of ``config.json`` that holds the sizes of the model."""
_SIZES = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes")
_KNOWN = {
    "SwinTransformer": "attention in windows, with relative position bias",
    "MaxVit": "attention in windows, with relative position bias, and convolutions",
}
"""Architectures that users often ask for, and why they are refused."""


def read_torchvision(model: nn.Module) -> ViTWeights:
    """Read a torchvision ``VisionTransformer``; the model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    return _TorchvisionReading(model).weights()


class _TorchvisionReading(Reading):
    remedy = "expected a torchvision VisionTransformer with a linear classifier, such as vit_b_16"
    activation_kinds: ClassVar[dict[type[nn.Module], Activation]] = {nn.GELU: "gelu"}

    def weights(self) -> ViTWeights:
        vit, name = self.model, type(self.model).__name__
        if type(vit) is not VisionTransformer:
            self.refuse(f"{name} ({_KNOWN.get(name, 'only VisionTransformer is')})")
        patch_weight, patch_bias = self.patches(vit.conv_proj, vit.image_size)
        encoder = vit.encoder
        self.require(encoder, "encoder", Encoder)
        self.require(encoder.layers, "list of blocks", nn.Sequential)
        self.inert(encoder.dropout, "encoder.dropout")
        position = self.tensor(encoder.pos_embedding)[0]
        if type(self.model.heads) is nn.Linear:
            self.refuse(
                "heads that are a bare Linear: put it where torchvision has it, with "
                "model.heads = nn.Sequential(OrderedDict(head=model.heads))"
            )
        self.require(vit.heads, "classifier", nn.Sequential)
        if len(vit.heads) != 1:
            self.refuse("representation_size, a hidden layer in the classifier")
        head_weight, head_bias = self.linear(vit.heads[0], "classifier")
        weights = ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=self.tensor(vit.class_token)[0] + position[:1],
            positions=position[1:],
            blocks=tuple(self._block(block) for block in encoder.layers),
            norm=self.norm(encoder.ln),
            head_weight=head_weight,
            head_bias=head_bias,
        )
        self.finish()
        return weights

    def _block(self, block: Any) -> BlockWeights:
        self.require(block, "block", EncoderBlock)
        self.require(block.mlp, "MLP", MLPBlock)
        kinds = [type(layer) for layer in block.mlp]
        if kinds != [nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout]:
            self.refuse(f"MLP of {', '.join(kind.__name__ for kind in kinds)}")
        first, activation, dropout, second, last_dropout = block.mlp
        if activation.approximate != "none":
            self.refuse(f"activation {activation}")
        for one in (block.dropout, dropout, last_dropout):
            self.inert(one, "dropout")
        return BlockWeights(
            attn_norm=self.norm(block.ln_1),
            attn=self._attention(block.self_attention),
            mlp_norm=self.norm(block.ln_2),
            mlp=self.mlp(self.linear(first, "MLP's first layer"), activation, second),
        )

    def _attention(self, attn: Any) -> AttentionWeights:
        # torch's own attention. `in_proj` is [3 * width, width]: all of q, then k, then v.
        self.require(attn, "attention", nn.MultiheadAttention)
        if attn.in_proj_weight is None or not attn.batch_first:
            self.refuse("attention whose q, k and v are of other widths, or not batch_first")
        if attn.bias_k is not None or attn.add_zero_attn:
            self.refuse("attention to a key that is not a token (add_bias_kv, add_zero_attn)")
        self.require(attn.out_proj, "attention's out_proj", NonDynamicallyQuantizableLinear)
        weight = self.tensor(attn.in_proj_weight)
        bias = weight[:, 0] * 0 if attn.in_proj_bias is None else self.tensor(attn.in_proj_bias)
        out = self.weight_and_bias(attn.out_proj)
        return AttentionWeights.split((weight, bias), out, num_heads=attn.num_heads)


def build_torchvision(name: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a model by name, with the image size and number of classes of some weights.

    Args:
        name: As in ``torchvision.models.get_model``, such as vit_b_16.
        weights: By torchvision's names, with a ``heads.head.weight``.

    Raises:
        ModelError: There is no such ViT.
    """
    known = models.list_models(include="vit_*")
    if name not in known:
        raise ModelError(f"torchvision has no ViT {name!r}: expected one of {', '.join(known)}")
    sizes = {"num_classes": len(weights[HEAD])}
    patches, positions = weights.get("conv_proj.weight"), weights.get("encoder.pos_embedding")
    if patches is not None and positions is not None and (patches.ndim, positions.ndim) == (4, 3):
        # Positions are [1, 1 + patches, width]: the first is the class token's.
        side = math.isqrt(max(positions.shape[1] - 1, 0))
        sizes["image_size"] = side * patches.shape[-1]
    with told_as(f"torchvision cannot build {name} of such sizes"):
        return models.get_model(name, weights=None, **sizes)


def torchvision_of_shapes(
    weights: Mapping[str, Tensor], num_heads: int
) -> tuple[nn.Module, int, dict[str, Any]]:
    """A ``VisionTransformer`` in the sizes of some weights.

    Args:
        weights: By torchvision's names.
        num_heads: Heads per block.

    Returns:
        The model, freshly initialised; the side of its images, in pixels; and its sizes, by the
        names of torchvision.

    Raises:
        KeyError: Weights that say a size are missing.
        ValueError: The position embeddings are not those of a class token and a square.
    """
    layers = "encoder.layers.encoder_layer_"
    count, patch = weights["encoder.pos_embedding"].shape[1], weights["conv_proj.weight"].shape[-1]
    side = math.isqrt(max(count - 1, 0))
    if side**2 != count - 1:
        raise ValueError(f"{count} position embeddings, expected one more than a square")
    # Checkpoints of early versions call the layers of an MLP linear_1 and linear_2.
    names = (f"{layers}0.mlp.{name}.bias" for name in ("0", "linear_1"))
    hidden = next((name for name in names if name in weights), f"{layers}0.mlp.0.bias")
    sizes: dict[str, Any] = {
        "image_size": side * patch,
        "patch_size": patch,
        "num_layers": len({name.split(".")[2] for name in weights if name.startswith(layers)}),
        "num_heads": num_heads,
        "hidden_dim": len(weights["conv_proj.weight"]),
        "mlp_dim": len(weights[hidden]),
        "num_classes": len(weights[HEAD]),
    }
    return VisionTransformer(**sizes), side * patch, sizes


def torchvision_preprocessing(name: str, model: nn.Module) -> Preprocessing:
    """The preprocessing of torchvision's own weights of an architecture, at the model's size."""
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
    """Write the weights; returns the entries of ``config.json`` that rebuild the model."""
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
        ModelError: The configuration or the weights are damaged, or they do not fit together.
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
    except (*LOAD_ERRORS, ConfigError, TaskError) as error:
        where = f" in {folder / 'config.json'}" if isinstance(error, ConfigError) else ""
        raise ModelError(f"cannot load the model {spec!r}: {one_line(error)}{where}") from None
    return Model.of(model, spec, preprocessing, labels)
