"""The adapter for Hugging Face's image classifiers: ViT, DeiT and DINOv2.

Whatever it does not understand it refuses by name. Checking that the weights reproduce the model's
logits is left to ``intervention.tracing``.
"""

from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)

from vitcut.shapes import Float, Tensor
from vitcut.vits.reading import Reading, scaled
from vitcut.vits.weights import (
    Activation,
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    NormWeights,
    ViTWeights,
)

_REMEDY = (
    "expected a ViTForImageClassification, DeiTForImageClassification or "
    "Dinov2ForImageClassification of transformers 5.19 or newer"
)
_FAMILIES = {
    "ViTForImageClassification": ("vit", "ViT"),
    "DeiTForImageClassification": ("deit", "DeiT"),
    "Dinov2ForImageClassification": ("dinov2", "Dinov2"),
}
"""By the class's name: the folder of its file, and what the names of its parts begin with."""
_ATTENTION = {"sdpa", "eager"}
_NOT_YET = {
    "CLIP": "norm_pre (pre_layrnorm) before the blocks",
    "DeiTForImageClassificationWithTeacher": "a distillation token that is read too",
    "Dinov2WithRegisters": "patch tokens are read beside the class token",
    "DINOv3ViT": "rotary positions (RoPE)",
    "Siglip": "mean pooling",
}
_NEVER = {
    "Swin": "attention in windows, with relative position bias",
    "Beit": "relative position bias",
    "Data2VecVision": "relative position bias",
    "ViTHybrid": "a convolutional stem",
    "CvT": "convolutional stems",
    "ViTModel": "no classifier",
    "DeiTModel": "no classifier",
    "Dinov2Model": "no classifier",
}
"""What the names of other models begin with, and what keeps them out."""
_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    QuickGELUActivation: "quick_gelu",
    SiLUActivation: "silu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


class LogitsOnly(nn.Module):
    """A Hugging Face classifier as a module from pixels to logits, as every stage expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "images channels y x"]) -> Tensor:
        """The logits."""
        return self.model(pixel_values=pixels, return_dict=True).logits


def read_transformers(model: nn.Module) -> ViTWeights:
    """Read a Hugging Face image classifier, bare or in `LogitsOnly`; it is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    return _HfReading(model, _REMEDY).weights()


class _HfReading(Reading):
    def __init__(self, model: nn.Module, remedy: str) -> None:
        super().__init__(model, remedy)
        self._whole: Any = model
        self._parts: Any = None
        self._begin = ""

    def weights(self) -> ViTWeights:
        trunk = self._trunk()
        embeddings = trunk.embeddings
        self._require(embeddings, "Embeddings")
        patch_weight, patch_bias = self._patches(embeddings.patch_embeddings)
        prefix, positions = self._tokens(embeddings)
        norm = self._norm(trunk.layernorm)
        head_weight, head_bias = self._classifier(width=len(patch_weight))
        weights = ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=prefix,
            positions=positions,
            blocks=tuple(self._block(layer) for layer in self._layers(trunk)),
            norm=norm,
            head_weight=head_weight,
            head_bias=head_bias,
        )
        self.finish()
        return weights

    def _trunk(self) -> Any:
        name = type(self._whole).__name__
        if name not in _FAMILIES:
            for table, yet in ((_NOT_YET, True), (_NEVER, False)):
                for begin, reason in table.items():
                    if name.startswith(begin):
                        self.refuse(f"{name} ({reason})", yet=yet)
            self.refuse(name)
        family, self._begin = _FAMILIES[name]
        self._parts = import_module(f"transformers.models.{family}.modeling_{family}")
        self._require(self._whole, "ForImageClassification")
        trunk = getattr(self._whole, family)
        self._require(trunk, "Model")
        if getattr(trunk, "pooler", None) is not None:
            self.refuse("a pooler before the classifier")
        return trunk

    def _require(self, module: Any, part: str) -> None:
        """Name a module that must be this family's own class."""
        expected = getattr(self._parts, f"{self._begin}{part}", None)
        if expected is None:
            self.refuse(f"this version of transformers, which has no {self._begin}{part}")
        self.require(module, expected, part)

    def _patches(self, embedding: Any) -> tuple[Tensor, Tensor]:
        self._require(embedding, "PatchEmbeddings")
        self.grid(embedding.image_size, embedding.patch_size)
        return self.patches(embedding.projection, "patch embedding")

    def _tokens(self, embeddings: Any) -> tuple[Tensor, Tensor]:
        """Prefix tokens and the positions of the patches; DeiT's second token is a register."""
        self.inert(embeddings.dropout, "embeddings.dropout")
        self.unused(embeddings.mask_token)
        prefix = self.tensor(embeddings.cls_token)[0]
        if hasattr(embeddings, "distillation_token"):
            prefix = torch.cat([prefix, self.tensor(embeddings.distillation_token)[0]])
        position = self.tensor(embeddings.position_embeddings)[0]
        return prefix + position[: len(prefix)], position[len(prefix) :]

    def _classifier(self, *, width: int) -> tuple[Tensor, Tensor]:
        """Of the class token; DINOv2's reads the mean of the patches too, unless that is zero."""
        weight, bias = self.linear(self._whole.classifier, "classifier")
        if weight[:, width:].any():
            self.refuse("a classifier that reads the mean of the patch tokens too", yet=True)
        return weight[:, :width].contiguous(), bias

    def _layers(self, trunk: Any) -> Any:
        layers = trunk.layers if self._begin != "Dinov2" else trunk.encoder.layer
        if self._begin == "Dinov2":
            self._require(trunk.encoder, "Encoder")
        self.require(layers, nn.ModuleList, "list of blocks")
        return layers

    def _block(self, layer: Any) -> BlockWeights:
        self._require(layer, "Layer")
        if self._begin != "Dinov2":
            self.inert(layer.dropout, "dropout")
            return self._parts_of(layer, layer.layernorm_before, layer.layernorm_after)
        drop_path = self._parts.Dinov2DropPath
        self.inert(layer.drop_path, "drop_path", also=(drop_path,))
        scales = (self._layer_scale(layer.layer_scale1), self._layer_scale(layer.layer_scale2))
        return self._parts_of(layer, layer.norm1, layer.norm2, *scales)

    def _parts_of(
        self,
        layer: Any,
        first: Any,
        second: Any,
        attn_scale: Tensor | None = None,
        mlp_scale: Tensor | None = None,
    ) -> BlockWeights:
        return BlockWeights(
            attn_norm=self._norm(first),
            attn=self._attention(layer.attention, attn_scale),
            mlp_norm=self._norm(second),
            mlp=self._mlp(layer.mlp, mlp_scale),
        )

    def _layer_scale(self, module: Any) -> Tensor:
        self._require(module, "LayerScale")
        return self.tensor(module.lambda1)

    def _attention(self, attn: Any, layer_scale: Tensor | None) -> AttentionWeights:
        self._require(attn, "Attention")
        kind = attn.config._attn_implementation
        if kind not in _ATTENTION:
            self.refuse(f"attention {kind!r}: model.set_attn_implementation('sdpa') sets another")
        if attn.is_causal:
            self.refuse("causal attention")
        pairs = [
            self.linear(getattr(attn, f"{letter}_proj"), f"attention's {letter}_proj")
            for letter in "qkv"
        ]
        weight, bias = (torch.cat(items) for items in zip(*pairs, strict=True))
        out = scaled(*self.linear(attn.o_proj, "attention's o_proj"), layer_scale)
        heads = len(weight) // (3 * attn.head_dim)
        return AttentionWeights.split((weight, bias), out, num_heads=heads, scale=attn.scaling)

    def _mlp(self, mlp: Any, layer_scale: Tensor | None) -> MlpWeights:
        if type(mlp).__name__.endswith("SwiGLUFFN"):
            self.refuse(f"SwiGLU: MLP {type(mlp).__name__}", yet=True)
        self._require(mlp, "MLP")
        return self.mlp(mlp.fc1, mlp.fc2, self._activation(mlp.activation_fn), layer_scale)

    def _activation(self, module: Any) -> Activation:
        plain = type(module) is GELUActivation and module.act is nn.functional.gelu
        activation = "gelu" if plain else _ACTIVATIONS.get(type(module))
        if activation is None:
            self.refuse(f"activation {type(module).__name__}")
        self.require(module, type(module), "activation")
        return activation

    def _norm(self, module: Any) -> NormWeights:
        return self.norm(module, "norm", like=self._whole.classifier.weight)
