"""Checkpoints as training tools write them: read with the right weights, or refused by name."""

import argparse
import pathlib
import warnings

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VisionTransformer as TorchvisionViT

from vitcut.errors import ConfigError, ModelError
from vitcut.model.load import load
from vitcut.model.model import weight_hash

ARCH = "test_vit"
OWN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
GIVEN = {"arch": "vit", "num_heads": 4, "mean": (0.5,), "std": (0.2,)}
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 24,
    "mlp_dim": 40,
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCH, num_classes=3).eval()


def expect_load_refusal(path, told, kind=ModelError, **given):
    with pytest.raises(kind, match=told) as caught:
        load(path, **given)
    assert "\n" not in str(caught.value)


def _under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


ARGS = argparse.Namespace(lr=0.1, out=pathlib.Path("runs"))
WRITTEN_BY = {
    "by_hand": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer": {"state": {}}},
    "model_state": lambda s: {"model_state": s, "best_acc": 0.5},
    "timm_train": lambda s: {"state_dict_ema": s, "state_dict": _zero(s), "args": ARGS},
    "mae": lambda s: {"model": s, "optimizer": {}, "epoch": 3, "scaler": {}, "args": ARGS},
    "lightning": lambda s: {
        "state_dict": {
            **_under("net.", s),
            "criterion.weight": torch.ones(3),
            "val_acc.tp": torch.ones(3, dtype=torch.int64),
        },
        "pytorch-lightning_version": "2.2",
        "hyper_parameters": ARGS,
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(0.4)}},
    },
    "swa": lambda s: {**_under("module.", s), "n_averaged": torch.tensor(4)},
    "compiled_ddp": lambda s: {"model": _under("module._orig_mod.model.backbone.", s)},
    "compiled_blocks": lambda s: {
        key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in s.items()
    },
    "own_ema": lambda s: {**_under("model.", _zero(s)), **_under("ema_model.", s)},
    "twice": lambda s: {"state_dict": s, "net": dict(s)},
    "counters": lambda s: {**s, "n_averaged": torch.tensor(4), "loss.weight": torch.ones(3)},
}


def _zero(state):
    return {key: value * 0 for key, value in state.items()}


@pytest.mark.parametrize("tool", WRITTEN_BY)
def test_weights_are_found_wherever_a_tool_put_them(model, tmp_path, tool):
    torch.save(WRITTEN_BY[tool](model.state_dict()), tmp_path / "weights.pth")
    loaded = load(tmp_path / "weights.pth", arch=ARCH)
    assert weight_hash(loaded.module) == weight_hash(model)


@pytest.mark.parametrize("name", ["w.PTH", "w.ckpt", "w.pth.tar", "w.Bin"])
def test_the_usual_endings_are_files_of_weights(model, tmp_path, name):
    torch.save(model.state_dict(), tmp_path / name)
    assert weight_hash(load(tmp_path / name, arch=ARCH).module) == weight_hash(model)


def test_torch_s_own_average_is_read_and_what_is_left_out_is_said(model, tmp_path, capsys):
    torch.save(AveragedModel(model).state_dict(), tmp_path / "swa.pt")
    assert weight_hash(load(tmp_path / "swa.pt", arch=ARCH).module) == weight_hash(model)
    told = capsys.readouterr().err
    assert "under module." in told
    assert "left out of swa.pt, as no part of the ViT: n_averaged" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: {**s, "neck.weight": torch.ones(64, 64)}, r"unexpected \(neck\.weight\).*alone"),
        (lambda s: {**_under("net.", s), "temperature": torch.ones(1)}, r"\(temperature\)"),
        (lambda s: {**_under("net.", s), "fc.weight": torch.ones(2, 3)}, r"\(fc\.weight\)"),
        (
            lambda s: {"teacher": _under("backbone.", s), "student": _zero(s)},
            r"2 models that differ \(under teacher > backbone\., student\): save",
        ),
        (
            lambda s: {key: value for key, value in s.items() if key != "head.bias"},
            r"1 missing \(head\.bias\)",
        ),
        (
            lambda s: {
                **{k: v for k, v in s.items() if not k.startswith(("head", "blocks.0", "cls"))},
                "head.weight": s["head.weight"],
            },
            r"missing \(head\.bias, ",
        ),
    ],
)
def test_what_may_be_a_part_of_the_model_is_never_left_out(model, tmp_path, change, told):
    torch.save(change(model.state_dict()), tmp_path / "weights.pth")
    expect_load_refusal(tmp_path / "weights.pth", told, arch=ARCH)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ({"fc.weight": (3, 64), "fc.bias": (3,)}, r"no head\.weight.*found fc\.weight \[3, 64\]"),
        ({"head.1.weight": (3, 64), "head.1.bias": (3,)}, r"found head\.1\.weight \[3, 64\]"),
        ({"head.0.weight": (8, 64), "head.2.weight": (3, 8)}, r"found head\.0\.weight \[8, 64\]"),
        ({"head.fc.weight": (3, 128)}, r"found head\.fc\.weight \[3, 128\]"),
        ({}, r"no head\.weight.*found none: a backbone without a classifier"),
    ],
)
def test_another_head_is_named_with_a_remedy(model, tmp_path, head, told):
    body = {key: value for key, value in model.state_dict().items() if "head" not in key}
    shaped = {name: torch.ones(shape) for name, shape in head.items()}
    torch.save({**body, **shaped}, tmp_path / "weights.pth")
    expect_load_refusal(tmp_path / "weights.pth", told, arch=ARCH)


def test_a_norm_after_the_mean_of_the_patches_is_read_as_in_mae(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(ARCH, num_classes=3, global_pool="avg").eval()
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    loaded, pixels = load(tmp_path / "mae.pth", arch=ARCH), torch.randn(2, 3, 160, 160)
    assert torch.equal(loaded.module(pixels), model(pixels))
    assert loaded.weights.patch_readout == "mean"


def test_a_whole_pickled_model_is_told_as_such(model, tmp_path):
    for content in (model, {"model": model, "epoch": 3}):
        torch.save(content, tmp_path / "whole.pt")
        told = r"whole pickled timm\.models\.vision_transformer\.VisionTransformer"
        expect_load_refusal(tmp_path / "whole.pt", told, arch=ARCH)


def test_a_torchscript_program_is_told_as_such(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "scripted.pt")
        told = "is a TorchScript program: expected weights"
        expect_load_refusal(tmp_path / "scripted.pt", told, arch=ARCH)


def test_a_folder_of_save_for_hf_with_its_defaults_is_read(model, tmp_path):
    save_for_hf(model, tmp_path / "hf", model_config={"label_names": ["a", "b", "c"]})
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    loaded = load(tmp_path / "hf")
    assert loaded.labels.ids == ("a", "b", "c")
    assert weight_hash(loaded.module) == weight_hash(model)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"qkv_bias": False, "init_values": 0.1, "qk_norm": True},
        {"reg_tokens": 3, "no_embed_class": True, "mlp_ratio": 1.7},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "in_chans": 1, "pre_norm": True},
    ],
)
def test_a_timm_vit_of_any_size_is_read_from_its_shapes(tmp_path, given, capsys):
    torch.manual_seed(0)
    kind = timm.models.vision_transformer.VisionTransformer
    model = kind(**OWN, num_classes=5, **given).eval()
    torch.save({"net": model.state_dict()}, tmp_path / "own.pth")
    loaded = load(tmp_path / "own.pth", **GIVEN)
    pixels = torch.randn(2, given.get("in_chans", 3), 32, 32)
    assert torch.equal(loaded.module(pixels), model(pixels))
    assert "embed_dim 24, depth 2, num_heads 4" in capsys.readouterr().err


def test_a_torchvision_vit_of_any_size_is_read_from_its_shapes(tmp_path):
    torch.manual_seed(0)
    model = TorchvisionViT(**SMALL, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    torch.save({"state_dict": _under("model.", model.state_dict())}, tmp_path / "own.ckpt")
    loaded, pixels = load(tmp_path / "own.ckpt", **GIVEN), torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.module(pixels), model(pixels))
    assert loaded.preprocessing.mean == (0.5,) * 3


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"num_heads": None}, ConfigError, "does not say --num-heads: give what"),
        ({"mean": None, "std": None}, ConfigError, "does not say --mean and --std"),
        ({"num_heads": 5}, None, "no plain ViT with 5 heads per block"),
        ({"arch": ARCH}, ConfigError, "num-heads is for arch vit, got it with 'test_vit'"),
        ({"arch": "deit_tiny_patch16", "num_heads": None}, None, "did you mean .*deit_tiny"),
    ],
)
def test_what_shapes_do_not_say_has_to_be_given(tmp_path, changed, kind, told):
    model = timm.models.vision_transformer.VisionTransformer(**OWN, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    more = {} if kind is None else {"kind": kind}
    expect_load_refusal(tmp_path / "own.pth", told, **{**GIVEN, **changed}, **more)
