import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from adapter_laws import check_reading, expect_load_refusal, expect_refusal, shaken
from safetensors.torch import load_file, save_file
from tiny_models import TINY, TINY_LABELS, save_tiny
from torch import nn
from torchvision.models import ViT_B_16_Weights, _api
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from vitcut.errors import ConfigError, ModelError
from vitcut.model.load import load
from vitcut.preprocessing import Framing

BLOCKS = {"patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
SIZES = {**BLOCKS, "image_size": 32, "num_classes": 5}


def _vit(**given) -> VisionTransformer:
    torch.manual_seed(0)
    return shaken(VisionTransformer(**{**SIZES, **given}))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="plain"),
        pytest.param({"num_heads": 2, "patch_size": 16}, id="few heads and patches"),
        pytest.param({"dropout": 0.5, "attention_dropout": 0.5}, id="dropout"),
        pytest.param({"norm_layer": partial(nn.LayerNorm, eps=1e-3)}, id="another epsilon"),
    ],
)
def test_a_read_model_computes_the_same_and_compiles(variant):
    weights = check_reading(_vit(**variant))
    assert (weights.image_size, weights.width, weights.num_classes) == (32, 32, 5)


def test_attention_without_biases_is_read():
    model = _vit()
    for block in model.encoder.layers:
        old = block.self_attention
        block.self_attention = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
        block.self_attention.double().train(old.training)
    assert not check_reading(model).blocks[0].attn.q_bias.any()


def _with_zero_key(model: VisionTransformer) -> None:
    model.encoder.layers[0].self_attention.add_zero_attn = True


def _with_bias_key(model: VisionTransformer) -> None:
    attn = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True)
    model.encoder.layers[0].self_attention = attn.double()


def _with_tanh_gelu(model: VisionTransformer) -> None:
    model.encoder.layers[1].mlp[1].approximate = "tanh"


def _with_another_mlp(model: VisionTransformer) -> None:
    model.encoder.layers[1].mlp[1] = nn.ReLU()


def _with_bare_heads(model: VisionTransformer) -> None:
    model.heads = nn.Linear(32, 5).double()


def _with_hook(model: VisionTransformer) -> None:
    model.encoder.ln.register_forward_hook(lambda module, inputs, output: output)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        (_with_zero_key, "attention to a key that is not a token"),
        (_with_bias_key, "attention to a key that is not a token"),
        (_with_tanh_gelu, "activation GELU"),
        (_with_another_mlp, "MLP of Linear, ReLU, Dropout, Linear, Dropout"),
        (_with_bare_heads, r"heads that are a bare Linear: .*OrderedDict\(head=model\.heads\)"),
        (_with_hook, r"a hook on encoder\.ln"),
    ],
)
def test_what_was_changed_in_a_model_is_refused_by_name(change, feature):
    model = _vit()
    change(model)
    expect_refusal(model, f"^not supported: {feature}.*such as vit_b_16")


@pytest.mark.parametrize(
    ("variant", "feature"),
    [
        ({"representation_size": 6}, "representation_size"),
        ({"conv_stem_configs": [ConvStemConfig(8, 3, 8)]}, "Sequential: a convolutional stem"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(variant, feature):
    expect_refusal(_vit(**variant), f"^not supported: .*{feature}")


def test_another_architecture_is_refused_by_name():
    with torch.device("meta"):
        model = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4])
    expect_refusal(model, "^not supported: SwinTransformer .*windows")


ARCH = "torchvision:vit_tiny_8"


def vit_tiny_8(*, weights: ViT_B_16_Weights | None = None, image_size=224, **given):
    torch.manual_seed(0)
    return VisionTransformer(image_size=image_size, **BLOCKS, **given)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """An architecture of torchvision that is built in no time."""
    monkeypatch.setitem(_api.BUILTIN_MODELS, "vit_tiny_8", vit_tiny_8)


@pytest.fixture
def model():
    model = vit_tiny_8(image_size=40, num_classes=3).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    return model


@pytest.fixture
def path(tmp_path, model):
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_bare_weights_say_classes_and_image_size(model, path):
    loaded = load(path, arch=ARCH)
    pixels = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(loaded.module(pixels), model(pixels))
    taken = loaded.preprocessing
    assert (taken.image_size, loaded.labels) == (40, None)
    assert taken.mean == (0.485, 0.456, 0.406)
    assert taken.framing == Framing(crop_fraction=224 / 256, interpolation="bilinear")
    assert loaded.weights.num_classes == 3


def test_images_of_fine_tuned_sizes_are_made_as_for_those_weights(tmp_path):
    torch.save(vit_tiny_8(image_size=384).state_dict(), tmp_path / "weights.pth")
    loaded = load(tmp_path / "weights.pth", arch=ARCH)
    assert loaded.preprocessing.framing == Framing(interpolation="bicubic")


def test_mean_and_std_that_are_given_count(path):
    loaded = load(path, arch=ARCH, mean=(0.5,), std=(0.1, 0.2, 0.3))
    taken = loaded.preprocessing
    assert (taken.mean, taken.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match="mean must be one number, or three"):
        load(path, arch=ARCH, mean=(0.5, 0.5))


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("torchvision:vit_9", "torchvision has no ViT 'vit_9': expected one of vit_b_16"),
        ("torchvision:resnet18", "torchvision has no ViT 'resnet18': expected one of vit_b_16"),
        (
            "deit_tiny_patch16_224",
            r"has the names of torchvision's ViTs, .*--arch torchvision:NAME",
        ),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(path, arch, match):
    expect_load_refusal(path, match, arch=arch)


@pytest.mark.parametrize(
    ("changes", "arch", "match"),
    [
        ({"heads.head.weight": torch.zeros(())}, ARCH, r"heads\.head\.weight of shape \[\]: exp"),
        ({"conv_proj.weight": torch.zeros(())}, ARCH, r"of another shape \(conv_proj\.weight"),
        (
            {"encoder.pos_embedding": torch.zeros(1, 0, 32)},
            ARCH,
            r"of another shape \(encoder\.pos_emb",
        ),
    ],
)
def test_weights_of_odd_shapes_are_refused(tmp_path, model, changes, arch, match):
    state = {k: v for k, v in {**model.state_dict(), **changes}.items() if v is not None}
    torch.save(state, tmp_path / "weights.pth")
    expect_load_refusal(tmp_path / "weights.pth", match, arch=arch)


def test_names_that_do_not_fit_are_told(tmp_path, model):
    state = dict(model.state_dict())
    del state["encoder.ln.weight"]
    torch.save(state, tmp_path / "weights.pth")
    expect_load_refusal(tmp_path / "weights.pth", r"1 missing \(encoder\.ln\.weight\)", arch=ARCH)


TAKEN = replace(
    TINY,
    image_size=40,
    framing=Framing(crop_fraction=0.8, fit="squash", interpolation="bilinear"),
)


@pytest.fixture
def folder(tmp_path, path):
    save_tiny(load(path, arch=ARCH).module, tmp_path / "dense", TAKEN)
    return tmp_path / "dense"


def test_a_saved_model_comes_back_equal(path, folder):
    before, after = load(path, arch=ARCH), load(folder)
    assert after.weight_hash == before.weight_hash
    pixels = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(after.module(pixels), before.module(pixels))
    assert (after.labels.ids, after.labels.names) == (TINY_LABELS.ids, TINY_LABELS.names)
    assert after.preprocessing == TAKEN
    assert not after.module.training


def test_a_folder_that_was_altered_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"class_names": ["cat"]}))
    expect_load_refusal(folder, "config.json is not the file that was saved")
    # Folders of before have no hash of their config.
    del config["vitcut"]["config_sha256"]
    for entry in ("preprocessing", "class_ids"):
        (folder / "config.json").write_text(json.dumps(config | {entry: None}))
        expect_load_refusal(folder, "cannot load the model")
    (folder / "config.json").write_text(json.dumps(config | {"class_names": ["cat"]}))
    expect_load_refusal(folder, "cannot load the model .* has 3 class ids and 1 names")
    (folder / "config.json").write_text(json.dumps(config | {"torchvision": {"eps": 1}}))
    expect_load_refusal(folder, "cannot load the model")
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["heads.head.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    expect_load_refusal(folder, "is not the file that was saved")


class _Own(VisionTransformer):
    """Of a user."""


def test_a_class_of_the_users_own_is_refused_before_anything_is_written(tmp_path):
    model = _Own(image_size=16, **BLOCKS)
    with pytest.raises(ModelError, match=r"a _Own cannot be saved.*--repair-dense false"):
        save_tiny(model, tmp_path / "dense", replace(TAKEN, image_size=16))
    assert not (tmp_path / "dense").exists()
