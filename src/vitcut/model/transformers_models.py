"""The adapter for Hugging Face's image classifiers: ViT, DeiT and DINOv2.

Whatever it does not understand it refuses by name. Checking that the weights reproduce the model's
logits is left to ``intervention.tracing``, CLIP's classifier to ``transformers_clip.py``.
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

from vitcut.model.reading import Reading, scaled
from vitcut.model.weights import (
    Activation,
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    NormWeights,
    ViTWeights,
)
from vitcut.shapes import Tensor

_REMEDY = (
    "expected the ForImageClassification of ViT, DeiT, Dinov2, Dinov2WithRegisters or CLIP, of "
    "transformers 5.19 or newer"
)
_FAMILIES = {
    "ViTForImageClassification": ("vit", "ViT"),
    "DeiTForImageClassification": ("deit", "DeiT"),
    "DeiTForImageClassificationWithTeacher": ("deit", "DeiT"),
    "Dinov2ForImageClassification": ("dinov2", "Dinov2"),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", "Dinov2WithRegisters"),
    "CLIPForImageClassification": ("clip", "CLIP"),
}
"""By the class's name: the folder of its file, and what the names of its parts begin with."""
_ATTENTION = {"sdpa", "eager"}
_NOT_YET = {
    "DINOv3ViT": "its rotary positions; timm's DINOv3 models are read",
    "Siglip": "the mean of its patches behind a norm",
}
_NEVER = {
    "Swin": "attention in windows, with relative position bias",
    "Beit": "relative position bias",
    "Data2VecVision": "relative position bias",
    "Cvt": "convolutional stems",
    "ViTModel": "no classifier",
    "DeiTModel": "no classifier",
    "Dinov2Model": "no classifier",
    "CLIP": "no linear classifier",
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


def read_transformers(model: nn.Module) -> ViTWeights:
    """Read a Hugging Face image classifier, which is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    if type(model).__name__.startswith("CLIP"):
        from vitcut.model.transformers_clip import ClipReading

        return ClipReading(model, _REMEDY).weights()
    return HfReading(model, _REMEDY).weights()


class HfReading(Reading):
    """One image classifier of transformers being read."""

    _parts: Any = None
    """The file of its family."""
    _begin = ""
    """What the names of its parts begin with."""

    def weights(self) -> ViTWeights:
        """All of it."""
        trunk = self._trunk()
        embeddings = trunk.embeddings
        self.require_own(embeddings, "Embeddings")
        patch_weight, patch_bias = self._patches(embeddings.patch_embeddings)
        prefix, positions = self._tokens(embeddings)
        norm = self.norm_of(trunk.layernorm)
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
            num_read=2 if self._has_teacher else 1,
            patch_readout="normed_mean" if self._reads_patches(head_weight, prefix) else "none",
        )
        self.finish()
        return weights

    @property
    def _has_teacher(self) -> bool:
        return type(self.model).__name__.endswith("WithTeacher")

    def _reads_patches(self, head_weight: Tensor, prefix: Tensor) -> bool:
        return not self._has_teacher and head_weight.shape[1] > prefix.shape[1]

    def family(self) -> str:
        """Find out whose parts to expect, and refuse other models."""
        name = type(self.model).__name__
        if name not in _FAMILIES:
            for table, yet in ((_NOT_YET, True), (_NEVER, False)):
                for begin, reason in table.items():
                    if name.startswith(begin):
                        self.refuse(f"{name} ({reason})", yet=yet)
            self.refuse(name)
        family, self._begin = _FAMILIES[name]
        self._parts = import_module(f"transformers.models.{family}.modeling_{family}")
        self.require_own(self.model, name.removeprefix(self._begin))
        return family

    def _trunk(self) -> Any:
        trunk = getattr(self.model, self.family())
        self.require_own(trunk, "Model")
        if getattr(trunk, "pooler", None) is not None:
            self.refuse("a pooler before the classifier")
        return trunk

    def require_own(self, module: Any, part: str) -> None:
        """Name a module that must be this family's own class."""
        expected = getattr(self._parts, f"{self._begin}{part}", None)
        if expected is None:
            self.refuse(f"this version of transformers, which has no {self._begin}{part}")
        self.require(module, expected, part)

    def _patches(self, embedding: Any) -> tuple[Tensor, Tensor]:
        self.require_own(embedding, "PatchEmbeddings")
        self.grid(embedding.image_size, embedding.patch_size)
        return self.patches(embedding.projection, "patch embedding")

    def _tokens(self, embeddings: Any) -> tuple[Tensor, Tensor]:
        """Prefix tokens and the positions of the patches.

        DeiT's second token is a register where only the class token is read; DINOv2's registers
        have no positions.
        """
        self.inert(embeddings.dropout, "embeddings.dropout")
        self.unused(embeddings.mask_token)
        prefix = self.tensor(embeddings.cls_token)[0]
        if hasattr(embeddings, "distillation_token"):
            prefix = torch.cat([prefix, self.tensor(embeddings.distillation_token)[0]])
        position = self.tensor(embeddings.position_embeddings)[0]
        prefix, position = prefix + position[: len(prefix)], position[len(prefix) :]
        if hasattr(embeddings, "register_tokens"):
            prefix = torch.cat([prefix, self.tensor(embeddings.register_tokens)[0]])
        return prefix, position

    def _classifier(self, *, width: int) -> tuple[Tensor, Tensor]:
        """Of the class token; DINOv2's reads the mean of the patches too, unless that is zero."""
        if self._has_teacher:
            return self.classifiers(self.model.cls_classifier, self.model.distillation_classifier)
        weight, bias = self.linear(self.model.classifier, "classifier")
        if not weight[:, width:].any():
            weight = weight[:, :width].contiguous()
        return weight, bias

    @property
    def _is_dinov2(self) -> bool:
        return self._begin.startswith("Dinov2")

    def _layers(self, trunk: Any) -> Any:
        layers = trunk.encoder.layer if self._is_dinov2 else trunk.layers
        if self._is_dinov2:
            self.require_own(trunk.encoder, "Encoder")
        self.require(layers, nn.ModuleList, "list of blocks")
        return layers

    def _block(self, layer: Any) -> BlockWeights:
        self.require_own(layer, "Layer")
        if not self._is_dinov2:
            self.inert(layer.dropout, "dropout")
            return self._parts_of(layer, layer.layernorm_before, layer.layernorm_after)
        drop_path = getattr(self._parts, f"{self._begin}DropPath")
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
            attn_norm=self.norm_of(first),
            attn=self._attention(layer.attention, attn_scale),
            mlp_norm=self.norm_of(second),
            mlp=self.any_mlp(layer.mlp, mlp_scale),
        )

    def _layer_scale(self, module: Any) -> Tensor:
        self.require_own(module, "LayerScale")
        return self.tensor(module.lambda1)

    def _attention(self, attn: Any, layer_scale: Tensor | None) -> AttentionWeights:
        return self.attention(attn, (attn.o_proj, attn.scaling), layer_scale)

    def attention(
        self, attn: Any, out_and_scale: tuple[Any, float], layer_scale: Tensor | None = None
    ) -> AttentionWeights:
        """What the attentions of transformers have in common."""
        self.require_own(attn, "Attention")
        kind = attn.config._attn_implementation
        if kind not in _ATTENTION:
            self.refuse(f"attention {kind!r}: model.set_attn_implementation('sdpa') sets another")
        if attn.is_causal:
            self.refuse("causal attention")
        qkv = self.qkv(attn)
        out_layer, scale = out_and_scale
        out = scaled(*self.linear(out_layer, "attention's output"), layer_scale)
        heads = len(qkv[1]) // (3 * attn.head_dim)
        return AttentionWeights.split(qkv, out, num_heads=heads, scale=scale)

    def any_mlp(self, mlp: Any, layer_scale: Tensor | None = None) -> MlpWeights:
        """An MLP, plain or gated."""
        if type(mlp).__name__.endswith("SwiGLUFFN"):
            self.require_own(mlp, "SwiGLUFFN")
            gate = self.linear(mlp.gate_proj, "MLP's gate")
            first, second, activation = mlp.up_proj, mlp.down_proj, mlp.act_fn
        else:
            self.require_own(mlp, "MLP")
            gate = None
            first, second, activation = mlp.fc1, mlp.fc2, mlp.activation_fn
        return self.mlp(
            self.linear(first, "MLP's first layer"),
            second,
            self._activation(activation),
            layer_scale=layer_scale,
            gate=gate,
        )

    def _activation(self, module: Any) -> Activation:
        plain = type(module) is GELUActivation and module.act is nn.functional.gelu
        activation = "gelu" if plain else _ACTIVATIONS.get(type(module))
        if activation is None:
            self.refuse(f"activation {type(module).__name__}")
        self.require(module, type(module), "activation")
        return activation

    def norm_of(self, module: Any) -> NormWeights:
        """A LayerNorm."""
        return self.norm(module, "norm", like=next(self.model.parameters()))
