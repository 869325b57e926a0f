"""The arithmetic of a ViT on `ViTWeights`: the whole model first, then one function per part.

The functions of parts take any rows of tokens, so that a caller can compute the readout row alone.
"""

import torch
import torch.nn.functional as F

from vitcut.compact.layers import ACTIVATIONS, rotate
from vitcut.model.weights import AttentionWeights, MlpWeights, NormWeights, ViTWeights
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Tensor


def forward(
    weights: ViTWeights, pixels: Float[Tensor, "images channels y x"]
) -> Float[Tensor, "images classes"]:
    """Logits of the whole model; every adapter is checked against them.

    Args:
        weights: The model.
        pixels: Normalised images.
    """
    stream = embed(weights, pixels)
    for block in weights.blocks:
        attn, normed = block.attn, normalise(block.attn_norm, stream)[None]
        q, k, v = (project(attn, letter, normed) for letter in LETTERS)
        stream = stream + write(attn, attend(q, k, attn.scale) @ v).sum(0) + attn.out_bias
        stream = stream + run_mlp(block.mlp, normalise(block.mlp_norm, stream)) + block.mlp.out_bias
    return classify(weights, read_out(weights, stream))


def embed(
    weights: ViTWeights, pixels: Float[Tensor, "images channels y x"]
) -> Float[Tensor, "images tokens stream"]:
    """Everything that enters block 0: prefix tokens, patches and positions."""
    patches = F.conv2d(pixels, weights.patch_weight, weights.patch_bias, stride=weights.patch_size)
    patches = patches.flatten(2).transpose(1, 2)
    if weights.kept_patches is not None:
        patches = patches[:, list(weights.kept_patches)]
    patches = patches + weights.positions
    if weights.patch_norm is not None:
        patches = normalise(weights.patch_norm, patches)
    prefix = weights.prefix.expand(pixels.shape[0], -1, -1)
    return torch.cat([prefix, patches], dim=1)


def normalise(
    norm: NormWeights, stream: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """LayerNorm."""
    return F.layer_norm(stream, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def project(
    attn: AttentionWeights, letter: Letter, normed: Float[Tensor, "#heads images tokens width"]
) -> Float[Tensor, "heads images tokens head_dim"]:
    """q, k or v of every head for all tokens, before the attention scale."""
    weight, bias = getattr(attn, f"{letter}_weight"), getattr(attn, f"{letter}_bias")
    if len(normed) == 1:  # All heads read the same: one product for all of them.
        every = F.linear(normed[0], weight.flatten(0, 1), bias.flatten())
        found = every.unflatten(2, (len(weight), -1)).permute(2, 0, 1, 3)
    else:
        found = torch.einsum("hnrw,hdw->hnrd", normed, weight) + bias[:, None, None]
    turn = None if attn.rotation is None else attn.rotation[:, :, None]
    return norm_and_rotate(attn, letter, found, turn)


def project_head(
    attn: AttentionWeights,
    letter: Letter,
    head: int,
    normed: Float[Tensor, "images rows width"],
    rows: slice,
) -> Float[Tensor, "images rows head_dim"]:
    """q, k or v of one head for some tokens, before the attention scale."""
    weight, bias = getattr(attn, f"{letter}_weight"), getattr(attn, f"{letter}_bias")
    found = F.linear(normed, weight[head], bias[head])
    turn = None
    if attn.rotation is not None:
        # [cos and sin, heads or 1, tokens, head_dim]: one rotation may serve all heads.
        turn = attn.rotation[:, head if attn.rotation.shape[1] > 1 else 0, rows]
    return norm_and_rotate(attn, letter, found, turn)


def norm_and_rotate(
    attn: AttentionWeights,
    letter: Letter,
    values: Float[Tensor, "*rows head_dim"],
    rotation: Float[Tensor, "2 *#rows head_dim"] | None,
) -> Float[Tensor, "*rows head_dim"]:
    """Apply what follows the projection of queries and keys: LayerNorm, rotary positions."""
    if letter == "v":
        return values
    norm = attn.q_norm if letter == "q" else attn.k_norm
    if norm is not None:
        values = normalise(norm, values)
    return values if rotation is None else rotate(values, *rotation)


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
    """What every head adds to the residual stream, without the output bias they share."""
    return torch.einsum("hnrd,hwd->hnrw", z, attn.out_weight)


def write_head(
    attn: AttentionWeights, head: int, z: Float[Tensor, "images rows head_dim"]
) -> Float[Tensor, "images rows width"]:
    """What one head adds to the residual stream."""
    return F.linear(z, attn.out_weight[head])


def activate(
    mlp: MlpWeights, normed: Float[Tensor, "images rows width"]
) -> Float[Tensor, "images rows neurons"]:
    """The hidden units of an MLP as its second layer reads them."""
    hidden = F.linear(normed, mlp.in_weight, mlp.in_bias)
    if mlp.gate is None:
        hidden = ACTIVATIONS[mlp.activation](hidden)
    else:
        hidden = ACTIVATIONS[mlp.activation](F.linear(normed, *mlp.gate)) * hidden
    return hidden if mlp.norm is None else normalise(mlp.norm, hidden)


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


def read_out(
    weights: ViTWeights, stream: Float[Tensor, "images tokens width"]
) -> Float[Tensor, "images read_tokens width"]:
    """The tokens that the classifier reads."""
    if weights.patch_readout == "none":
        return stream[:, : weights.num_read]
    patches = stream[:, weights.num_prefix :]
    if not weights.num_read:
        return patches
    return torch.cat([stream[:, : weights.num_read], patches], dim=1)


def classify(
    weights: ViTWeights,
    readout: Float[Tensor, "images read_tokens width"],
    log_weights: Float[Tensor, "images patches"] | None = None,
) -> Float[Tensor, "images classes"]:
    """Logits from the tokens that the classifier reads (see ``read_out``).

    Args:
        weights: The model.
        readout: The tokens.
        log_weights: Logarithms of the weights of pooled patches; None weighs all alike.
    """
    features = readout_features(weights, readout, log_weights)
    return F.linear(features, weights.head_weight, weights.head_bias)


def readout_features(
    weights: ViTWeights,
    readout: Float[Tensor, "images read_tokens width"],
    log_weights: Float[Tensor, "images patches"] | None = None,
) -> Float[Tensor, "images features"]:
    """What the classifier multiplies: prefix tokens one after the other, then pooled patches."""

    def pool(patches: Tensor) -> Float[Tensor, "images 1 width"]:
        if log_weights is None:
            return patches.mean(1, keepdim=True)
        return log_weights.softmax(1)[:, None] @ patches

    features = normalise_last(weights, readout[:, : weights.num_read])
    if weights.patch_readout != "none":
        patches = readout[:, weights.num_read :]
        if weights.patch_readout == "mean":
            pooled = normalise_last(weights, pool(patches))
        else:
            pooled = pool(normalise_last(weights, patches))
        features = torch.cat([features, pooled], dim=1)
    return features.flatten(1)


def normalise_last(
    weights: ViTWeights, stream: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """The LayerNorm before the classifier, where there is one."""
    return stream if weights.norm is None else normalise(weights.norm, stream)


def output_bias(weights: ViTWeights, readable: int) -> Float[Tensor, "width"]:
    """The sum of the output biases added before a target that can read ``readable`` sources.

    They belong to no source, so no circuit cuts them.
    """
    total = torch.zeros(weights.width, dtype=weights.dtype, device=weights.device)
    for layer, block in enumerate(weights.blocks):
        # Heads of a block are written together with their bias: once all of them are readable,
        # i.e. all sources before the block's MLP.
        if readable >= weights.graph.mlp_source(layer):
            total = total + block.attn.out_bias
        if readable > weights.graph.mlp_source(layer):
            total = total + block.mlp.out_bias
    return total
