"""New classes for pretrained models: of every library, by both ways."""

import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from test_api import build_module
from torchvision.models.vision_transformer import VisionTransformer

import vitcut
from vitcut.errors import ArtefactError, ConfigError
from vitcut.images.load import normalise
from vitcut.model.model import weight_hash
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.task import parse_task
from vitcut.training import transfer as transfers
from vitcut.training.checkpoint import TrainingFolder
from vitcut.training.loop import create_optimizer
from vitcut.training.settings import TrainSettings, TransferSettings
from vitcut.training.transfer import FEATURES_FILE, fit_probe

PROBE = TransferSettings(freeze="backbone")
ON_CPU = TrainSettings(device="cpu", precision="float32")
SHORT = TrainSettings(
    epochs=2,
    warmup_epochs=0,
    batch_size=32,
    augmentation="none",
    learning_rate=1e-2,
    precision="float32",
    device="cpu",
)
TASK = parse_task("groups: {round: [ring, disc], pointed: [star]}", origin="labels.yaml")


def _hf(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    wide = {"mlp_ratio": 2} if family == "Dinov2" else {"intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_labels=7, **wide,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForImageClassification")(config)


def _distilled():
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=7,
    )  # fmt: skip


def _torchvision():
    torch.manual_seed(0)
    vit = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=7)
    # torchvision starts from a classifier of zeros, which nothing tells apart.
    torch.nn.init.normal_(vit.heads.head.weight)
    return vit


MODULES = {
    "timm": lambda: build_module(7),
    "timm, two classifiers": _distilled,
    "torchvision": _torchvision,
    "transformers": lambda: _hf("ViT"),
    "transformers, two parts read": lambda: _hf("Dinov2"),
}


def _load(module):
    return vitcut.load_model(module, mean=0.5, std=0.25)


def _images(model):
    return vitcut.load_images("drawn", task=TASK, model=model, new_head=True)


@pytest.fixture(scope="module")
def pretrained():
    return _load(build_module(7))


@pytest.fixture(scope="module")
def images(pretrained):
    return _images(pretrained)


@pytest.mark.parametrize("kind", MODULES)
def test_a_probe_changes_the_classifier_alone_and_counts_what_the_model_answers(kind, tmp_path):
    model = _load(MODULES[kind]())
    before, images = weight_hash(model.module), _images(model)
    made, probe = fit_probe(model, images, ON_CPU, tmp_path)
    assert weight_hash(model.module) == before
    old, new = model.module.state_dict(), made.module.state_dict()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed
    assert all("head" in key or "classifier" in key for key in changed)
    pixels = normalise(images.val.all(), model.preprocessing)
    with torch.no_grad():
        right = made.module(pixels).argmax(1).numpy() == images.val.labels
    assert right.mean() == pytest.approx(probe.accuracy_fine)
    assert probe.accuracy_fine > 1 / 3
    assert made.labels.ids == TASK.class_ids


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_what_was_trained_is_loaded_from_its_run_and_goes_on(kind, freeze, tmp_path):
    model = _load(MODULES[kind]())
    settings = replace(SHORT, epochs=1) if freeze == "none" else ON_CPU
    made = vitcut.train(
        _images(model),
        model=model,
        transfer=TransferSettings(freeze=freeze),
        settings=settings,
        out=tmp_path / "run",
    )
    again = vitcut.load_model(tmp_path / "run")
    assert weight_hash(again.module) == weight_hash(made.module)
    assert "test images" in (tmp_path / "run" / "dense" / "README.md").read_text()
    own = vitcut.load_images("drawn", task=TASK, model=again)
    assert vitcut.evaluate(again, own).images == len(own.test)


def test_the_optimum_does_not_depend_on_the_scale_of_the_features(pretrained, images, tmp_path):
    """Features are standardised: a backbone whose features are 1000 times larger fits as well."""
    module = build_module(7)
    with torch.no_grad():
        module.norm.weight.mul_(1000)
        module.norm.bias.mul_(1000)
    _, small = fit_probe(pretrained, images, ON_CPU, tmp_path / "small")
    _, large = fit_probe(_load(module), images, ON_CPU, tmp_path / "large")
    assert large.penalty == small.penalty
    assert large.accuracy_fine == pytest.approx(small.accuracy_fine, abs=0.05)


def test_a_killed_probe_does_not_compute_features_twice(pretrained, images, tmp_path, monkeypatch):
    whole = fit_probe(pretrained, images, ON_CPU, tmp_path / "whole")[0]
    with monkeypatch.context() as patched:
        patched.setattr(transfers, "_fit", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            fit_probe(pretrained, images, ON_CPU, tmp_path / "killed")
    monkeypatch.setattr(transfers, "normalise", lambda *_, **__: pytest.fail("computed again"))
    again = fit_probe(pretrained, images, ON_CPU, tmp_path / "killed")[0]
    assert weight_hash(again.module) == weight_hash(whole.module)


def test_features_of_another_model_are_refused(pretrained, images, tmp_path):
    fit_probe(pretrained, images, ON_CPU, tmp_path)
    assert (tmp_path / FEATURES_FILE).exists()
    with pytest.raises(ArtefactError, match="features of another model, other images"):
        fit_probe(_load(build_module(7, std=0.2)), images, ON_CPU, tmp_path)


def test_fine_tuning_trains_every_layer_and_leaves_the_model_alone(pretrained, images, tmp_path):
    before = weight_hash(pretrained.module)
    made = vitcut.train(images, model=pretrained, settings=SHORT, out=tmp_path / "run")
    assert weight_hash(pretrained.module) == before
    old, new = pretrained.module.state_dict(), made.module.state_dict()
    assert [key for key in old if torch.equal(old[key], new[key])] == []


def test_a_killed_fine_tuning_ends_with_the_same_bits(pretrained, images, tmp_path, monkeypatch):
    whole = vitcut.train(images, model=pretrained, settings=SHORT, out=tmp_path / "whole")

    def dying(folder, row, **given):
        save(folder, row, **given)
        if row.epoch == 1:
            sys.exit("killed")

    save = TrainingFolder.save_epoch
    with monkeypatch.context() as patched:
        patched.setattr(TrainingFolder, "save_epoch", dying)
        with pytest.raises(SystemExit):
            vitcut.train(images, model=pretrained, settings=SHORT, out=tmp_path / "killed")
    again = vitcut.train(images, model=pretrained, settings=SHORT, out=tmp_path / "killed")
    assert weight_hash(again.module) == weight_hash(whole.module)


def test_layers_nearer_to_the_image_learn_more_slowly():
    vit = build_reference(VitSettings(width=16, depth=2, num_heads=2), num_classes=3, image_size=16)
    optimizer, schedule = create_optimizer(vit, SHORT, 10, layer_decay=0.5)
    schedule.step_update(0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = [
        rate[id(part)]
        for part in (
            vit.patch_embed.proj.weight,
            vit.blocks[0].mlp.fc1.weight,
            vit.blocks[1].mlp.fc1.weight,
            vit.head.weight,
        )
    ]
    np.testing.assert_allclose(found[3], SHORT.learning_rate)
    assert all(one < two for one, two in pairwise(found))


def test_by_default_the_shipped_recipe_is_used(pretrained, images, monkeypatch):
    def taken(*arguments, **_):
        raise LookupError(*arguments)

    monkeypatch.setattr("vitcut.training.transfer.fine_tune", taken)
    with pytest.raises(LookupError) as caught:
        vitcut.train(images, model=pretrained)
    _, _, settings, transfer, _ = caught.value.args
    assert (settings.epochs, settings.cutmix_fraction, transfer.layer_decay) == (8, 0, 0.75)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"transfer": PROBE}, "freeze is for a pretrained model"),
        ({"transfer": TransferSettings(layer_decay=0.5)}, "layer_decay is for a pretrained model"),
        ({"model": True, "vit": VitSettings(width=16)}, "width is for a new model"),
        ({"model": True, "transfer": PROBE, "settings": SHORT}, "epochs is for training all"),
        (
            {"model": True, "transfer": TransferSettings(freeze="backbone", layer_decay=0.5)},
            "layer_decay is for training all weights",
        ),
        ({"model": True, "transfer": PROBE, "vit": VitSettings(depth=2)}, "depth is for training"),
    ],
)
def test_settings_of_another_kind_of_training_are_refused(pretrained, images, given, message):
    model = {"model": pretrained} if "model" in given else {}
    with pytest.raises(ConfigError, match=message):
        vitcut.train(images, **{**given, **model})


@pytest.mark.parametrize("decay", [0, 1.5, float("nan")])
def test_a_layer_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigError, match="layer_decay must be > 0 and <= 1, got"):
        TransferSettings(layer_decay=decay)


def test_images_for_a_new_head_take_the_models_size_and_the_datas_classes(tmp_path):
    model = _load(build_module(7))
    trained = vitcut.train(
        _images(model), model=model, transfer=PROBE, settings=ON_CPU, out=tmp_path / "run"
    )
    everything = vitcut.load_images("drawn", model=trained, new_head=True)
    assert (len(everything.task.classes), everything.preprocessing.image_size) == (12, 16)
    # Without a source, images and task are the run's.
    assert vitcut.load_images(model=trained, new_head=True).task.class_ids == TASK.class_ids
