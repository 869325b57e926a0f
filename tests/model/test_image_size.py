"""Models of timm that are built for images of another size than their own."""

import pytest
import timm
import torch
from pretrained import fake_pretrained
from timm.layers import resample_abs_pos_embed

from vitcut.errors import ConfigError
from vitcut.model.load import load
from vitcut.model.model import weight_hash
from vitcut.preprocessing import Framing

NAMES = [("vit_tiny_patch16_224", 64), ("eva02_tiny_patch14_224", 56)]


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", 64), ("eva02_tiny_patch14_336", 56)]
)
def test_random_weights_are_drawn_for_that_size(name, size):
    loaded = load(f"timm:{name}", random_weights=True, image_size=size)
    assert loaded.preprocessing.image_size == size
    assert loaded.weights.image_size == size
    again = load(f"timm:{name}", random_weights=True, image_size=size)
    assert again.weight_hash == loaded.weight_hash


@pytest.mark.parametrize(("name", "size"), NAMES)
def test_pretrained_positions_are_brought_to_that_size(name, size, tmp_path, monkeypatch):
    own = fake_pretrained(monkeypatch, name, tmp_path / "weights.pth", num_classes=5)
    loaded = load(f"timm:{name}", image_size=size)
    assert loaded.preprocessing.image_size == size
    weights, expected = loaded.module.state_dict(), own.state_dict()
    positions = expected.pop("pos_embed")
    side = size // own.patch_embed.patch_size[0]
    brought = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=1)
    assert torch.equal(weights.pop("pos_embed"), brought)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert loaded.weights.image_size == size


@pytest.mark.parametrize(("name", "size"), NAMES)
def test_its_own_size_changes_nothing(name, size, tmp_path, monkeypatch):
    own = fake_pretrained(monkeypatch, name, tmp_path / "weights.pth", num_classes=5)
    for given in ({}, {"image_size": 224}):
        loaded = load(f"timm:{name}", **given)
        assert (loaded.weight_hash, loaded.preprocessing.image_size) == (weight_hash(own), 224)


def test_images_are_made_in_that_size_and_else_as_the_weights_want_them():
    own = load("timm:test_vit", random_weights=True).preprocessing
    sized = load("timm:test_vit", random_weights=True, image_size=32).preprocessing
    assert (own.image_size, sized.image_size) == (160, 32)
    assert sized.framing == own.framing == Framing(crop_fraction=0.95)
    assert (sized.mean, sized.std) == (own.mean, own.std)


@pytest.mark.parametrize("random_weights", [True, False])
@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("vit_tiny_patch16_224", 72, "a multiple of 16, the patch size of vit_tiny_.*, got 72"),
        ("vit_tiny_patch16_224", 8, "a multiple of 16, .*, got 8"),
        ("eva02_tiny_patch14_224", 64, "a multiple of 14, .*, got 64"),
        ("eva02_tiny_patch14_224", 7, "a multiple of 14, .*, got 7"),
        ("resnet18.a1_in1k", 64, r"timm\'s resnet18\.a1_in1k takes no image-size: leave it out"),
        ("repvit_m1", 64, "timm's repvit_m1 takes no image-size"),
    ],
)
def test_sizes_that_a_model_cannot_take_are_refused(name, size, match, random_weights, monkeypatch):
    """Before anything is loaded."""
    create = timm.create_model

    def without_weights(asked, pretrained=False, **given):
        assert not pretrained
        return create(asked, **given)

    monkeypatch.setattr(timm, "create_model", without_weights)
    with pytest.raises(ConfigError, match=match):
        load(f"timm:{name}", random_weights=random_weights, image_size=size)
