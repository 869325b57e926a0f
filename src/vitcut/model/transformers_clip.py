"""The adapter for Hugging Face's ``CLIPForImageClassification``: CLIP's tower, a linear classifier.

It reads the mean of the patches as the last block leaves them, with no LayerNorm. What it shares
with other models of transformers stands in ``transformers_models.py``.
"""

from typing import Any

from torch import nn

from vitcut.model.reading import normed
from vitcut.model.transformers_models import HfReading
from vitcut.model.weights import BlockWeights, NormWeights, ViTWeights
from vitcut.shapes import Tensor


class ClipReading(HfReading):
    """One ``CLIPForImageClassification`` being read."""

    def weights(self) -> ViTWeights:
        """All of it."""
        self.family()
        tower = self.model.vision_model
        self.require_own(tower, "VisionModel")
        self.require_own(tower.encoder, "Encoder")
        # It normalises the class token, which the classifier does not read.
        self.whole(tower.post_layernorm)
        patch_norm = self.norm_of(tower.pre_layrnorm)
        patch_weight, patch_bias, prefix, positions = self._embeddings(tower.embeddings, patch_norm)
        head_weight, head_bias = self.linear(self.model.classifier, "classifier")
        self.require(tower.encoder.layers, nn.ModuleList, "list of blocks")
        weights = ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=prefix,
            positions=positions,
            blocks=tuple(self._clip_block(layer) for layer in tower.encoder.layers),
            norm=None,
            head_weight=head_weight,
            head_bias=head_bias,
            num_read=0,
            patch_readout="mean",
            patch_norm=patch_norm,
        )
        self.finish()
        return weights

    def _embeddings(
        self, embeddings: Any, norm: NormWeights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patch embedding, the class token behind the norm, and the positions of the patches."""
        self.require_own(embeddings, "VisionEmbeddings")
        self.require(embeddings.position_embedding, nn.Embedding, "positions")
        self.unused(embeddings.position_ids)
        self.grid(embeddings.image_size, embeddings.patch_size)
        weight, bias = self.patches(embeddings.patch_embedding, "patch embedding")
        positions = self.tensor(embeddings.position_embedding.weight)
        prefix = (self.tensor(embeddings.class_embedding) + positions[0])[None]
        return weight, bias, normed(prefix, norm), positions[1:]

    def _clip_block(self, layer: Any) -> BlockWeights:
        self.require_own(layer, "EncoderLayer")
        attn = layer.self_attn
        return BlockWeights(
            attn_norm=self.norm_of(layer.layer_norm1),
            attn=self.attention(attn, (attn.out_proj, attn.scale)),
            mlp_norm=self.norm_of(layer.layer_norm2),
            mlp=self.any_mlp(layer.mlp),
        )
