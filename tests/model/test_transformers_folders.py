import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapter_laws import expect_load_refusal
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import TINY, TINY_CARD, TINY_LABELS, hf_classifier, save_tiny

from vitcut import cli
from vitcut.errors import ConfigError, ModelError
from vitcut.images.decoding import decode
from vitcut.model import load as loading
from vitcut.model.load import load
from vitcut.preprocessing import Framing

transformers = pytest.importorskip("transformers")

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 40},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
LABELS = ["cat", "dog", "owl"]
FAMILIES = ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIP"]
TAKEN = replace(
    TINY, framing=Framing(crop_fraction=0.8, interpolation="bilinear", orientation="apply")
)


def _build(family="ViT", **given):
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {t: i for i, t in enumerate(LABELS)}}
    return hf_classifier(family, **{**labels, **given})


def _save(folder, model, **changes):
    model.save_pretrained(folder)
    content = {**PREPROCESSOR, **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture(scope="module")
def model():
    return _build()


@pytest.fixture
def folder(tmp_path, model):
    return _save(tmp_path / "hf", model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_is_read_with_labels_and_preprocessing(tmp_path, family):
    module = _build(family)
    loaded = load(_save(tmp_path / "hf", module))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module(pixels), module(pixels).logits)
    assert loaded.labels.ids == loaded.labels.names == tuple(LABELS)
    assert loaded.preprocessing == TAKEN
    assert not loaded.module.training
    assert loaded.weights.num_classes == 3


def test_loading_is_silent_and_leaves_torchs_generator(folder, capfd):
    generator = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), generator)
    assert capfd.readouterr() == ("", "")


def test_labels_that_nobody_gave_are_none(tmp_path):
    texts = {number: f"LABEL_{number}" for number in range(3)}
    module = _build(id2label=texts, label2id={text: n for n, text in texts.items()})
    loaded = load(_save(tmp_path / "hf", module))
    assert loaded.labels is None


def test_half_precision_on_disk_is_float32_in_memory(tmp_path, model):
    _save(tmp_path / "hf", _build().half())
    assert {item.dtype for item in load(tmp_path / "hf").module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "framing"),
    [
        ({"do_center_crop": False, "size": {"shortest_edge": 32}}, Framing()),
        ({"do_center_crop": None, "size": {"height": 32, "width": 32}}, Framing(fit="squash")),
        (
            {"size": {"height": 40, "width": 40}, "image_processor_type": "DeiTImageProcessorFast"},
            Framing(fit="squash", crop_fraction=0.8),
        ),
        ({"size": 40}, Framing(crop_fraction=0.8)),
        ({"size": 40, "default_to_square": True}, Framing(fit="squash", crop_fraction=0.8)),
        (
            {"size": 32, "image_processor_type": "ViTImageProcessor", "default_to_square": False}
            | {"do_center_crop": None},
            Framing(),
        ),
        (
            {
                "size": 32,
                "do_center_crop": False,
                "image_processor_type": None,
                "feature_extractor_type": "ViTFeatureExtractor",
            },
            Framing(fit="squash"),
        ),
        ({"do_resize": False, "do_center_crop": False}, Framing()),
        ({"do_center_crop": None, "resample": None}, Framing(crop_fraction=0.8)),
        (
            {"image_processor_type": "ViTImageProcessor", "resample": None, "do_center_crop": None}
            | {"size": {"height": 32, "width": 32}},
            Framing(fit="squash", interpolation="bilinear"),
        ),
        ({"resample": 1, "size": {"shortest_edge": 32}}, Framing(interpolation="lanczos")),
    ],
)
def test_what_is_done_to_pictures_is_read(tmp_path, model, changes, framing):
    changes = {"resample": 3, **changes}
    expected = replace(framing, orientation="apply")
    assert load(_save(tmp_path / "hf", model, **changes)).preprocessing.framing == expected


@pytest.mark.parametrize("left_out", [(), ("do_center_crop", "resample", "image_mean")])
@pytest.mark.parametrize("kind", ["Bit", "ViT", "DeiT", "CLIP"])
def test_images_are_made_as_the_librarys_own_processor_makes_them(tmp_path, model, kind, left_out):
    kind += "ImageProcessor"
    square = {"size": {"height": 32, "width": 32}, "do_center_crop": None}
    changes = square if kind.startswith("ViT") else {}
    changes |= dict.fromkeys(left_out)
    folder = _save(tmp_path / "hf", model, image_processor_type=kind, **changes)
    loaded = load(folder)
    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(90, 60, 3)
    picture = Image.fromarray(ramp.astype(np.uint8))
    picture.save(tmp_path / "picture.png")
    taken = loaded.preprocessing
    pixels = decode((tmp_path / "picture.png").read_bytes(), 32, taken.framing).pixels
    ours = (pixels / 255 - np.array(taken.mean)) / np.array(taken.std)
    processor = getattr(transformers, kind).from_pretrained(folder)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    assert np.abs(ours.transpose(2, 0, 1) - theirs).max() < 0.02


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"do_rescale": False, "image_mean": [51.0] * 3, "image_std": [255.0] * 3}, 0.2, 1.0),
        ({"rescale_factor": 2 / 255, "image_mean": [1] * 3, "image_std": 0.5}, 0.5, 0.25),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": 0.5, "image_std": [0.5]}, 0.5, 0.5),
    ],
)
def test_mean_and_std_are_brought_to_the_scale_0_to_1(tmp_path, model, changes, mean, std):
    taken = load(_save(tmp_path / "hf", model, **changes)).preprocessing
    assert taken.mean == pytest.approx((mean,) * 3)
    assert taken.std == pytest.approx((std,) * 3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_mean": [123.675, 116.28, 103.53]}, "mean must be on the scale 0 to 1, got 123.6"),
        (
            {"image_std": [58.4, 57.1, 57.4]},
            r"std must be on the scale 0 to 1, got 58.4.*by 255 in .*preprocessor_config\.json$",
        ),
        ({"image_std": [0.5, 0.5]}, "must be 3 numbers.*got 2"),
        ({"image_std": "0.5"}, "must be numbers, got '0.5'"),
        ({"resample": 9}, "has resample 9, expected 0 to 5"),
        ({"size": {"shortest_edge": 24}}, "vitcut does not pad"),
        ({"size": {"height": 40, "width": 30}}, "a square's height and width"),
        ({"size": {"longest_edge": 40}}, "has size .*expected one number of pixels"),
        ({"do_resize": False}, "crops images that it does not scale"),
        ({"image_processor_type": "FlavaImageProcessor"}, "of Flava, expected one of Bit"),
        ({"image_std": [0.5, 0.5, 0]}, r"std must be a finite number > 0, got 0\.0 in .*json$"),
        ({"image_mean": math.nan}, "mean and std must be finite numbers, got nan"),
        ({"rescale_factor": 0}, "has rescale_factor 0, expected a number > 0"),
        ({"rescale_factor": "1/255"}, "has rescale_factor '1/255', expected a number"),
        ({"do_resize": "false"}, "has do_resize 'false', expected true or false"),
        ({"do_pad": True, "pad_size": 40}, "has do_pad, and vitcut does not pad"),
        ({"crop_size": 16}, "makes images of 16 pixels, the model takes 32"),
    ],
)
def test_preprocessing_that_is_not_understood_is_refused(tmp_path, model, changes, match):
    expect_load_refusal(_save(tmp_path / "hf", model, **changes), match)


def test_a_folder_without_preprocessing_or_weights_is_refused(folder):
    (folder / "preprocessor_config.json").write_text("{")
    expect_load_refusal(folder, r"preprocessor_config\.json is not readable JSON")
    (folder / "preprocessor_config.json").unlink()
    expect_load_refusal(folder, "holds no preprocessor_config.json.*save the image processor")
    (folder / "model.safetensors").unlink()
    expect_load_refusal(folder, "holds no weights: expected model.safetensors")


def _edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _without_classifier(weights):
    del weights["classifier.weight"], weights["classifier.bias"]


def _without_norm(weights):
    del weights["vit.layernorm.weight"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_without_classifier, r"2 missing \(classifier\.bias, .*no trained classifier: give one"),
        (_without_norm, r"1 missing \(vit\.layernorm\.weight\); restore the folder"),
        (
            lambda weights: weights.update(neck=torch.zeros(2)),
            r"not those of a ViTForImageClassification: 1 unexpected \(neck\)",
        ),
        (
            lambda weights: weights.update({"classifier.bias": torch.zeros(7)}),
            r"1 of another shape \(classifier\.bias \[7\] instead of \[3\]\)",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_named(folder, change, match):
    _edit_weights(folder, change)
    expect_load_refusal(folder, match)


def test_two_classifiers_that_were_never_trained_are_refused_as_one_is(tmp_path):
    _save(tmp_path / "hf", _build("DeiT"))
    config = tmp_path / "hf" / "config.json"
    content = json.loads(config.read_text())
    content["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    config.write_text(json.dumps(content))
    expect_load_refusal(tmp_path / "hf", "missing .*no trained classifier: give one")


def test_a_backbone_without_a_classifier_is_refused(tmp_path):
    _save(tmp_path / "hf", transformers.ViTModel(_build().config, add_pooling_layer=False))
    expect_load_refusal(tmp_path / "hf", "missing .*classifier.*no trained classifier")


def test_code_of_a_folder_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "evil",
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForImageClassification": "evil.Model",
        },
    }
    (folder / "config.json").write_text(json.dumps(content))
    expect_load_refusal(folder, "cannot load the model .* with transformers")


class _Code:
    def __reduce__(self):
        return (print, ("code of the file was run",))


def test_a_pickle_is_read_as_weights_only(tmp_path, folder, capsys):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert load(folder).labels.ids == tuple(LABELS)
    torch.save({**state, "more": _Code()}, folder / "pytorch_model.bin")
    expect_load_refusal(folder, "could run code that they contain.*get them as model.safetensors")
    assert "code of the file was run" not in capsys.readouterr().out


def test_a_model_of_another_task_is_refused(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "bert"}))
    expect_load_refusal(folder, "cannot load the model .* with transformers")


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_at_another_size_computes_what_the_library_does_there(tmp_path, capsys, family):
    module = _build(family, image_size=56)
    loaded = load(_save(tmp_path / "hf", module))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module(pixels), module(pixels).logits)
    assert loaded.preprocessing.image_size == loaded.weights.image_size == 32
    assert "positions brought from 56 to 32 pixels" in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vitcut.model.transformers_models", None)
    told = "cannot load the model .*missing or too old.*pip install --upgrade transformers"
    expect_load_refusal(folder, told, ConfigError)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_equal_and_transformers_reads_it(tmp_path, family):
    loaded = load(_save(tmp_path / "hf", _build(family)))
    save_tiny(loaded.module, tmp_path / "dense", TAKEN)
    again = load(tmp_path / "dense")
    assert again.weight_hash == loaded.weight_hash
    assert again.preprocessing == loaded.preprocessing == TAKEN
    assert again.labels.ids == TINY_LABELS.ids
    kind = getattr(transformers, f"{family}ForImageClassification")
    module, pixels = kind.from_pretrained(tmp_path / "dense"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(module(pixels).logits, loaded.module(pixels))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "dense")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert (tmp_path / "dense" / "README.md").read_text() == TINY_CARD


@pytest.mark.parametrize("framing", [Framing(fit="squash"), Framing(interpolation="lanczos")])
def test_every_framing_is_saved(tmp_path, folder, framing):
    loaded = load(folder)
    save_tiny(loaded.module, tmp_path / "dense", replace(TINY, framing=framing))
    assert load(tmp_path / "dense").preprocessing.framing == framing


def test_what_was_read_from_a_saved_folder_is_saved_again(tmp_path, folder):
    save_tiny(load(folder).module, tmp_path / "first", TAKEN)
    first = load(tmp_path / "first")
    save_tiny(first.module, tmp_path / "second", TAKEN)
    assert load(tmp_path / "second").weight_hash == first.weight_hash


def test_saved_weights_that_were_changed_are_refused_until_the_folder_no_longer_vouches(
    tmp_path, folder
):
    dense = tmp_path / "dense"
    save_tiny(load(folder).module, dense, TAKEN)
    _edit_weights(dense, lambda weights: weights["classifier.bias"].add_(1))
    expect_load_refusal(dense, r"is not the file that was saved.*on purpose, remove 'vitcut' from")
    content = json.loads((dense / "config.json").read_text())
    del content["vitcut"]
    (dense / "config.json").write_text(json.dumps(content))
    assert load(dense).labels.ids == TINY_LABELS.ids


def test_a_saved_folder_without_its_weights_is_refused(tmp_path, folder):
    dense = tmp_path / "dense"
    save_tiny(load(folder).module, dense, TAKEN)
    (dense / "model.safetensors").unlink()
    expect_load_refusal(dense, r"holds no model\.safetensors: copy the whole folder")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub of one repository; returns what was asked of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []
    cache = tmp_path / "cache"
    cache.mkdir()

    def download(repo_id, *, revision, filename):
        asked.append((repo_id, revision, filename))
        if repo_id != "someone/model":
            raise OSError(f"no repository {repo_id}\n\nsee the hub")
        return str(folder / filename)

    def snapshot(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, tuple(allow_patterns)))
        for item in folder.iterdir():
            if any(item.match(pattern) for pattern in allow_patterns):
                shutil.copy(item, cache)
        return str(cache)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    return asked


def test_a_repository_of_transformers_is_read_without_its_code_or_pickles(hub, folder):
    loaded = load("hf-hub:someone/model@main")
    assert loaded.weight_hash == load(folder).weight_hash
    assert loaded.name == "hf-hub:someone/model@main"
    assert [item[:2] for item in hub] == [("someone/model", "main")] * 2
    assert not any(name.endswith((".py", ".bin", "*")) for name in hub[1][2])


def test_a_repository_with_pickles_alone_is_asked_for_them(hub, folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    load("hf-hub:someone/model")
    assert [item[1] for item in hub] == [None] * 3
    assert "pytorch_model*.bin" in hub[2][2]


def test_a_repository_that_is_not_there_is_told_in_one_line(hub):
    expect_load_refusal("hf-hub:someone/else", "cannot load the model 'hf-hub:someone/else': no")


def test_a_repository_of_timm_is_bounded_by_its_weights(hub, folder):
    content = {"architecture": "test_vit", "model_args": {"depth": 10**9}}
    (folder / "config.json").write_text(json.dumps(content))
    expect_load_refusal("hf-hub:someone/model", "has depth 1e.09, which a model with")


def test_a_repository_of_timm_is_left_to_timm(hub, folder, monkeypatch):
    content = {"architecture": "test_vit", "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(content))
    asked = []

    def left(name, spec):
        asked.append((name, spec))
        raise ModelError("left to timm")

    monkeypatch.setattr(loading, "load_timm", left)
    expect_load_refusal("hf-hub:someone/model", "left to timm")
    assert asked == [("hf-hub:someone/model",) * 2]


def test_the_command_line_tells_a_fresh_classifier_in_one_line(folder, tmp_path, capsys):
    _edit_weights(folder, _without_classifier)
    words = ["discover", "--model", str(folder), "--source", "drawn", "--task", "drawn"]
    assert cli.main([*words, "--tau", "0.1", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no trained classifier" in told
