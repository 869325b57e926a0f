"""Oracles on a few random images, and a model on which float32 fails."""

from dataclasses import replace

import numpy as np
import torch
from tiny import random_pixels, random_vit

from vitcut.discovery.settings import DiscoverSettings
from vitcut.masked.oracle import Examples, Oracle
from vitcut.model.weights import BlockWeights, ViTWeights
from vitcut.names import Ablation, Tokens

GROUP_OF_CLASS = torch.tensor([0, 1, 1, 2])


def make_examples(weights: ViTWeights, images: int = 4) -> Examples:
    """Each image is paired with the one before it."""
    numbers = np.arange(images)
    return Examples(
        pixels=random_pixels(weights, images=images),
        clean=numbers,
        corrupted=np.roll(numbers, 1),
        group_of_class=GROUP_OF_CLASS,
    )


def make_oracle(
    weights: ViTWeights, ablation: Ablation = "resample", images: int = 4, tokens: Tokens = "all"
) -> Oracle:
    return Oracle(weights, make_examples(weights, images), ablation, tokens=tokens)


def settings_of(**changes) -> DiscoverSettings:
    """The settings of a search with the oracle that ``make_oracle`` makes."""
    return DiscoverSettings(**{"ablation": "resample", "images": 4, **changes})


def without_output_biases(block: BlockWeights) -> BlockWeights:
    attn = replace(block.attn, out_bias=torch.zeros_like(block.attn.out_bias))
    mlp = replace(block.mlp, out_bias=torch.zeros_like(block.mlp.out_bias))
    return replace(block, attn=attn, mlp=mlp)


def drifting_vit() -> ViTWeights:
    """A target that reads zeros alone: LayerNorm then amplifies what rounding left of its input."""
    weights = random_vit(num_layers=2, width=8)
    return replace(weights, blocks=tuple(map(without_output_biases, weights.blocks)))
