"""The model of the reference experiment: a small class-token ViT."""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vitcut.model.settings import VitSettings


def build_reference(
    config: VitSettings, *, num_classes: int, image_size: int = 64, seed: int = 0
) -> VisionTransformer:
    """Build a freshly initialised ViT; the state of torch's generator is not changed.

    Args:
        config: The architecture.
        num_classes: Number of outputs.
        image_size: Height and width in pixels, a multiple of the patch size.
        seed: Seed of the initial weights.

    Raises:
        ConfigError: The image size is not a multiple of the patch size.
    """
    config.require_whole_patches(image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = timm.create_model(
            "vit_tiny_patch16_224",  # any plain ViT: every size is overridden below
            img_size=image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=num_classes,
            pos_drop_rate=config.dropout,
            proj_drop_rate=config.dropout,
        )
    return model
