"""Data whose classes are whole groups of a model's classes: cat/ and dog/ for ImageNet's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_api import build_module
from torch import nn

import vitcut
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, TaskError
from vitcut.labels import Labels
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing
from vitcut.results import Results
from vitcut.task import load_task, parse_task
from vitcut.training.batches import Batch
from vitcut.training.distillation import Distillation
from vitcut.training.loop import GroupCrossEntropy
from vitcut.training.settings import FinetuneSettings
from vitcut.wordnet import imagenet_labels

TAKEN = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def _model(labels: Labels) -> Model:
    return Model.of(build_module(num_classes=len(labels.ids)), "mine", TAKEN, labels)


def _both(data) -> tuple:
    """The images of a drawn task by fine classes, and the same by groups; and a model of them."""
    groups = data.draw(st.lists(st.integers(0, 2), min_size=12, max_size=12).filter(_all_three))
    ids = load_task("drawn").class_ids
    members = {
        f"g{g}": [own for own, at in zip(ids, groups, strict=True) if at == g] for g in (2, 0, 1)
    }
    fine = parse_task(f"groups: {members}", origin="x.yaml")
    coarse = parse_task(f"groups: {members}\nfolders: {members}", origin="x.yaml")
    model = _model(Labels(owner="mine", ids=ids, names=ids))
    return model, *(vitcut.load_images("drawn", task=task, model=model) for task in (fine, coarse))


def _all_three(groups: list[int]) -> bool:
    return set(groups) == {0, 1, 2}


@settings(max_examples=8)
@given(data=st.data(), count=st.integers(1, 200), seed=st.integers(0, 5))
def test_images_by_group_are_chosen_split_and_evaluated_as_by_fine_class(data, count, seed):
    model, fine, coarse = _both(data)
    assert fine.fingerprint != coarse.fingerprint
    assert fine.task.class_ids == coarse.task.class_ids
    for name in ("train", "val", "test"):
        own, other = getattr(fine, name), getattr(coarse, name)
        assert own.rows.tolist() == other.rows.tolist()
        groups = fine.task.group_of_label[own.labels]
        assert groups.tolist() == coarse.task.group_of_label[other.labels].tolist()
    chosen = (images.calibration(count, seed=seed) for images in (fine, coarse))
    assert len({tuple(own.rows) for own in chosen}) == 1
    own, other = vitcut.evaluate(model, fine), vitcut.evaluate(model, coarse)
    assert own.accuracy_fine is not None
    assert (other.accuracy_fine, other.correct_fine) == (None, None)
    assert own.accuracy_coarse == other.accuracy_coarse
    assert own.confusion == other.confusion
    assert torch.equal(own.log_probs, other.log_probs)
    assert np.trace(other.confusion) == other.correct_coarse.sum()


def test_the_circuit_found_by_group_is_that_found_by_fine_class():
    ids = load_task("drawn").class_ids
    members = {"a": list(ids[::2]), "b": list(ids[1::2])}
    model = _model(Labels(owner="mine", ids=ids, names=ids))
    search = DiscoverSettings(images=24, tau=0.01)
    found = [
        vitcut.discover(model, vitcut.load_images("drawn", task=task, model=model), settings=search)
        for more in ("", f"folders: {members}")
        for task in [parse_task(f"groups: {members}\n{more}", origin="x.yaml")]
    ]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].provenance["kl"] == found[1].provenance["kl"]


def test_the_loss_of_a_group_is_minus_log_of_its_summed_probability():
    task = parse_task("groups: {b: [n1, n3], a: [n2]}\nfolders: {b: b, a: a}", origin="x.yaml")
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    groups = torch.stack([p[:, 0] + p[:, 2], p[:, 1]], dim=1)
    targets = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0.25, 0.75], [0, 1]])
    batch = Batch(inputs=torch.zeros(5, 3, 1, 1), targets=targets)
    wanted = -(targets * groups.log()).sum(1).mean()
    torch.testing.assert_close(GroupCrossEntropy(task)(batch, logits), wanted)
    alone = FinetuneSettings(coarse_weight=0, fine_weight=0, label_weight=1)
    loss = Distillation(nn.Linear(3, 3), task, alone)
    torch.testing.assert_close(loss(batch, logits), wanted)
    fine = Distillation(nn.Linear(3, 3), replace(task, folders={}), alone)
    assert loss.identity.replace(" of groups", "").split(",")[0] == fine.identity.split(",")[0]
    assert loss.identity != fine.identity


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two folders: dark cats and bright dogs; and a third that is of no group."""
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for name, low in (("Cat", 0), ("dog", 120), ("gadget", 60)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(30):
            pixels = draw.integers(low, low + 130, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def imagenet(tmp_path):
    model = _model(imagenet_labels())
    model.save(tmp_path / "imagenet")
    return tmp_path / "imagenet"


BENCH = ("--runtimes", "torch", "--batches", "1", "--seconds", "0.02")
TRAIN = (
    *("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16", "--augmentation", "light"),
    *("--precision", "float32", "--device", "cpu"),
)


def test_every_command_takes_a_task_that_suggest_proposed(photos, imagenet, tmp_path, capsys):
    labels, source = tmp_path / "pets.yaml", ["--source", str(photos)]
    model = ["--model", str(imagenet)]
    assert main(["suggest", *source, *model, "--out", str(labels)]) == 0
    told = capsys.readouterr().out
    assert "Cat: 5 classes (tabby, tiger cat, Persian cat, ...)\n" in told
    assert "dog: 118 classes (Chihuahua, Japanese spaniel, Maltese dog, ...)\n" in told
    text = labels.read_text()
    assert "# Cat: n02121808 (domestic cat), 5 classes: tabby, " in text
    assert "; or n02127808 (big cat), 6 classes: leopard, " in text
    assert load_task(labels).excluded == {"gadget": "no name in WordNet"}

    task, cut, fine = ["--task", str(labels)], tmp_path / "cut", tmp_path / "fine"
    typed = ["cut", *model, *source, *task, "--target-macs", "0.7", "--rounds", "1"]
    typed += ["--images", "24", "--score-images", "8", *BENCH, "--out", str(cut)]
    assert main(typed) == 0
    said = capsys.readouterr().err
    assert said.count("made of the model's classes: Cat: 5 classes (tabby, tiger cat, ") == 1
    assert said.count("; dog: 118 classes (Chihuahua, Japanese spaniel, Maltese dog, ...)\n") == 1
    assert "left out 1 of 3 classes" in said
    assert main(typed) == 0
    assert main(["finetune", str(cut), *TRAIN, *BENCH, "--out", str(fine)]) == 0
    assert main(["bench", str(fine), *BENCH, "--out", str(tmp_path / "bench")]) == 0
    typed_acdc = ["discover", *model, *source, *task, "--images", "8", "--tau", "1"]
    assert main([*typed_acdc, "--out", str(tmp_path / "acdc")]) == 0
    for run in (cut, fine, tmp_path / "bench"):
        for point in Results.load(run / "results.json").all_points():
            assert point.accuracy_fine is None
            assert point.accuracy_coarse is not None
            assert np.sum(point.confusion, axis=1).tolist() == [3, 3]
    assert "- Cat (5): tabby" in (cut / "model" / "README.md").read_text()
    assert "- dog (118): Chihuahua" in (fine / "model" / "README.md").read_text()

    compact = CompactViT.from_pretrained(fine / "model")
    assert len(compact.info.class_names) == len(compact.info.group_of_class) == 123
    assert compact.info.group_names == ("Cat", "dog")
    assert np.bincount(compact.info.group_of_class).tolist() == [5, 118]
    again = vitcut.load_images(model=vitcut.load_model(cut))
    assert again.task.folders == {"Cat": ("Cat",), "dog": ("dog",)}
    assert vitcut.evaluate(compact, again).accuracy_fine is None
    # ImageNet's classes are known without a model too.
    alone = vitcut.load_images(photos, task=labels, image_size=16)
    assert (alone.task, alone.fingerprint) == (again.task, again.fingerprint)
    # The run directory is of this task: the same groups of fewer classes are another.
    labels.write_text("groups: {Cat: [tabby], dog: domestic dog}")
    assert main(typed) == 2
    with pytest.raises(ArtefactError):
        vitcut.cut(
            vitcut.load_model(imagenet),
            vitcut.load_images(photos, task=labels, model=vitcut.load_model(imagenet)),
            budget=vitcut.Budget(target_macs=0.7),
            out=cut,
        )


@pytest.mark.parametrize("name", ["WordNet ids", "texts", "nothing"])
def test_imagenets_classes_are_found_however_a_model_names_them(photos, name):
    labels = imagenet_labels()
    if name == "texts":
        labels = Labels(owner="mine", ids=labels.names, names=labels.names)
    model = _model(labels)
    model = replace(model, labels=None) if name == "nothing" else model
    images = vitcut.load_images(photos, task="cats-dogs", model=model)
    assert images.task.folders == {"cat": ("Cat",), "dog": ("dog",)}
    fitted = model.for_task(images.task, images.labels)
    ids = list(imagenet_labels().ids)
    rows = [ids.index(own) for own in images.task.class_ids]
    torch.testing.assert_close(fitted.module.head.weight, model.module.head.weight[rows])


def test_positions_of_a_model_that_names_nothing_make_groups_too(photos):
    model = replace(_model(Labels(owner="x", ids=("?",) * 30, names=("?",) * 30)), labels=None)
    task = parse_task("groups: {cat: ['3', '11'], dog: '20'}", origin="x.yaml")
    images = vitcut.load_images(photos, task=task, model=model)
    fitted = model.for_task(images.task, images.labels)
    torch.testing.assert_close(fitted.module.head.weight, model.module.head.weight[[11, 20, 3]])


def test_without_a_task_the_error_says_how_to_get_one(photos, imagenet, tmp_path, capsys):
    typed = ["cut", "--model", str(imagenet), "--source", str(photos), "--target-macs", "0.7"]
    assert main([*typed, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "3 of the data's 3 classes are none of model" in line
    assert line.endswith(f"vitcut suggest --source {photos} --model {imagenet} --out labels.yaml")
    assert not (tmp_path / "out").exists()


def test_a_new_model_is_not_trained_on_images_that_show_only_groups(photos, tmp_path, capsys):
    typed = ["train", "--source", str(photos), "--image-size", "16"]
    assert main([*typed, "--task", "cats-dogs", "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "labelled with the 123 classes of task 'cats-dogs'" in line
    assert "'classes: [Cat, dog]'" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(TaskError, match="labelled with the 123 classes"):
        vitcut.run(
            "demo", changes={"task": "cats-dogs", "data.source": str(photos)}, out=tmp_path / "o"
        )
