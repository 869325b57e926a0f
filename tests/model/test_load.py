import json
import math
import re
from dataclasses import replace

import pytest
import timm
import torch
from adapter_laws import expect_load_refusal
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny_models import TINY, TINY_CARD, TINY_LABELS, save_tiny
from torch import nn

from vitcut import cli
from vitcut.errors import ConfigError, ModelError
from vitcut.model.load import load
from vitcut.model.model import Model, weight_hash
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.preprocessing import WHOLE, Framing

TAKEN = replace(TINY, image_size=16)


@pytest.fixture(scope="module")
def model():
    config = VitSettings(width=8, depth=1, num_heads=2, dropout=0.2)
    return build_reference(config, num_classes=3, image_size=16).eval()


@pytest.fixture
def folder(tmp_path, model):
    saved = Model.of(model, "tiny", TAKEN, TINY_LABELS)
    replace(saved, card=TINY_CARD).save(tmp_path / "dense")
    return tmp_path / "dense"


def _edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["{0}", "local-dir:{0}", "{0.parent}"])
def test_a_saved_model_comes_back_equal_with_its_labels(model, folder, form):
    loaded = load(form.format(folder))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.module(images), model(images))
    assert loaded.weight_hash == weight_hash(model)
    assert (loaded.labels.ids, loaded.labels.names) == (TINY_LABELS.ids, TINY_LABELS.names)
    assert loaded.preprocessing == TAKEN
    assert not loaded.module.training


def test_the_card_is_saved_and_a_model_without_labels_is_not(model, folder):
    assert (folder / "README.md").read_text() == TINY_CARD
    with pytest.raises(ModelError, match=r"'tiny' does not name its classes: use model\.for_task"):
        Model.of(model, "tiny", TAKEN, None).save(folder.parent / "other")
    assert not (folder.parent / "other").exists()


def test_timm_itself_reads_a_saved_model(model, folder):
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), model(images))


def test_a_saved_model_claims_nothing_of_the_weights_timm_knows(folder):
    pretrained = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "hf_hub_id", "url"} & pretrained.keys()


def test_saving_again_replaces_the_folder_whole(model, folder):
    (folder / "stale").write_text("")
    save_tiny(model, folder, TAKEN)
    assert sorted(item.name for item in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [item.name for item in folder.parent.iterdir()] == ["dense"]


def test_a_save_that_fails_leaves_the_old_folder(model, folder, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("vitcut.model.saving.write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_tiny(model, folder, TAKEN)
    assert [item.name for item in folder.parent.iterdir()] == ["dense"]
    load(folder)


def test_a_missing_path_is_refused(tmp_path):
    expect_load_refusal(tmp_path / "nothing", "no model at .*nothing")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a model")
    expect_load_refusal(tmp_path / "notes.txt", "is a file: expected a model folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(folder, name):
    (folder / name).unlink()
    expect_load_refusal(folder, f"holds no {name}")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_config_that_names_no_architecture_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    expect_load_refusal(folder, "config.json")


def test_an_architecture_that_timm_lacks_is_refused(folder):
    _edit(
        folder, lambda config: (config.pop("vitcut"), config.update(architecture="vit_of_tomorrow"))
    )
    expect_load_refusal(folder, "vit_of_tomorrow")


def test_a_newer_version_is_refused(folder):
    _edit(folder, lambda config: config["vitcut"].update(format_version=99))
    expect_load_refusal(folder, "format_version 99.*upgrade vitcut")


@pytest.mark.parametrize("own", [None, [], 3, {}, {"format_version": "2"}])
def test_an_altered_entry_of_its_own_is_refused(folder, own):
    _edit(folder, lambda config: config.update(vitcut=own))
    expect_load_refusal(folder, "is damaged: its entry 'vitcut' has no format_version")


@pytest.mark.parametrize("mean", [[0.4, 0.5, 0.5], [math.nan, 0.5, 0.5]])
def test_a_config_that_was_edited_beside_sound_weights_is_refused(folder, mean):
    _edit(folder, lambda config: config["pretrained_cfg"].update(mean=mean))
    expect_load_refusal(folder, "config.json is not the file that was saved")


@pytest.mark.parametrize(
    "entry", ["architecture", "pretrained_cfg", "model_args", "label_descriptions"]
)
def test_a_foreign_config_with_an_entry_of_another_type_is_refused(folder, entry):
    _edit(folder, lambda config: (config.pop("vitcut"), config.update({entry: 3})))
    expect_load_refusal(folder, "cannot load the model|label_descriptions are a int")


def test_a_shipped_name_goes_before_a_folder_of_that_name(folder, monkeypatch):
    folder.rename(folder.with_name("animals"))
    monkeypatch.chdir(folder.parent)
    assert len(load("animals").labels.ids) == 58
    assert load("./animals").labels.ids == TINY_LABELS.ids


def test_changed_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    expect_load_refusal(folder, "is not the file that was saved")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["blocks.0.mlp.fc1.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors")
    _edit(folder, lambda config: config.pop("vitcut"))
    expect_load_refusal(folder, r"not finite, in blocks\.0\.mlp\.fc1\.weight")


def test_weights_of_another_shape_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "head.bias": torch.zeros(5)}, folder / "model.safetensors")
    _edit(folder, lambda config: config.pop("vitcut"))
    expect_load_refusal(folder, "cannot load the model")


def test_a_file_that_is_not_safetensors_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"something else")
    _edit(folder, lambda config: config.pop("vitcut"))
    expect_load_refusal(folder, "cannot load the model")


def test_an_unknown_timm_name_is_refused():
    expect_load_refusal("timm:vit_of_tomorrow", "vit_of_tomorrow")


@pytest.mark.parametrize(
    "framing", [WHOLE, Framing(fit="squash", crop_fraction=0.9, interpolation="bilinear")]
)
def test_how_images_are_made_is_saved_as_timm_has_it(tmp_path, model, framing):
    save_tiny(model, tmp_path / "dense", replace(TAKEN, framing=framing))
    assert load(tmp_path / "dense").preprocessing.framing == framing
    config = json.loads((tmp_path / "dense" / "config.json").read_text())["pretrained_cfg"]
    assert config["crop_mode"] == {"crop": "center", "squash": "squash"}[framing.fit]
    assert (config["crop_pct"], config["interpolation"]) == (
        framing.crop_fraction,
        framing.interpolation,
    )


def test_the_shipped_model_takes_the_whole_square_as_before():
    taken = load("animals").preprocessing
    assert (taken.framing, taken.image_size) == (WHOLE, 64)


def _foreign(folder, **changes):
    def change(config):
        config.pop("vitcut")
        config["pretrained_cfg"] |= changes

    _edit(folder, change)


def test_a_way_to_make_images_that_is_not_known_is_refused(folder):
    _foreign(folder, crop_mode="border")
    expect_load_refusal(folder, "has crop_mode 'border', expected one of center, squash")


def test_a_crop_that_is_none_is_refused(folder):
    _foreign(folder, crop_pct=1.5)
    expect_load_refusal(folder, "crop_fraction must be > 0 and <= 1, got 1.5")


def test_the_size_is_the_one_that_the_model_was_built_for(folder):
    _foreign(folder, input_size=[3, 224, 224])
    assert load(folder).preprocessing.image_size == 16


def test_a_classifier_that_timm_would_draw_anew_is_refused(folder):
    _foreign(folder)
    _edit(folder, lambda config: config["model_args"].update(num_classes=7))
    expect_load_refusal(folder, "saved with 3 classes, its configuration builds 7.*never trained")


def test_a_grey_model_of_timm_is_read_with_one_mean(tmp_path):
    module = timm.create_model("test_vit", in_chans=1, num_classes=2, img_size=32)
    data = {"input_size": (1, 32, 32), "mean": (0.4,), "std": (0.2,), "crop_pct": 0.8}
    save_for_hf(module, str(tmp_path / "grey"), safe_serialization=True, data_config=data)
    taken = load(tmp_path / "grey").preprocessing
    assert (taken.mean, taken.std, taken.image_size) == ((0.4,), (0.2,), 32)
    assert taken.framing == Framing(channels=1, crop_fraction=0.8)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"mean": (0.5, float("inf"))}, "mean must be a finite number, got inf"),
        ({"std": (0.5, 0.5, -0.1)}, r"std must be a finite number > 0, got -0\.1"),
        ({"std": (float("nan"),)}, "std must be a finite number, got nan"),
        ({"image_size": 0}, "image-size must be >= 1, got 0"),
        ({"image_size": -16}, "image-size must be >= 1, got -16"),
    ],
)
def test_numbers_out_of_range_are_refused(said, match):
    with pytest.raises(ConfigError, match=match):
        load("weights.pth", **said)


@pytest.mark.parametrize(
    ("said", "spec", "match"),
    [
        ({"arch": "vit"}, "animals", "arch is for a file of bare weights"),
        ({"mean": (0.5,)}, "timm:test_vit", "mean is for a file of bare weights"),
        ({"std": (0.5,)}, "{weights}/..", "std is for a file of bare weights"),
        ({"random_weights": True}, "{weights}", "random-weights is for timm:NAME, got it with"),
        ({"image_size": 32}, "animals", "image-size is for timm:NAME, got it with 'animals', who"),
        ({"image_size": 32}, "hf-hub:o/n", "weights or configuration say the size: leave it out"),
        ({"image_size": 32}, "{weights}", "weights or configuration say the size: leave it out"),
    ],
)
def test_what_is_for_another_kind_of_model_is_refused(tmp_path, said, spec, match):
    path = tmp_path / "weights.pth"
    path.touch()
    with pytest.raises(ConfigError, match=match):
        load(spec.format(weights=path), **said)


def test_what_is_for_that_kind_of_model_is_taken(tmp_path):
    random = load("timm:test_vit", random_weights=True, image_size=32)
    assert random.preprocessing.image_size == 32
    path = tmp_path / "weights.pth"
    torch.save(random.module.state_dict(), path)
    bare = load(path, arch="test_vit", mean=(0.4,), std=(0.3,))
    assert (bare.preprocessing.mean, bare.preprocessing.std) == ((0.4,) * 3, (0.3,) * 3)
    assert bare.weight_hash == random.weight_hash


@pytest.mark.parametrize("said", [{"arch": "vit"}, {"random_weights": True}, {"image_size": 32}])
def test_a_module_is_taken_as_it_was_built(said):
    with pytest.raises(ConfigError, match=f"taken as it was built, got {next(iter(said))}: leave"):
        load(nn.Identity(), mean=(0.5,), std=(0.5,), **said)


@pytest.mark.parametrize(
    ("typed", "match"),
    [
        (["--model", "animals", "--image-size", "64"], "image-size is for timm:NAME, got it with"),
        (["--model", "timm:resnet18", "--image-size", "64"], "timm's resnet18 takes no image-size"),
        (["--model", "timm:test_vit", "--image-size", "50"], "image-size must be a multiple of 16"),
        (
            ["--model", "timm:test_vit", "--image-size", "8", "--random-weights", "true"],
            "image-size must be a multiple of 16",
        ),
        (["--model", "timm:test_vit", "--image-size", "0"], "image-size must be >= 1, got 0"),
    ],
)
def test_the_command_line_tells_it_in_one_line(capsys, typed, match):
    where = ["--source", "drawn", "--task", "drawn"]
    assert cli.main(["discover", "--tau", "0.1", *where, *typed]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"vitcut: error: {match}")
    assert told.count("\n") == 1


def test_a_mean_on_the_scale_of_bytes_is_told_with_its_file(tmp_path):
    save_for_hf(timm.create_model("test_vit", num_classes=2), str(tmp_path))
    config = tmp_path / "config.json"
    content = json.loads(config.read_text())
    content["pretrained_cfg"]["mean"] = [123.7, 116.3, 103.5]
    config.write_text(json.dumps(content))
    told = re.escape(f"scale 0 to 255: divide it by 255 in {config}")
    with pytest.raises(ModelError, match=told):
        load(tmp_path)
