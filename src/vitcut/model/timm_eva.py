"""The adapter for timm's ``Eva``: rotary positions and gated MLPs, as EVA-02 and DINOv3 have them.

What it shares with other ViTs of timm stands in ``timm_models.py``.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from timm.layers import AttentionRope, DropPath
from timm.models.eva import EvaAttention, EvaBlock
from torch import nn

from vitcut.model.timm_models import TimmReading
from vitcut.model.weights import AttentionWeights, BlockWeights, NormWeights
from vitcut.shapes import Float, Tensor


class EvaReading(TimmReading):
    """One ``Eva`` being read."""

    def require_known(self) -> None:
        """Its class is known."""

    def blocks(self) -> tuple[BlockWeights, ...]:
        """All blocks, each with the rotation of its queries and keys."""
        blocks = self.model.blocks
        self.require(blocks, nn.ModuleList, "list of blocks")
        return tuple(
            self._eva_block(block, rotation)
            for block, rotation in zip(blocks, self._rotations(len(blocks)), strict=True)
        )

    def _rotations(self, blocks: int) -> list[Float[Tensor, "2 heads tokens head_dim"] | None]:
        """Per block cosine and sine of all tokens, in pairs of neighbours or in halves."""
        rope = self.model.rope
        if rope is None:
            return [None] * blocks
        self.whole(rope)
        # In training some kinds move the positions at random.
        rope = deepcopy(rope).eval()
        with torch.no_grad():
            if getattr(rope, "feat_shape", None) is None:
                found = rope.get_embed(shape=self.model.patch_embed.grid_size)
            else:
                found = rope.get_embed()
        found = found.detach().to(self.model.patch_embed.proj.weight)
        if not self.model.rope_mixed:
            return [self._with_prefix(found[None])] * blocks
        # Frequencies are learnt, for each block and head.
        return [self._with_prefix(of_block) for of_block in found]

    def _with_prefix(
        self, sine_cosine: Float[Tensor, "heads patches both"]
    ) -> Float[Tensor, "2 heads tokens head_dim"]:
        """Cosine and sine, with those of prefix tokens, which are not turned."""
        sine, cosine = sine_cosine.chunk(2, dim=-1)
        still = sine.new_zeros(sine.shape[0], self.model.num_prefix_tokens, sine.shape[2])
        return torch.stack([torch.cat([still + 1, cosine], dim=1), torch.cat([still, sine], dim=1)])

    def _eva_block(self, block: Any, rotation: Tensor | None) -> BlockWeights:
        if type(block).__name__ == "EvaBlockPostNorm":
            self.refuse("block EvaBlockPostNorm: post-norm (only pre-norm is)")
        self.require(block, EvaBlock, "block")
        for name in ("drop_path1", "drop_path2"):
            self.inert(getattr(block, name), name, also=(DropPath,))
        scales = [
            None if scale is None else self.tensor(scale)
            for scale in (block.gamma_1, block.gamma_2)
        ]
        return BlockWeights(
            attn_norm=self.norm_of(block.norm1),
            attn=self._eva_attention(block.attn, scales[0], rotation),
            mlp_norm=self.norm_of(block.norm2),
            mlp=self.any_mlp(block.mlp, scales[1]),
        )

    def _eva_attention(
        self, attn: Any, layer_scale: Tensor | None, rotation: Tensor | None
    ) -> AttentionWeights:
        if type(attn) is not AttentionRope:
            self.require(attn, EvaAttention, "attention")
        self.require(attn, type(attn), "attention")
        if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
            self.refuse("grouped-query attention: heads that share keys and values")
        weights = self.attention(attn, self._qkv(attn), layer_scale)
        if rotation is None:
            return weights
        weights = replace(weights, rotation=rotation)
        return weights if attn.rotate_half else _in_halves(weights)

    def _qkv(self, attn: Any) -> tuple[Tensor, Tensor]:
        if attn.qkv is None:
            return self.qkv(attn)
        weight, bias = self.linear(attn.qkv, "attention's qkv")
        if getattr(attn, "q_bias", None) is not None:
            biases = (attn.q_bias, attn.k_bias, attn.v_bias)
            bias = bias + torch.cat([self.tensor(one) for one in biases])
        return weight, bias


def _in_halves(weights: AttentionWeights) -> AttentionWeights:
    """The same with rotated pairs in either half of the features, instead of side by side.

    Queries and keys take the same order, so that their products stay as they are.
    """

    def halves(tensor: Tensor, dim: int) -> Tensor:
        places = torch.arange(tensor.shape[dim])
        return tensor.index_select(dim, torch.cat([places[::2], places[1::2]]).to(tensor.device))

    def norm(of_heads: NormWeights | None) -> NormWeights | None:
        if of_heads is None:
            return None
        return replace(of_heads, weight=halves(of_heads.weight, 0), bias=halves(of_heads.bias, 0))

    return replace(
        weights,
        q_weight=halves(weights.q_weight, 1),
        q_bias=halves(weights.q_bias, 1),
        k_weight=halves(weights.k_weight, 1),
        k_bias=halves(weights.k_bias, 1),
        q_norm=norm(weights.q_norm),
        k_norm=norm(weights.k_norm),
        rotation=None if weights.rotation is None else halves(weights.rotation, 3),
    )
