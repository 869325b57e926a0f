"""The adapter for torchvision's ``VisionTransformer``: vit_b_16 and its family.

Whatever it does not understand it refuses by name. Checking that the weights reproduce the model's
logits is left to ``intervention.tracing``.
"""

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.models.vision_transformer import (
    Encoder,
    EncoderBlock,
    MLPBlock,
    VisionTransformer,
)

from vitcut.model.reading import Reading
from vitcut.model.weights import (
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    NormWeights,
    ViTWeights,
)

_REMEDY = "expected a torchvision VisionTransformer with a linear classifier, such as vit_b_16"
_KNOWN = {
    "SwinTransformer": "attention in windows, with relative position bias",
    "MaxVit": "attention in windows, with relative position bias, and convolutions",
}
"""Architectures that are often asked for, and what keeps them out."""


def read_torchvision(model: nn.Module) -> ViTWeights:
    """Read a torchvision ``VisionTransformer``; the model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    return _TorchvisionReading(model, _REMEDY).weights()


class _TorchvisionReading(Reading):
    def weights(self) -> ViTWeights:
        vit = self.model
        name = type(vit).__name__
        if type(vit) is not VisionTransformer:
            self.refuse(f"{name} ({_KNOWN.get(name, 'only VisionTransformer is')})")
        self.grid(vit.image_size, vit.patch_size)
        patch_weight, patch_bias = self.patches(vit.conv_proj, "patch embedding")
        encoder = vit.encoder
        self.require(encoder, Encoder, "encoder")
        self.require(encoder.layers, nn.Sequential, "list of blocks")
        self.inert(encoder.dropout, "encoder.dropout")
        position = self.tensor(encoder.pos_embedding)[0]
        if type(self.model.heads) is nn.Linear:
            self.refuse(
                "heads that are a bare Linear: put it where torchvision has it, with "
                "model.heads = nn.Sequential(OrderedDict(head=model.heads))"
            )
        self.require(vit.heads, nn.Sequential, "classifier")
        if len(vit.heads) != 1:
            self.refuse("representation_size, a hidden layer in the classifier")
        head_weight, head_bias = self.linear(vit.heads[0], "classifier")
        weights = ViTWeights(
            patch_weight=patch_weight,
            patch_bias=patch_bias,
            prefix=self.tensor(vit.class_token)[0] + position[:1],
            positions=position[1:],
            blocks=tuple(self._block(block) for block in encoder.layers),
            norm=self._norm(encoder.ln),
            head_weight=head_weight,
            head_bias=head_bias,
        )
        self.finish()
        return weights

    def _block(self, block: Any) -> BlockWeights:
        self.require(block, EncoderBlock, "block")
        self.inert(block.dropout, "dropout")
        return BlockWeights(
            attn_norm=self._norm(block.ln_1),
            attn=self._attention(block.self_attention),
            mlp_norm=self._norm(block.ln_2),
            mlp=self._mlp(block.mlp),
        )

    def _attention(self, attn: Any) -> AttentionWeights:
        self.require(attn, nn.MultiheadAttention, "attention")
        if attn.in_proj_weight is None or not attn.batch_first:
            self.refuse("attention whose q, k and v are of other widths, or not batch_first")
        if attn.bias_k is not None or attn.add_zero_attn:
            self.refuse("attention to a key that is no token (add_bias_kv, add_zero_attn)")
        self.require(attn.out_proj, NonDynamicallyQuantizableLinear, "attention's out_proj")
        weight = self.tensor(attn.in_proj_weight)
        bias = weight[:, 0] * 0 if attn.in_proj_bias is None else self.tensor(attn.in_proj_bias)
        out = self.weight_and_bias(attn.out_proj)
        return AttentionWeights.split((weight, bias), out, num_heads=attn.num_heads)

    def _mlp(self, mlp: Any) -> MlpWeights:
        self.require(mlp, MLPBlock, "MLP")
        kinds = [type(layer) for layer in mlp]
        if kinds != [nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout]:
            self.refuse(f"MLP of {', '.join(kind.__name__ for kind in kinds)}")
        first, activation, _, second, _ = mlp
        if activation.approximate != "none":
            self.refuse(f"activation {activation}")
        self.require(activation, nn.GELU, "activation")
        for dropout in (mlp[2], mlp[4]):
            self.inert(dropout, "dropout")
        return self.mlp(self.linear(first, "MLP's first layer"), second, "gelu")

    def _norm(self, module: Any) -> NormWeights:
        return self.norm(module, "norm", like=self.model.class_token)
