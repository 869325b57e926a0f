"""Cut a ViT of your own: an adapter tells vitcut where the weights are."""

import torch
from torch import nn

import vitcut
from vitcut.model.weights import AttentionWeights, BlockWeights, MlpWeights, NormWeights, ViTWeights


class OwnViT(nn.Module):
    """A ViT on torch's own encoder, for 12 classes of images of 16 x 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0, "gelu", batch_first=True, norm_first=True)
        self.patch = nn.Conv2d(3, 32, kernel_size=4, stride=4)
        self.tokens = nn.Parameter(torch.randn(17, 32))  # a class token, and positions of patches
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 12)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """From pixels to logits."""
        tokens = nn.functional.pad(self.patch(pixels).flatten(2).mT, (0, 0, 1, 0)) + self.tokens
        return self.head(self.encoder(tokens)[:, 0])


def read(model: OwnViT) -> ViTWeights:
    """The adapter: every weight, part by part."""

    def norm(layer: nn.LayerNorm) -> NormWeights:
        return NormWeights(weight=layer.weight, bias=layer.bias, eps=layer.eps)

    def block(layer: nn.TransformerEncoderLayer) -> BlockWeights:
        (w1, b1), (w2, b2) = layer.linear1.parameters(), layer.linear2.parameters()
        qkv_weight, qkv_bias, *out = layer.self_attn.parameters()
        return BlockWeights(
            attn_norm=norm(layer.norm1),
            attn=AttentionWeights.split((qkv_weight, qkv_bias), tuple(out), num_heads=4),
            mlp_norm=norm(layer.norm2),
            mlp=MlpWeights(in_weight=w1, in_bias=b1, out_weight=w2, out_bias=b2, activation="gelu"),
        )

    return ViTWeights(
        patch_weight=model.patch.weight,
        patch_bias=model.patch.bias,
        prefix=model.tokens[:1],
        positions=model.tokens[1:],
        blocks=tuple(block(layer) for layer in model.encoder.layers),
        norm=norm(model.encoder.norm),
        head_weight=model.head.weight,
        head_bias=model.head.bias,
    )


if __name__ == "__main__":
    vitcut.register_adapter(OwnViT, read)
    model = vitcut.load_model(OwnViT(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    images = vitcut.load_images("drawn", task="drawn", image_size=16)
    vitcut.cut(model, images, budget=vitcut.Budget(target_macs=0.5), out="own-cut")
