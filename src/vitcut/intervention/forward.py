"""The ViT's own arithmetic, one function per part; which parts run is left to the callers.

Every function takes rows of tokens, so that a caller may compute the readout row alone.
"""

import torch
import torch.nn.functional as F

from vitcut.compact.activations import ACTIVATIONS
from vitcut.names import Letter
from vitcut.shapes import Float, Tensor
from vitcut.vits.weights import AttentionWeights, MlpWeights, NormWeights, ViTWeights


def embed(
    weights: ViTWeights, pixels: Float[Tensor, "images channels y x"]
) -> Float[Tensor, "images tokens stream"]:
    """Everything that enters block 0: class token, patches and positions."""
    patches = F.conv2d(pixels, weights.patch_weight, weights.patch_bias, stride=weights.patch_size)
    patches = patches.flatten(2).transpose(1, 2) + weights.positions
    prefix = weights.prefix.expand(pixels.shape[0], -1, -1)
    return torch.cat([prefix, patches], dim=1)


def normalise(
    norm: NormWeights, stream: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """LayerNorm."""
    return F.layer_norm(stream, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def project(
    attn: AttentionWeights, letter: Letter, normed: Float[Tensor, "#heads images rows width"]
) -> Float[Tensor, "heads images rows head_dim"]:
    """q, k or v of every head; the attention scale is left to ``attend``."""
    weight, bias = getattr(attn, f"{letter}_weight"), getattr(attn, f"{letter}_bias")
    return torch.einsum("hnrw,hdw->hnrd", normed, weight) + bias[:, None, None]


def project_head(
    attn: AttentionWeights, letter: Letter, head: int, normed: Float[Tensor, "images rows width"]
) -> Float[Tensor, "images rows head_dim"]:
    """q, k or v of one head; the attention scale is left to ``attend``."""
    weight, bias = getattr(attn, f"{letter}_weight"), getattr(attn, f"{letter}_bias")
    return F.linear(normed, weight[head], bias[head])


def attend(
    q: Float[Tensor, "*heads queries head_dim"],
    k: Float[Tensor, "*heads keys head_dim"],
    scale: float,
) -> Float[Tensor, "*heads queries keys"]:
    """The attention pattern."""
    return torch.softmax((q * scale) @ k.transpose(-1, -2), dim=-1)


def write(
    attn: AttentionWeights, z: Float[Tensor, "heads images rows head_dim"]
) -> Float[Tensor, "heads images rows width"]:
    """What every head adds to the residual stream; the shared output bias belongs to none."""
    return torch.einsum("hnrd,hwd->hnrw", z, attn.out_weight)


def write_head(
    attn: AttentionWeights, head: int, z: Float[Tensor, "images rows head_dim"]
) -> Float[Tensor, "images rows width"]:
    """What one head adds to the residual stream."""
    return F.linear(z, attn.out_weight[head])


def activate(
    mlp: MlpWeights, normed: Float[Tensor, "images rows width"]
) -> Float[Tensor, "images rows neurons"]:
    """The hidden units of an MLP."""
    return ACTIVATIONS[mlp.activation](F.linear(normed, mlp.in_weight, mlp.in_bias))


def write_neurons(
    mlp: MlpWeights, hidden: Float[Tensor, "images rows neurons"]
) -> Float[Tensor, "images rows width"]:
    """What hidden units add to the residual stream, without the output bias."""
    return F.linear(hidden, mlp.out_weight)


def run_mlp(
    mlp: MlpWeights, normed: Float[Tensor, "images rows width"]
) -> Float[Tensor, "images rows width"]:
    """What an MLP adds to the residual stream, without its output bias."""
    return write_neurons(mlp, activate(mlp, normed))


def classify(
    weights: ViTWeights, readout: Float[Tensor, "images width"]
) -> Float[Tensor, "images classes"]:
    """Logits from the class token's row of the residual stream."""
    return F.linear(normalise(weights.norm, readout), weights.head_weight, weights.head_bias)


def output_bias(weights: ViTWeights, readable: int) -> Float[Tensor, "width"]:
    """The sum of the output biases that come before a target which reads ``readable`` sources.

    They belong to no source: no circuit cuts them.
    """
    total = torch.zeros(weights.width, dtype=weights.dtype, device=weights.device)
    for layer, block in enumerate(weights.blocks):
        if readable >= weights.graph.mlp_source(layer):
            total = total + block.attn.out_bias
        if readable > weights.graph.mlp_source(layer):
            total = total + block.mlp.out_bias
    return total
