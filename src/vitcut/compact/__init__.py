"""The compact model: a small ViT built from a plan, deployable without the stages or timm."""
