"""The adapter for timm: ``VisionTransformer``, its distilled sibling, and ``Eva``.

``Eva`` is the family of EVA-02 and DINOv3: rotary positions, gated MLPs, sub-norms.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from timm.layers import (
    GELU,
    AttentionRope,
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
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vitcut.model.forward import normalise
from vitcut.model.reading import Reading
from vitcut.model.weights import (
    Activation,
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    ViTWeights,
    map_tensors,
)
from vitcut.shapes import Float, Tensor

_KNOWN = {
    "SwinTransformer": "attention in windows, with relative position bias",
    "SwinTransformerV2": "attention in windows, with relative position bias",
    "SwinTransformerV2Cr": "attention in windows, with relative position bias",
    "VisionTransformerRelPos": "relative position bias",
    "Beit": "relative position bias",
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
"""Architectures that users often ask for, and why they are refused."""


def read_timm(model: nn.Module) -> ViTWeights:
    """Read a ViT of timm; the model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    return _TimmReading(model).weights()


class _TimmReading(Reading):
    remedy = (
        "expected a pre-norm ViT of timm that classifies from its class token or from the mean of "
        "its patches, such as deit_tiny_patch16_224"
    )
    norm_kinds = (nn.LayerNorm, LayerNorm)
    activation_kinds: ClassVar[dict[type[nn.Module], Activation]] = {
        nn.GELU: "gelu",
        GELU: "gelu",
        GELUTanh: "gelu_tanh",
        QuickGELU: "quick_gelu",
        nn.SiLU: "silu",
        nn.ReLU: "relu",
    }

    def weights(self) -> ViTWeights:
        vit = self.model
        self._require_understood()
        patch_weight, patch_bias = self.patches(vit.patch_embed.proj, vit.patch_embed.img_size)

        # timm puts prefix tokens in this order: class, distillation, registers.
        prefix = patch_weight.new_zeros(0, vit.embed_dim)
        for name in ("cls_token", "dist_token", "reg_token"):
            if getattr(vit, name, None) is not None:
                prefix = torch.cat([prefix, self.tensor(getattr(vit, name))[0]])
        num_patches = vit.patch_embed.num_patches
        positions = prefix.new_zeros(num_patches, vit.embed_dim)
        if vit.pos_embed is not None:
            # [prefix + patches, width], or [patches, width] if prefix tokens have no positions.
            position = self.tensor(vit.pos_embed)[0]
            positions = position[-num_patches:]
            if not vit.no_embed_class:
                prefix = prefix + position[:-num_patches]
        patch_norm = self.norm_if(vit.norm_pre, "norm_pre")
        if patch_norm is not None:
            # Prefix tokens are the same for every image, so their norm is applied here.
            prefix = normalise(patch_norm, prefix)

        # `norm` is over all tokens; `fc_norm` takes its place after tokens are pooled.
        pools_first = isinstance(vit.norm, nn.Identity)
        idle, used = (vit.norm, vit.fc_norm) if pools_first else (vit.fc_norm, vit.norm)
        if not isinstance(idle, nn.Identity):
            self.refuse(f"two norms before the classifier, fc_norm ({type(idle).__name__}) is one")
        self.inert(idle, "fc_norm")
        norm = self.norm_if(used, "norm")

        # A distilled model averages two classifiers: of the class and of the distillation token.
        distilled = type(vit) is VisionTransformerDistilled
        heads = (vit.head, vit.head_dist) if distilled else (vit.head,)
        head_weight, head_bias = self.classifiers(*heads)

        self.require(vit.blocks, "list of blocks", nn.ModuleList if self._is_eva else nn.Sequential)
        blocks = [self._block(*each) for each in zip(vit.blocks, self._rotations(), strict=True)]
        pooled = vit.global_pool == "avg"
        weights = ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=prefix,
            positions=positions,
            blocks=tuple(blocks),
            norm=norm,
            head_weight=head_weight,
            head_bias=head_bias,
            num_read=0 if pooled else len(heads),
            patch_readout=("mean" if pools_first else "normed_mean") if pooled else "none",
            patch_norm=patch_norm,
        )
        self.finish()
        return weights

    @property
    def _is_eva(self) -> bool:
        return type(self.model) is Eva

    def _require_understood(self) -> None:
        """Refuse what is not understood outside the blocks; name what does nothing."""
        vit, name = self.model, type(self.model).__name__
        if type(vit) not in {VisionTransformer, VisionTransformerDistilled, Eva}:
            known = "only VisionTransformer, its distilled kind and Eva are"
            self.refuse(f"{name} ({_KNOWN.get(name, known)})")
        if vit.attn_pool is not None:
            self.refuse("attention pooling: only a linear classifier is read")
        if vit.global_pool not in {"avg", "token"}:
            self.refuse(f"global_pool={vit.global_pool!r} (only 'token' and 'avg' are)")
        if vit.global_pool == "avg" and getattr(vit, "pool_include_prefix", False):
            self.refuse("pool_include_prefix: a mean over prefix tokens and patches alike")
        if vit.global_pool == "token" and vit.cls_token is None:
            self.refuse("global_pool='token' without a class token")
        embed = vit.patch_embed
        self.require(embed, "patch embedding", PatchEmbed, why=": a convolutional stem")
        for name in ("patch_drop", "pos_drop", "head_drop"):
            if getattr(vit, name) is not None:
                self.inert(getattr(vit, name), name)
        self.inert(embed.norm, "patch_embed.norm")

    def _rotations(self) -> list[Float[Tensor, "2 heads tokens head_dim"] | None]:
        """Cosine and sine of every block, which prefix tokens have too."""
        vit, depth = self.model, len(self.model.blocks)
        if not self._is_eva or vit.rope is None:
            return [None] * depth
        self.whole(vit.rope)
        # In train mode, DINOv3's positions are shifted and scaled at random.
        rope = deepcopy(vit.rope).eval()
        with torch.no_grad():
            # Without a fixed grid, as under dynamic_img_size, it has to be told the grid.
            fixed = getattr(rope, "feat_shape", None) is not None
            grid = {} if fixed else {"shape": vit.patch_embed.grid_size}
            found = rope.get_embed(**grid).detach().to(vit.patch_embed.proj.weight)
        rotations: list[Tensor | None] = []
        # Mixed frequencies are learnt per block and head: [depth, heads, patches, 2 head_dim].
        # All other kinds share one table [patches, 2 head_dim].
        for table in found if vit.rope_mixed else found[None, None]:
            sine, cosine = table.chunk(2, dim=-1)
            # Prefix tokens have no place in the grid: angle 0, so cosine 1 and sine 0.
            still = sine.new_zeros(sine.shape[0], vit.num_prefix_tokens, sine.shape[2])
            turned = (torch.cat([still + 1, cosine], dim=1), torch.cat([still, sine], dim=1))
            rotations.append(torch.stack(turned))
        return rotations if vit.rope_mixed else rotations * depth

    def _block(self, block: Any, rotation: Tensor | None) -> BlockWeights:
        name = type(block).__name__
        if name.startswith("ResPost") or name == "EvaBlockPostNorm":
            self.refuse(f"block {name}: post-norm (only pre-norm is)")
        self.require(block, "block", EvaBlock if self._is_eva else Block)
        for name in ("drop_path1", "drop_path2"):
            self.inert(getattr(block, name), name, DropPath)
        # LayerScale is a module of its own, in Eva a bare parameter.
        scales = (block.gamma_1, block.gamma_2) if self._is_eva else (block.ls1, block.ls2)
        attn_scale, mlp_scale = map(self._layer_scale, scales)
        return BlockWeights(
            attn_norm=self.norm(block.norm1),
            attn=self._attention(block.attn, attn_scale, rotation),
            mlp_norm=self.norm(block.norm2),
            mlp=self._mlp(block.mlp, mlp_scale),
        )

    def _layer_scale(self, scale: Any) -> Tensor | None:
        if self._is_eva:
            return None if scale is None else self.tensor(scale)
        if isinstance(scale, nn.Identity):
            self.inert(scale, "LayerScale")
            return None
        self.require(scale, "LayerScale", LayerScale)
        return self.tensor(scale.gamma)

    def _attention(
        self, attn: Any, layer_scale: Tensor | None, rotation: Tensor | None
    ) -> AttentionWeights:
        kinds = (EvaAttention, AttentionRope) if self._is_eva else (Attention,)
        self.require(attn, "attention", *kinds)
        if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
            self.refuse("grouped-query attention: heads that share keys and values")
        if attn.qkv is None:
            qkv = self.separate_qkv(attn)
        else:
            weight, bias = self.linear(attn.qkv, "attention's qkv")
            if type(attn) is EvaAttention and attn.q_bias is not None:
                # EVA keeps biases outside of `qkv`; that of the keys is a buffer of zeros.
                biases: tuple[Any, ...] = (attn.q_bias, attn.k_bias, attn.v_bias)
                bias = bias + torch.cat([self.tensor(one) for one in biases])
            qkv = weight, bias
        if getattr(attn, "gate", None) is not None:
            self.refuse("gated attention")
        norm = getattr(attn, "norm", nn.Identity())
        if not isinstance(norm, nn.Identity):
            self.refuse(f"attention with a norm over all heads ({type(norm).__name__})")
        for name in ("norm", "attn_drop", "proj_drop"):
            self.inert(getattr(attn, name, nn.Identity()), f"attention with {name}")
        out = self.linear(attn.proj, "attention's proj", layer_scale)
        weights = AttentionWeights.split(qkv, out, num_heads=attn.num_heads, scale=attn.scale)
        q_norm, k_norm = (self.norm_if(one, "qk-norm") for one in (attn.q_norm, attn.k_norm))
        if rotation is not None and not attn.rotate_half:
            # Pairs that are turned lie side by side here, (0, 1), (2, 3), ...; vitcut turns
            # feature i with i + head_dim / 2. Queries and keys take the same new order 0, 2, ...,
            # 1, 3, ..., so q . k is unchanged.
            places = torch.arange(rotation.shape[3], device=rotation.device)
            order = torch.cat([places[::2], places[1::2]])
            names = ("q_weight", "q_bias", "k_weight", "k_bias")
            halves = {name: getattr(weights, name).index_select(1, order) for name in names}
            weights = replace(weights, **halves)
            q_norm, k_norm = (
                map_tensors(one, lambda tensor: tensor.index_select(0, order))
                for one in (q_norm, k_norm)
            )
            rotation = rotation.index_select(3, order)
        return replace(weights, q_norm=q_norm, k_norm=k_norm, rotation=rotation)

    def _mlp(self, mlp: Any, layer_scale: Tensor | None) -> MlpWeights:
        self.require(mlp, "MLP", Mlp, GluMlp, SwiGLU)
        for name in ("drop1", "drop2"):
            self.inert(getattr(mlp, name), f"an MLP with {name}")
        gated = type(mlp) is SwiGLU
        first, gate = self.linear(mlp.fc1_x if gated else mlp.fc1, "MLP's first layer"), None
        if gated:
            gate = self.linear(mlp.fc1_g, "MLP's gate")
        elif type(mlp) is GluMlp:
            # `fc1` holds both: [2 * hidden, width].
            halves = list(zip(*(both.chunk(2) for both in first), strict=True))
            first, gate = halves if mlp.gate_last else halves[::-1]
        norm = self.norm_if(mlp.norm, "norm over the neurons")
        return self.mlp(first, mlp.act, mlp.fc2, layer_scale=layer_scale, gate=gate, norm=norm)
