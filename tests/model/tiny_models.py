"""Tiny models that several files load, and what a saved one's folder says beside its weights."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from vitcut.labels import Labels
from vitcut.model.saving import save_dense
from vitcut.preprocessing import Preprocessing

OWN_VIT = Path(__file__).parents[2] / "examples" / "own_vit.py"
TINY_LABELS = Labels(owner="a tiny model", ids=("n1", "n2", "n3"), names=("cat", "dog", "owl"))
TINY = Preprocessing(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
TINY_CARD = "# A tiny model\n"
HF_SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_OF_CLASSES = {"num_labels", "id2label", "label2id"}


def hf_classifier(family: str, ending: str = "ForImageClassification", **given) -> nn.Module:
    """Of transformers, with random weights that are the same on every call."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    wide = {"mlp_ratio": 2} if family.startswith("Dinov2") else {"intermediate_size": 48}
    settings = {**HF_SIZES, **wide, **given}
    if family == "CLIP":
        classes = {key: settings.pop(key) for key in _OF_CLASSES & settings.keys()}
        settings = {"vision_config": settings, **classes}
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}{ending}")(config).eval()


def dinov2_of_the_class_token(**given) -> nn.Module:
    """Its classifier reads the class token alone, as one that was trained so."""
    model = hf_classifier("Dinov2", **given)
    with torch.no_grad():
        model.classifier.weight[:, HF_SIZES["hidden_size"] :] = 0
    return model


def save_tiny(module: nn.Module, folder: Path, preprocessing: Preprocessing = TINY) -> None:
    """Save a module as a folder of its library, with the tiny models' labels and card."""
    save_dense(module, folder, preprocessing=preprocessing, labels=TINY_LABELS, card=TINY_CARD)


def own_vit() -> ModuleType:
    """The example of a ViT with an adapter of its own, imported anew."""
    spec = importlib.util.spec_from_file_location("own_vit", OWN_VIT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example
