"""Modules as training scripts hold them, and adapters with mistakes in them."""

from dataclasses import replace
from inspect import unwrap

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vitcut
from vitcut.errors import ConfigError, ModelError, UnsupportedModelError, VitcutError
from vitcut.model import adapters
from vitcut.model.load import load
from vitcut.model.timm_models import read_timm
from vitcut.model.tracing import read_model


class _Lightning(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
        self.net = net


class _Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("test_vit", num_classes=3).eval()

    def forward(self, pixels):
        return self.vit(pixels)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(adapters, "_registered", {})


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (nn.DataParallel, "module"),
        (torch.compile, "_orig_mod"),
        (AveragedModel, "module"),
        (ModelEmaV3, "module"),
        (lambda net: torch.compile(nn.DataParallel(net)), r"_orig_mod\.module"),
        (_Lightning, "net"),
    ],
)
def test_the_model_inside_a_wrapper_is_named(wrap, where):
    wrapped = wrap(timm.create_model("test_vit", num_classes=3).eval())
    with pytest.raises(UnsupportedModelError, match=rf"a VisionTransformer: give model\.{where},"):
        read_model(wrapped)


@pytest.mark.parametrize("model", [{"head.weight": torch.ones(3, 2)}, None, 3])
def test_what_is_no_model_is_told_as_such(model):
    with pytest.raises(ConfigError, match=rf"a path or a name, got {type(model).__name__}: load"):
        unwrap(load)(model, mean=0.5, std=0.5)  # past the tests' own check of types


def test_a_module_without_values_is_refused():
    with torch.device("meta"):
        module = timm.create_model("test_vit", num_classes=3)
    with pytest.raises(ModelError, match="on the device meta, without values: load its weights"):
        vitcut.load_model(module, mean=0.5, std=0.5)


def _swish(weights):
    first = weights.blocks[0]
    return replace(weights, blocks=(replace(first, mlp=replace(first.mlp, activation="swish")),))


# Where tests check types at run time, those are refused earlier, in other words.
@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (_swish, r"activation.*'swish'.*'?gelu|activation must be one of gelu, .*got 'swish'"),
        (
            lambda w: replace(w, patch_readout="avg"),
            "patch_readout must be one of none|patch_readout.*'avg'",
        ),
        (lambda w: replace(w, head_bias=None), "the adapter for _Own failed, or gave"),
        (lambda w: replace(w, positions=w.positions[:, :3]), "the adapter for _Own failed, or"),
        (lambda w: replace(w, blocks=()), "blocks|the adapter for _Own failed"),
        (lambda w: replace(w, prefix=w.prefix * 2), "adapter for _Own is wrong.*mend the adapter"),
        (lambda w: w.no_such_name, r"adapter for _Own failed.*AttributeError.*no_such_name"),
        (lambda _: 3, "the adapter for _Own gave a int, expected"),
    ],
)
def test_a_mistake_in_an_adapter_is_told_as_such_in_one_line(mistake, told):
    vitcut.register_adapter(_Own, lambda model: mistake(read_timm(model.vit)))
    with pytest.raises(VitcutError, match=told) as caught:
        read_model(_Own().eval())
    assert "\n" not in str(caught.value)
