import json
from dataclasses import replace

import pytest
import torch
from adapter_laws import expect_load_refusal
from safetensors.torch import load_file, save_file
from tiny_models import TINY_CARD
from torchvision.models import ViT_B_16_Weights, _api
from torchvision.models.vision_transformer import VisionTransformer

from vitcut.errors import ModelError
from vitcut.framing import Framing
from vitcut.model.given import Given
from vitcut.model.loading import load_model, save_dense
from vitcut.model.tracing import read_model

SIZES = {"patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
ARCH = "torchvision:vit_tiny_8"


def vit_tiny_8(*, weights: ViT_B_16_Weights | None = None, image_size=224, **given):
    torch.manual_seed(0)
    return VisionTransformer(image_size=image_size, **SIZES, **given)


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
    loaded = load_model(str(path), Given(arch=ARCH))
    pixels = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(loaded.model(pixels), model(pixels))
    assert (loaded.image_size, loaded.class_ids) == (40, None)
    assert loaded.mean == (0.485, 0.456, 0.406)
    assert loaded.framing == Framing(crop_fraction=224 / 256, interpolation="bilinear")
    assert read_model(loaded.model).num_classes == 3


def test_images_of_fine_tuned_sizes_are_made_as_for_those_weights(tmp_path):
    torch.save(vit_tiny_8(image_size=384).state_dict(), tmp_path / "weights.pth")
    loaded = load_model(str(tmp_path / "weights.pth"), Given(arch=ARCH))
    assert loaded.framing == Framing(interpolation="bicubic")


def test_mean_and_std_that_are_given_count(path):
    loaded = load_model(str(path), Given(arch=ARCH, mean=(0.5,), std=(0.1, 0.2, 0.3)))
    assert (loaded.mean, loaded.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    expect_load_refusal(path, "mean must be 3 numbers", arch=ARCH, mean=(0.5, 0.5))


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("torchvision:vit_9", "torchvision has no ViT 'vit_9': expected one of vit_b_16"),
        ("torchvision:resnet18", "torchvision has no ViT 'resnet18': expected one of vit_b_16"),
        ("deit_tiny_patch16_224", r"has no head\.weight, which says how many classes"),
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


CARD = replace(
    TINY_CARD,
    image_size=40,
    framing=Framing(crop_fraction=0.8, fit="squash", interpolation="bilinear"),
)


@pytest.fixture
def folder(tmp_path, path):
    save_dense(load_model(str(path), Given(arch=ARCH)).model, tmp_path / "dense", card=CARD)
    return tmp_path / "dense"


def test_a_saved_model_comes_back_equal(path, folder):
    before, after = load_model(str(path), Given(arch=ARCH)), load_model(str(folder))
    assert after.weight_hash == before.weight_hash
    pixels = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(after.model(pixels), before.model(pixels))
    assert (after.class_ids, after.class_names) == (CARD.class_ids, CARD.class_names)
    assert (after.mean, after.std, after.framing) == (CARD.mean, CARD.std, CARD.framing)
    assert after.image_size == 40
    assert not after.model.training


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
    model = _Own(image_size=16, **SIZES)
    with pytest.raises(ModelError, match=r"a _Own cannot be saved.*--repair-dense false"):
        save_dense(model, tmp_path / "dense", card=replace(CARD, image_size=16))
    assert not (tmp_path / "dense").exists()
