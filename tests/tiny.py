"""Tiny random ViTs in float64, whose every part matters; and the reference model's shape."""

from dataclasses import replace

import torch

from vitcut.circuit import Circuit
from vitcut.compact.plan import ViTShape
from vitcut.masked.fill import Fill, zero_fill
from vitcut.model.weights import (
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    NormWeights,
    ViTWeights,
)
from vitcut.names import Activation, PatchReadout
from vitcut.shapes import Float, Tensor


def random_vit(
    seed: int = 0,
    *,
    num_layers: int = 2,
    num_heads: int = 2,
    width: int = 6,
    head_dim: int = 3,
    hidden: int = 5,
    patches_per_side: int = 2,
    patch_size: int = 2,
    num_prefix: int = 1,
    num_classes: int = 4,
    activation: Activation = "gelu",
    num_read: int = 1,
    patch_readout: PatchReadout = "none",
    embed_norm: bool = False,
    final_norm: bool = True,
    head_norm: bool = False,
    rotary: bool = False,
    shared_rotation: bool = True,
    gated: bool = False,
    neuron_norm: bool = False,
) -> ViTWeights:
    draw = torch.Generator().manual_seed(seed)
    num_tokens = num_prefix + patches_per_side**2

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * std

    def norm(width: int = width) -> NormWeights:
        return NormWeights(weight=1 + normal(width, std=0.3), bias=normal(width, std=0.3), eps=1e-6)

    def rotation() -> Tensor:
        angles = normal(1 if shared_rotation else num_heads, num_tokens, head_dim // 2)
        angles = torch.cat([angles, angles], dim=2)
        return torch.stack([angles.cos(), angles.sin()])

    def block() -> BlockWeights:
        projections = {
            f"{letter}_{part}": normal(num_heads, head_dim, *shape, std=std)
            for letter in "qkv"
            for part, shape, std in (("weight", (width,), 1.5 * width**-0.5), ("bias", (), 0.5))
        }
        return BlockWeights(
            attn_norm=norm(),
            attn=AttentionWeights(
                **projections,
                out_weight=normal(num_heads, width, head_dim, std=head_dim**-0.5),
                out_bias=normal(width, std=0.5),
                scale=head_dim**-0.5,
                q_norm=norm(head_dim) if head_norm else None,
                k_norm=norm(head_dim) if head_norm else None,
                rotation=rotation() if rotary else None,
            ),
            mlp_norm=norm(),
            mlp=MlpWeights(
                in_weight=normal(hidden, width, std=1.5 * width**-0.5),
                in_bias=normal(hidden, std=0.5),
                out_weight=normal(width, hidden, std=hidden**-0.5),
                out_bias=normal(width, std=0.5),
                activation=activation,
                gate_weight=normal(hidden, width, std=1.5 * width**-0.5) if gated else None,
                gate_bias=normal(hidden, std=0.5) if gated else None,
                norm=norm(hidden) if neuron_norm else None,
            ),
        )

    return ViTWeights(
        patch_weight=normal(width, 3, patch_size, patch_size, std=0.5 / patch_size),
        patch_bias=normal(width, std=0.5),
        prefix=normal(num_prefix, width),
        positions=normal(patches_per_side**2, width, std=0.5),
        blocks=tuple(block() for _ in range(num_layers)),
        norm=norm() if final_norm else None,
        head_weight=normal(num_classes, width * (num_read + (patch_readout != "none"))),
        head_bias=normal(num_classes),
        num_read=num_read,
        patch_readout=patch_readout,
        patch_norm=norm() if embed_norm else None,
    )


def random_pixels(
    weights: ViTWeights, images: int = 3, seed: int = 1
) -> Float[Tensor, "images channels y x"]:
    draw = torch.Generator().manual_seed(seed)
    side = weights.image_size
    return torch.randn(images, weights.channels, side, side, generator=draw, dtype=weights.dtype)


def random_table(weights: ViTWeights, seed: int = 2) -> Float[Tensor, "sources tokens width"]:
    draw = torch.Generator().manual_seed(seed)
    shape = (len(weights.graph.sources), weights.num_tokens, weights.width)
    return torch.randn(shape, generator=draw, dtype=weights.dtype)


def random_fill(weights: ViTWeights, circuit: Circuit | None = None, seed: int = 2) -> Fill:
    """Tables of random numbers, and random maps from kept parts where a circuit is linear."""
    draw = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=weights.dtype)

    blocks, hidden = len(weights.blocks), weights.num_neurons
    tables = Fill(
        sources=random_table(weights, seed), neurons=normal(blocks, weights.num_tokens, hidden)
    )
    if circuit is None or circuit.ablation == "mean":
        return tables
    if circuit.ablation == "zero":
        return zero_fill(weights)
    groups, head_dim = circuit.graph.num_kinds, weights.blocks[0].attn.q_weight.shape[1]
    head_maps = normal(blocks, groups, weights.num_heads, weights.width, head_dim) / 2
    neuron_maps = normal(blocks, groups, weights.width, hidden) / 2
    live = circuit.live_sources[groups:].reshape(blocks, weights.num_heads + 1, groups)
    head_maps *= torch.from_numpy(live[:, :-1].swapaxes(1, 2).copy())[..., None, None]
    if circuit.neurons is not None:
        neuron_maps *= torch.from_numpy(circuit.neurons.copy())[:, :, None]
    return replace(
        tables, head_maps=head_maps, neuron_maps=neuron_maps, circuit=circuit.fingerprint
    )


REFERENCE = ViTShape(
    image_size=64,
    channels=3,
    patch_size=8,
    num_prefix=1,
    width=64,
    num_layers=6,
    num_heads=8,
    head_dim=8,
    hidden=256,
    activation="gelu",
    eps=1e-6,
    num_classes=58,
)
