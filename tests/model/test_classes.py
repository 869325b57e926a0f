"""A model for some of its classes gives the same logits as before, for those."""

from dataclasses import replace

import pytest
import timm
import torch
from adapter_laws import shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import dinov2_of_the_class_token, hf_classifier, own_vit
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from vitcut.errors import UnsupportedModelError
from vitcut.model import adapters
from vitcut.model.adapters import as_classifier, logits_of, read_weights
from vitcut.model.classes import keep_rows

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _timm(**given):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=6, **given
    )


def _torchvision():
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16,
        num_classes=6,
    )  # fmt: skip


def _transformers(family):
    return as_classifier(hf_classifier(family, num_labels=6))


def _distilled():
    return timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=6
    )


MODELS = {
    "timm": _timm,
    "timm without a bias": lambda: _without_bias(_timm()),
    "torchvision": _torchvision,
    "ViT": lambda: _transformers("ViT"),
    "Dinov2": lambda: as_classifier(dinov2_of_the_class_token(num_labels=6)),
    "Dinov2 that reads patches too": lambda: _transformers("Dinov2"),
    "timm with a distillation token": _distilled,
    "timm with mean pooling": lambda: _timm(global_pool="avg"),
}


def _without_bias(model):
    model.head = nn.Linear(16, 6, bias=False)
    return model


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_logits_that_stay_are_the_models_own(build):
    torch.manual_seed(0)
    model = build().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    full = logits_of(model, PIXELS)

    @settings(max_examples=5)
    @given(rows=st.lists(st.integers(0, 5), min_size=1, unique=True))
    def same(rows):
        fewer = keep_rows(model, read_weights(model), rows)
        torch.testing.assert_close(logits_of(fewer, PIXELS), full[:, rows])
        assert read_weights(fewer).num_classes == len(rows)

    same()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_classifier_that_is_no_linear_layer_is_refused(monkeypatch):
    monkeypatch.setattr(adapters, "_registered", {})
    example = own_vit()
    model = shaken(example.OwnViT())
    adapters.register_adapter(example.OwnViT, example.read)
    weights = example.read(model)
    assert keep_rows(model, weights, [1, 0]) is not model
    scaled = replace(weights, head_weight=weights.head_weight * 2)
    with pytest.raises(UnsupportedModelError, match="for some of its classes: 0 of its layers"):
        keep_rows(model, scaled, [0])
