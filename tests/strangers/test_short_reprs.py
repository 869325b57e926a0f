"""What Python shows of models, images and evaluations is short; evaluations compare in pairs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vitcut
from vitcut.errors import ConfigError


@pytest.fixture(scope="module")
def made():
    model = vitcut.load_model("timm:test_vit", random_weights=True, image_size=16)
    images = vitcut.load_images("drawn", task="drawn", model=_twelve(model))
    return _twelve(model), images


def _twelve(model):
    from vitcut.model.classes import with_new_head

    torch.manual_seed(0)
    module, [head] = with_new_head(model.module, model.weights, 12)
    torch.nn.init.normal_(head.weight)
    return vitcut.load_model(module, mean=0.5, std=0.5)


def test_a_value_is_shown_in_a_line(made):
    model, images = made
    few = vitcut.CutSettings(images=24, verify_images=8)
    circuit = vitcut.Circuit.full(model.weights.graph)
    cut = vitcut.cut(model, images, circuit, settings=few, bench=None)
    found = vitcut.evaluate(cut, images, against=model)
    for value in (model, images, images.train, circuit, cut, cut.model, found, found.against):
        shown = repr(value)
        assert "\n" not in shown
        assert len(shown) < 250
        assert "True, False" not in shown
    assert f"coarse accuracy {found.accuracy_coarse:.1%}" in repr(found)
    assert "points against" in repr(found)


def test_an_evaluation_is_compared_with_an_earlier_one(made):
    model, images = made
    first = vitcut.evaluate(model, images)
    module = _twelve(vitcut.load_model("timm:test_vit", random_weights=True, image_size=16)).module
    with torch.no_grad():
        module.head.weight[:3] = 0
    other = vitcut.load_model(module, mean=0.5, std=0.5)
    found = vitcut.evaluate(other, images, against=first)
    expected = vitcut.evaluate(other, images, against=model)
    assert found.kl == pytest.approx(expected.kl)
    assert found.kl > 0
    ours, theirs = (
        (one.difference.difference, one.difference.low, one.difference.high)
        for one in (found, expected)
    )
    assert np.allclose(ours, theirs)
    with pytest.raises(ConfigError, match="evaluated on other images"):
        vitcut.evaluate(other, images, against=replace(first, fingerprint="0"))
