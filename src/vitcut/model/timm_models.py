"""The adapter for timm's ``VisionTransformer`` and its sibling with a distillation token.

Whatever it does not understand it refuses by name. Checking that the weights reproduce the model's
logits is left to ``intervention.tracing``, models of timm's EVA family to ``timm_eva.py``.
"""

from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from timm.layers import (
    GELU,
    DropPath,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    QuickGELU,
    SwiGLU,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vitcut.model.reading import Reading, normed, scaled
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
    "expected a pre-norm ViT of timm that classifies from its class token or from the mean of its "
    "patches, such as deit_tiny_patch16_224"
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
    "SwinTransformerV2Cr": _WINDOWS,
    "Cait": "talking heads",
    "CoaT": "convolutions between blocks, factorised attention",
    "ConVit": "gated positional attention",
    "CrossVit": "two branches of tokens that attend to each other",
    "DaVit": "attention in windows and across channels",
    "FocalNet": "focal modulation, not attention",
    "GlobalContextVit": "attention in windows",
    "Hiera": "tokens that are pooled between stages",
    "HieraDet": "tokens that are pooled between stages",
    "Levit": "attention with learnt position bias, batch norms",
    "LevitDistilled": "attention with learnt position bias, batch norms",
    "MaxxVit": "convolutions, and attention in windows and grids",
    "MultiScaleVit": "tokens that are pooled between stages",
    "NaFlexVit": "images of any size and aspect",
    "Nest": "attention in blocks, convolutions between stages",
    "PoolingVisionTransformer": "tokens that are pooled between stages",
    "TinyVit": "convolutions, and attention in windows",
    "TNT": "a transformer within each patch",
    "Twins": "attention in windows, convolutions between blocks",
    "VisionTransformerSAM": "attention in windows, relative position bias",
    "Visformer": "convolutional stages",
    "VOLO": "outlook attention",
    "Xcit": "attention across channels",
}
"""Architectures that are often asked for, and what keeps them out."""


def read_timm(model: nn.Module) -> ViTWeights:
    """Read a ViT of timm; the model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    if type(model) is Eva:
        from vitcut.model.timm_eva import EvaReading

        return EvaReading(model, _REMEDY).weights()
    return TimmReading(model, _REMEDY).weights()


class TimmReading(Reading):
    """One ViT of timm being read."""

    def weights(self) -> ViTWeights:
        """All of it."""
        vit = self.model
        self.require_known()
        self._require_readout()
        self._require_plain_patches()
        self.name_inert()
        patch_weight, patch_bias = self.patches(vit.patch_embed.proj, "patch embedding")
        prefix, positions = self._tokens()
        patch_norm = None
        if not isinstance(vit.norm_pre, nn.Identity):
            patch_norm = self.norm_of(vit.norm_pre)
            prefix = normed(prefix, patch_norm)
        norm, pools_first = self._final_norm()
        pooled = vit.global_pool == "avg"
        head_weight, head_bias = self._head()
        weights = ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=prefix,
            positions=positions,
            blocks=self.blocks(),
            norm=norm,
            head_weight=head_weight,
            head_bias=head_bias,
            num_read=0 if pooled else head_weight.shape[1] // prefix.shape[1],
            patch_readout=("mean" if pools_first else "normed_mean") if pooled else "none",
            patch_norm=patch_norm,
        )
        self.finish()
        return weights

    def require_known(self) -> None:
        """Refuse classes that compute something else."""
        name = type(self.model).__name__
        if type(self.model) not in {VisionTransformer, VisionTransformerDistilled}:
            known = "only VisionTransformer, its distilled kind and Eva are"
            self.refuse(f"{name} ({_KNOWN.get(name, known)})")

    def blocks(self) -> tuple[BlockWeights, ...]:
        """All blocks, from the first."""
        self.require(self.model.blocks, nn.Sequential, "list of blocks")
        return tuple(self._block(block) for block in self.model.blocks)

    def _require_readout(self) -> None:
        vit = self.model
        if vit.attn_pool is not None:
            self.refuse("attention pooling: only a linear classifier is read")
        if vit.global_pool not in {"avg", "token"}:
            self.refuse(f"global_pool={vit.global_pool!r} (only 'token' and 'avg' are)")
        if vit.global_pool == "avg" and getattr(vit, "pool_include_prefix", False):
            self.refuse("pool_include_prefix: a mean over prefix tokens and patches alike")
        if vit.global_pool == "token" and vit.cls_token is None:
            self.refuse("global_pool='token' without a class token")

    def _require_plain_patches(self) -> None:
        vit = self.model
        if type(vit.patch_embed) is not PatchEmbed:
            kind = type(vit.patch_embed).__name__
            self.refuse(f"patch embedding {kind}: a convolutional stem (only PatchEmbed is)")
        self.require(vit.patch_embed, PatchEmbed, "patch embedding")
        self.grid(vit.patch_embed.img_size, vit.patch_embed.patch_size)

    def name_inert(self) -> None:
        """Name the modules that do nothing when the model answers."""
        vit = self.model
        if not isinstance(vit.patch_drop, (nn.Identity, NoneType)):
            self.refuse(f"patch_drop ({type(vit.patch_drop).__name__}): tokens that are left out")
        if isinstance(vit.norm_pre, nn.Identity):
            self.inert(vit.norm_pre, "norm_pre")
        for name in ("patch_drop", "pos_drop", "head_drop"):
            if getattr(vit, name) is not None:
                self.inert(getattr(vit, name), name)
        self.inert(vit.patch_embed.norm, "patch_embed.norm")

    def _head(self) -> tuple[Tensor, Tensor]:
        """Of a distilled model the mean of two classifiers, each with a token of its own."""
        heads = [self.model.head]
        if type(self.model) is VisionTransformerDistilled:
            heads.append(self.model.head_dist)
        return self.classifiers(*heads)

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Class token, distillation token and registers, and the positions of the patches."""
        vit = self.model
        prefix = vit.patch_embed.proj.weight.new_zeros(0, vit.embed_dim)
        for name in ("cls_token", "dist_token", "reg_token"):
            if getattr(vit, name, None) is not None:
                prefix = torch.cat([prefix, self.tensor(getattr(vit, name))[0]])
        patches = vit.patch_embed.num_patches
        if vit.pos_embed is None:
            return prefix, prefix.new_zeros(patches, prefix.shape[1])
        position = self.tensor(vit.pos_embed)[0]
        if not vit.no_embed_class:
            prefix = prefix + position[:-patches]
        return prefix, position[-patches:]

    def _final_norm(self) -> tuple[NormWeights | None, bool]:
        """The norm before the classifier, if any, and whether it comes after tokens are pooled."""
        norm, fc_norm = self.model.norm, self.model.fc_norm
        pools_first = isinstance(norm, nn.Identity)
        idle, used = (norm, fc_norm) if pools_first else (fc_norm, norm)
        if not isinstance(idle, nn.Identity):
            self.refuse(f"two norms before the classifier, fc_norm ({type(idle).__name__}) is one")
        self.inert(idle, "fc_norm")
        if isinstance(used, nn.Identity):
            self.inert(used, "norm")
            return None, pools_first
        return self.norm_of(used), pools_first

    def _block(self, block: Any) -> BlockWeights:
        if type(block).__name__.startswith("ResPost"):
            self.refuse(f"block {type(block).__name__}: post-norm (only pre-norm is)")
        self.require(block, Block, "block")
        for name in ("drop_path1", "drop_path2"):
            self.inert(getattr(block, name), name, also=(DropPath,))
        return BlockWeights(
            attn_norm=self.norm_of(block.norm1),
            attn=self._attention(block.attn, self._layer_scale(block.ls1)),
            mlp_norm=self.norm_of(block.norm2),
            mlp=self.any_mlp(block.mlp, self._layer_scale(block.ls2)),
        )

    def _attention(self, attn: Any, layer_scale: Tensor | None) -> AttentionWeights:
        self.require(attn, Attention, "attention")
        qkv = self.linear(attn.qkv, "attention's qkv")
        return self.attention(attn, qkv, layer_scale)

    def attention(
        self, attn: Any, qkv: tuple[Tensor, Tensor], layer_scale: Tensor | None
    ) -> AttentionWeights:
        """What timm's attentions have in common."""
        if getattr(attn, "gate", None) is not None:
            self.refuse("gated attention")
        norm = getattr(attn, "norm", nn.Identity())
        if not isinstance(norm, nn.Identity):
            self.refuse(f"attention with a norm over all heads ({type(norm).__name__})")
        for name in ("norm", "attn_drop", "proj_drop"):
            self.inert(getattr(attn, name, nn.Identity()), f"attention with {name}")
        out = scaled(*self.linear(attn.proj, "attention's proj"), layer_scale)
        weights = AttentionWeights.split(qkv, out, num_heads=attn.num_heads, scale=attn.scale)
        q_norm, k_norm = (self._norm_if(norm, "qk-norm") for norm in (attn.q_norm, attn.k_norm))
        return replace(weights, q_norm=q_norm, k_norm=k_norm)

    def _norm_if(self, module: Any, what: str) -> NormWeights | None:
        """A LayerNorm, where there is one."""
        if isinstance(module, nn.Identity):
            self.inert(module, what)
            return None
        return self.norm_of(module, what)

    def any_mlp(self, mlp: Any, layer_scale: Tensor | None) -> MlpWeights:
        """An MLP, plain or gated, with a norm over its neurons or none."""
        if type(mlp) not in {Mlp, GluMlp, SwiGLU}:
            self.refuse(f"MLP {type(mlp).__name__} (only Mlp, GluMlp and SwiGLU are)")
        self.require(mlp, type(mlp), "MLP")
        for name in ("drop1", "drop2"):
            self.inert(getattr(mlp, name), f"an MLP with {name}")
        norm = self._norm_if(mlp.norm, "norm over the neurons")
        activation, gate = self._activation(mlp.act), None
        first = self.linear(mlp.fc1_x if type(mlp) is SwiGLU else mlp.fc1, "MLP's first layer")
        if type(mlp) is SwiGLU:
            gate = self.linear(mlp.fc1_g, "MLP's gate")
        elif type(mlp) is GluMlp:
            halves = list(zip(*(both.chunk(2) for both in first), strict=True))
            first, gate = halves if mlp.gate_last else halves[::-1]
        return self.mlp(first, mlp.fc2, activation, layer_scale=layer_scale, gate=gate, norm=norm)

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

    def norm_of(self, module: Any, what: str = "norm") -> NormWeights:
        """A LayerNorm; one without weights takes the type of the patch embedding."""
        like = self.model.patch_embed.proj.weight
        return self.norm(module, what, like=like, kinds={LayerNorm})
