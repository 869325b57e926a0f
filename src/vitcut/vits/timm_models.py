"""The adapter for timm's ``VisionTransformer``: pre-norm, read from its class token.

Whatever it does not understand it refuses by name. Checking that the weights reproduce the model's
logits is left to ``intervention.tracing``.
"""

from typing import Any

import torch
from timm.layers import (
    GELU,
    DropPath,
    GELUTanh,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    QuickGELU,
)
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vitcut.shapes import Tensor
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
    "expected a pre-norm timm VisionTransformer that classifies from its class token, such as "
    "deit_tiny_patch16_224"
)
_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
_WINDOWS = "attention in windows, with relative position bias"
_RELATIVE = "relative position bias"
_KNOWN: dict[str, str] = {
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "VisionTransformerRelPos": _RELATIVE,
    "Beit": _RELATIVE,
    "Cait": "talking heads",
    "DeiTDistilled": "distillation token",
}
"""Architectures that are often asked for, and what keeps them out."""
_NOT_YET: dict[str, str] = {
    "VisionTransformerDistilled": "a distillation token that is read too",
    "Eva": "rotary positions (RoPE), and mostly SwiGLU",
}
_MLPS_NOT_YET = {"SwiGLU", "SwiGLUPacked", "GluMlp"}


def read_timm(model: nn.Module) -> ViTWeights:
    """Read a timm ``VisionTransformer``; the model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    return _TimmReading(model, _REMEDY).weights()


class _TimmReading(Reading):
    def __init__(self, model: nn.Module, remedy: str) -> None:
        super().__init__(model, remedy)
        self._vit: Any = model

    def weights(self) -> ViTWeights:
        vit = self._vit
        self._require_known()
        self._require_class_token()
        self._name_inert()
        patch_weight, patch_bias = self.patches(vit.patch_embed.proj, "patch embedding")
        prefix, positions = self._tokens()
        head_weight, head_bias = self.linear(vit.head, "classifier")
        self.require(vit.blocks, nn.Sequential, "list of blocks")
        weights = ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=prefix,
            positions=positions,
            blocks=tuple(self._block(block) for block in vit.blocks),
            norm=self._final_norm(),
            head_weight=head_weight,
            head_bias=head_bias,
        )
        self.finish()
        return weights

    def _require_known(self) -> None:
        name = type(self._vit).__name__
        if type(self._vit) is VisionTransformer:
            return
        if name in _NOT_YET:
            self.refuse(f"{name} ({_NOT_YET[name]})", yet=True)
        self.refuse(f"{name} ({_KNOWN.get(name, 'only timm VisionTransformer is')})")

    def _require_class_token(self) -> None:
        vit = self._vit
        if vit.attn_pool is not None:
            self.refuse("attention pooling: only a linear classifier on the class token is read")
        if vit.global_pool == "avg":
            self.refuse("mean pooling (global_pool='avg'): patch tokens are read", yet=True)
        if vit.global_pool != "token" or vit.cls_token is None:
            self.refuse(f"global_pool={vit.global_pool!r} (only 'token' is)")
        if not isinstance(vit.norm_pre, nn.Identity):
            self.refuse(f"norm_pre ({type(vit.norm_pre).__name__}) before the blocks", yet=True)
        if type(vit.patch_embed) is not PatchEmbed:
            kind = type(vit.patch_embed).__name__
            self.refuse(f"patch embedding {kind}: a convolutional stem (only PatchEmbed is)")
        self.require(vit.patch_embed, PatchEmbed, "patch embedding")
        self.grid(vit.patch_embed.img_size, vit.patch_embed.patch_size)

    def _name_inert(self) -> None:
        vit = self._vit
        if not isinstance(vit.patch_drop, nn.Identity):
            self.refuse(f"patch_drop ({type(vit.patch_drop).__name__}): tokens that are left out")
        for name in ("norm_pre", "patch_drop", "pos_drop", "head_drop"):
            self.inert(getattr(vit, name), name)
        self.inert(vit.patch_embed.norm, "patch_embed.norm")

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Class token and registers, and the positions of the patches."""
        vit = self._vit
        prefix = self.tensor(vit.cls_token)[0]
        if vit.reg_token is not None:
            prefix = torch.cat([prefix, self.tensor(vit.reg_token)[0]])
        patches = vit.patch_embed.num_patches
        if vit.pos_embed is None:
            return prefix, prefix.new_zeros(patches, prefix.shape[1])
        position = self.tensor(vit.pos_embed)[0]
        if not vit.no_embed_class:
            prefix = prefix + position[:-patches]
        return prefix, position[-patches:]

    def _final_norm(self) -> NormWeights:
        """Before or after the class token is picked: a LayerNorm per token is the same."""
        norm, fc_norm = self._vit.norm, self._vit.fc_norm
        idle, used = (norm, fc_norm) if isinstance(norm, nn.Identity) else (fc_norm, norm)
        if not isinstance(idle, nn.Identity):
            self.refuse(f"two norms before the classifier, fc_norm ({type(idle).__name__}) is one")
        self.inert(idle, "fc_norm")
        return self._norm(used)

    def _block(self, block: Any) -> BlockWeights:
        if type(block).__name__.startswith("ResPost"):
            self.refuse(f"block {type(block).__name__}: post-norm (only pre-norm is)")
        self.require(block, Block, "block")
        for name in ("drop_path1", "drop_path2"):
            self.inert(getattr(block, name), name, also=(DropPath,))
        return BlockWeights(
            attn_norm=self._norm(block.norm1),
            attn=self._attention(block.attn, self._layer_scale(block.ls1)),
            mlp_norm=self._norm(block.norm2),
            mlp=self._mlp(block.mlp, self._layer_scale(block.ls2)),
        )

    def _attention(self, attn: Any, layer_scale: Tensor | None) -> AttentionWeights:
        self.require(attn, Attention, "attention")
        for name in ("q_norm", "k_norm"):
            if not isinstance(getattr(attn, name), nn.Identity):
                self.refuse(f"qk-norm: attention with {name}", yet=True)
        if getattr(attn, "gate", None) is not None:
            self.refuse("gated attention")
        for name in ("q_norm", "k_norm", "norm", "attn_drop", "proj_drop"):
            self.inert(getattr(attn, name, nn.Identity()), f"attention with {name}")
        qkv = self.linear(attn.qkv, "attention's qkv")
        out = scaled(*self.linear(attn.proj, "attention's proj"), layer_scale)
        return AttentionWeights.split(qkv, out, num_heads=attn.num_heads, scale=attn.scale)

    def _mlp(self, mlp: Any, layer_scale: Tensor | None) -> MlpWeights:
        if type(mlp).__name__ in _MLPS_NOT_YET:
            self.refuse(f"SwiGLU and other gated MLPs: MLP {type(mlp).__name__}", yet=True)
        self.require(mlp, Mlp, "MLP")
        for name in ("norm", "drop1", "drop2"):
            self.inert(getattr(mlp, name), f"an MLP with {name}")
        return self.mlp(mlp.fc1, mlp.fc2, self._activation(mlp.act), layer_scale)

    def _activation(self, module: Any) -> Activation:
        activation = _ACTIVATIONS.get(type(module))
        if type(module) is nn.GELU:
            activation = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        if activation is None:
            self.refuse(f"activation {module}")
        self.require(module, type(module), "activation")
        return activation

    def _layer_scale(self, module: Any) -> Tensor | None:
        if isinstance(module, nn.Identity):
            self.inert(module, "LayerScale")
            return None
        self.require(module, LayerScale, "LayerScale")
        return self.tensor(module.gamma)

    def _norm(self, module: Any) -> NormWeights:
        return self.norm(module, "norm", like=self._vit.head.weight, kinds={LayerNorm})
