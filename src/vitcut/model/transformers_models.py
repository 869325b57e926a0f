"""The adapter for Hugging Face's image classifiers: ViT, DeiT, DINOv2 and CLIP's vision tower."""

from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)

from vitcut.model.forward import normalise
from vitcut.model.reading import Reading
from vitcut.model.weights import (
    Activation,
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    ViTWeights,
)
from vitcut.shapes import Tensor

_FAMILIES = {
    "ViTForImageClassification": ("vit", "ViT"),
    "DeiTForImageClassification": ("deit", "DeiT"),
    "DeiTForImageClassificationWithTeacher": ("deit", "DeiT"),
    "Dinov2ForImageClassification": ("dinov2", "Dinov2"),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", "Dinov2WithRegisters"),
    "CLIPForImageClassification": ("clip", "CLIP"),
}
"""Class name: (module of transformers.models, prefix of the class names of its parts)."""
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
"""Prefixes of the names of other models, and why they are refused."""


def read_transformers(model: nn.Module) -> ViTWeights:
    """Read a Hugging Face image classifier; the model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    return _TransformersReading(model).weights()


class _TransformersReading(Reading):
    remedy = (
        "expected the ForImageClassification of ViT, DeiT, Dinov2, Dinov2WithRegisters or CLIP, of "
        "transformers 5.19 or newer"
    )
    activation_kinds: ClassVar[dict[type[nn.Module], Activation]] = {
        GELUActivation: "gelu",
        GELUTanh: "gelu_tanh",
        NewGELUActivation: "gelu_tanh",
        QuickGELUActivation: "quick_gelu",
        SiLUActivation: "silu",
        nn.SiLU: "silu",
        nn.ReLU: "relu",
    }
    _class_prefix = ""
    """What the class names of this family's parts begin with."""
    _parts: Any = None
    """The module that defines them."""

    def weights(self) -> ViTWeights:
        name = type(self.model).__name__
        if name not in _FAMILIES:
            for table, yet in ((_NOT_YET, True), (_NEVER, False)):
                for begin, reason in table.items():
                    if name.startswith(begin):
                        self.refuse(f"{name} ({reason})", yet=yet)
            self.refuse(name)
        kind = getattr(self.model.config, "problem_type", None)
        if kind not in {None, "single_label_classification"}:
            several = "which gives an image several labels or none"
            why = "which measures" if kind == "regression" else several
            self.refuse(f"{name} for {kind}, {why}: vitcut cuts for one class per image")
        family, self._class_prefix = _FAMILIES[name]
        self._parts = import_module(f"transformers.models.{family}.modeling_{family}")
        self._require_own(self.model, name.removeprefix(self._class_prefix))
        weights = self._clip() if family == "clip" else self._vit(getattr(self.model, family))
        self.finish()
        return weights

    def _require_own(self, module: Any, part: str) -> None:
        """Name a module that must be this family's own class."""
        expected = getattr(self._parts, f"{self._class_prefix}{part}", None)
        if expected is None:
            self.refuse(f"this version of transformers, which has no {self._class_prefix}{part}")
        self.require(module, part, expected)

    def _vit(self, trunk: Any) -> ViTWeights:
        """ViT, DeiT and DINOv2."""
        self._require_own(trunk, "Model")
        if getattr(trunk, "pooler", None) is not None:
            self.refuse("a pooler before the classifier")
        embeddings = trunk.embeddings
        self._require_own(embeddings, "Embeddings")
        patches = embeddings.patch_embeddings
        self._require_own(patches, "PatchEmbeddings")
        patch_weight, patch_bias = self.patches(patches.projection, patches.image_size)
        self.inert(embeddings.dropout, "embeddings.dropout")
        # Replaces masked patches in pretraining only.
        self.unused(embeddings.mask_token)

        # DeiT's distillation token is read by the model with a teacher only; otherwise it is a
        # register. DINOv2's registers come after the class token, and have no positions.
        prefix = self.tensor(embeddings.cls_token)[0]
        if hasattr(embeddings, "distillation_token"):
            prefix = torch.cat([prefix, self.tensor(embeddings.distillation_token)[0]])
        position = self.tensor(embeddings.position_embeddings)[0]
        prefix, positions = prefix + position[: len(prefix)], position[len(prefix) :]
        if hasattr(embeddings, "register_tokens"):
            prefix = torch.cat([prefix, self.tensor(embeddings.register_tokens)[0]])

        norm = self.norm(trunk.layernorm)
        width, reads_patches = len(patch_weight), False
        has_teacher = type(self.model).__name__.endswith("WithTeacher")
        if has_teacher:
            # Its logits are the mean of two classifiers, one per token.
            heads = (self.model.cls_classifier, self.model.distillation_classifier)
            head_weight, head_bias = self.classifiers(*heads)
        else:
            head_weight, head_bias = self.linear(self.model.classifier, "classifier")
            # DINOv2's reads the class token, then the mean of the patches: [classes, 2 * width].
            # All zeros for the patches mean that it was trained on the class token alone.
            reads_patches = bool(head_weight[:, width:].any())
            if not reads_patches:
                head_weight = head_weight[:, :width].contiguous()
        if self._class_prefix.startswith("Dinov2"):
            self._require_own(trunk.encoder, "Encoder")
            layers = trunk.encoder.layer
        else:
            layers = trunk.layers
        self.require(layers, "list of blocks", nn.ModuleList)
        return ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=prefix,
            positions=positions,
            blocks=tuple(self._block(layer) for layer in layers),
            norm=norm,
            head_weight=head_weight,
            head_bias=head_bias,
            num_read=2 if has_teacher else 1,
            patch_readout="normed_mean" if reads_patches else "none",
        )

    def _clip(self) -> ViTWeights:
        """CLIP's vision tower: the classifier reads the mean of the last block's patches."""
        tower = self.model.vision_model
        self._require_own(tower, "VisionModel")
        self._require_own(tower.encoder, "Encoder")
        # It normalises the class token, which the classifier does not read.
        self.whole(tower.post_layernorm)
        patch_norm = self.norm(tower.pre_layrnorm)
        embeddings = tower.embeddings
        self._require_own(embeddings, "VisionEmbeddings")
        self.require(embeddings.position_embedding, "positions", nn.Embedding)
        self.unused(embeddings.position_ids)
        patch_weight, patch_bias = self.patches(embeddings.patch_embedding, embeddings.image_size)
        # The first position is the class token's, which is a bare vector: [width].
        positions = self.tensor(embeddings.position_embedding.weight)
        prefix = (self.tensor(embeddings.class_embedding) + positions[0])[None]
        head_weight, head_bias = self.linear(self.model.classifier, "classifier")
        self.require(tower.encoder.layers, "list of blocks", nn.ModuleList)
        return ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=normalise(patch_norm, prefix),
            positions=positions[1:],
            blocks=tuple(self._block(layer) for layer in tower.encoder.layers),
            norm=None,
            head_weight=head_weight,
            head_bias=head_bias,
            num_read=0,
            patch_readout="mean",
            patch_norm=patch_norm,
        )

    def _block(self, layer: Any) -> BlockWeights:
        # Each family has its own names for the same parts; only DINOv2 has LayerScale.
        attn_scale = mlp_scale = None
        if self._class_prefix == "CLIP":
            self._require_own(layer, "EncoderLayer")
            norms = layer.layer_norm1, layer.layer_norm2
            attn = layer.self_attn
            out, scale = attn.out_proj, attn.scale
        else:
            self._require_own(layer, "Layer")
            attn = layer.attention
            out, scale = attn.o_proj, attn.scaling
            if self._class_prefix.startswith("Dinov2"):
                drop_path = getattr(self._parts, f"{self._class_prefix}DropPath")
                self.inert(layer.drop_path, "drop_path", drop_path)
                for layer_scale in (layer.layer_scale1, layer.layer_scale2):
                    self._require_own(layer_scale, "LayerScale")
                attn_scale = self.tensor(layer.layer_scale1.lambda1)
                mlp_scale = self.tensor(layer.layer_scale2.lambda1)
                norms = layer.norm1, layer.norm2
            else:
                self.inert(layer.dropout, "dropout")
                norms = layer.layernorm_before, layer.layernorm_after
        self._require_own(attn, "Attention")
        kind = attn.config._attn_implementation
        if kind not in {"sdpa", "eager"}:
            self.refuse(f"attention {kind!r}: model.set_attn_implementation('sdpa') sets another")
        if attn.is_causal:
            self.refuse("causal attention")
        qkv = self.separate_qkv(attn)
        return BlockWeights(
            attn_norm=self.norm(norms[0]),
            attn=AttentionWeights.split(
                qkv,
                self.linear(out, "attention's output", attn_scale),
                num_heads=len(qkv[1]) // (3 * attn.head_dim),
                scale=scale,
            ),
            mlp_norm=self.norm(norms[1]),
            mlp=self._mlp(layer.mlp, mlp_scale),
        )

    def _mlp(self, mlp: Any, layer_scale: Tensor | None) -> MlpWeights:
        gate = None
        if type(mlp).__name__.endswith("SwiGLUFFN"):
            self._require_own(mlp, "SwiGLUFFN")
            gate = self.linear(mlp.gate_proj, "MLP's gate")
            first, activation, second = mlp.up_proj, mlp.act_fn, mlp.down_proj
        else:
            self._require_own(mlp, "MLP")
            first, activation, second = mlp.fc1, mlp.activation_fn, mlp.fc2
        if type(activation) is GELUActivation and activation.act is not nn.functional.gelu:
            self.refuse(f"activation {activation}, which is not torch's GELU")
        first = self.linear(first, "MLP's first layer")
        return self.mlp(first, activation, second, layer_scale=layer_scale, gate=gate)
