"""Models with more logits than a task has classes, or with logits that nobody named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_api import build_module
from torch import nn

import vitcut
from vitcut.benchmark.settings import BenchSettings
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ConfigError, DataError, ModelError, TaskError
from vitcut.images.load import normalise
from vitcut.labels import Labels
from vitcut.model.model import Model
from vitcut.model.tracing import read_model
from vitcut.model.weights import map_tensors
from vitcut.preprocessing import Preprocessing
from vitcut.results import Results
from vitcut.task import parse_task
from vitcut.training.settings import FinetuneSettings
from vitcut.wordnet import imagenet_names

DRAWN = (
    "crescent", "disc", "grid", "necklace", "ring", "scatter", "square", "star", "stripes",
    "target", "triangle", "zigzag",
)  # fmt: skip
SHUFFLED = ("zigzag", "unicorn", *DRAWN[:11], "hippogriff")
PAIR = "groups: {round: [Ring], pointed: [star, TRIANGLE]}"


def _model(ids, *, names=None, count=None) -> Model:
    taken = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    labels = Labels(owner="model 'mine'", ids=ids, names=names or ids)
    return Model.of(build_module(num_classes=count or len(ids)), "mine", taken, labels)


def _tensors(weights) -> list[list]:
    found = []
    map_tensors(weights, lambda tensor: found.append(tensor.tolist()) or tensor)
    return found


def _nameless(count) -> Model:
    return replace(_model(("?",) * count), labels=None)


def _images(text, model=None):
    task = parse_task(text, origin="labels.yaml")
    size = None if model else 16
    return vitcut.load_images("drawn", task=task, model=model, image_size=size)


def _fitted(model, images) -> Model:
    return model.for_task(images.task, images.labels)


FINETUNE = FinetuneSettings(
    epochs=1,
    warmup_epochs=0,
    batch_size=32,
    augmentation="none",
    precision="float32",
    device="cpu",
)


@pytest.fixture(scope="module")
def shuffled() -> Model:
    return _model(SHUFFLED)


@pytest.mark.parametrize(
    "text",
    [PAIR, f"{PAIR}\nrest: other", "groups: {a: ['0', star], b: ['12']}", "one: disc",
     "classes: [disc, ring]\nrest: other\nexcluded: {star: odd}"],
)  # fmt: skip
def test_the_model_of_a_task_gives_the_models_logits_of_its_classes(shuffled, text):
    images = _images(text, shuffled)
    before = {key: value.clone() for key, value in shuffled.module.state_dict().items()}
    model = _fitted(shuffled, images)
    pixels = normalise(images.test.read(np.arange(8)), model.preprocessing)
    with torch.no_grad():
        full, own = shuffled.module(pixels), model.module(pixels)
    columns = [SHUFFLED.index(class_id) for class_id in images.task.class_ids]
    torch.testing.assert_close(own, full[:, columns])
    assert model.weights.num_classes == len(images.task.group_of_class) == len(columns)
    assert _tensors(model.weights) == _tensors(read_model(model.module))
    assert model.labels.ids == images.task.class_ids
    assert model.weight_hash == shuffled.weight_hash
    assert _fitted(model, images) is model
    after = shuffled.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_positions_and_names_are_the_models_where_it_is_given(shuffled):
    text = "groups: {a: ['0'], b: ['3']}"
    assert _images(text, shuffled).task.class_ids == ("disc", "zigzag")
    assert _images(text).task.class_ids == ("crescent", "necklace")
    named = _model(DRAWN, names=tuple(f"{name}, picture of a {name}" for name in DRAWN))
    task = _images("groups: {a: [Picture of a ring], b: [star]}", named).task
    assert task.class_names == ("ring, picture of a ring", "star, picture of a star")
    with pytest.raises(TaskError, match="names 1 classes that the data lacks: Picture of a ring"):
        _images("groups: {a: [Picture of a ring], b: [star]}")


def test_accuracy_is_that_of_the_logits_that_stay(shuffled):
    images = _images(PAIR, shuffled)
    found = vitcut.evaluate(shuffled, images)
    columns = [SHUFFLED.index(class_id) for class_id in images.task.class_ids]
    with torch.no_grad():
        pixels = normalise(images.test.all(), shuffled.preprocessing)
        probabilities = shuffled.module(pixels)[:, columns].double().softmax(1)
    ring, pointed = probabilities[:, 0], probabilities[:, 1:].sum(1)
    torch.testing.assert_close(found.log_probs.exp(), torch.stack([ring, pointed], 1))
    best = probabilities.argmax(1).numpy() == images.test.labels
    assert found.accuracy_fine == best.mean()


@pytest.mark.parametrize("text", [PAIR, f"{PAIR}\nrest: other"])
def test_a_cut_for_some_of_the_classes_computes_the_masked_model(shuffled, text, tmp_path):
    images = _images(text, shuffled)
    budget = vitcut.Budget(target_macs=0.6, rounds=1, score_images=12)
    settings = CutSettings(images=24)
    cut = vitcut.cut(shuffled, images, budget=budget, settings=settings, bench=None)
    assert cut.exactness.max_abs_diff <= cut.exactness.tolerance
    assert cut.model.info.class_names == images.task.class_names
    assert cut.model.info.group_of_class == tuple(images.task.group_of_class.tolist())
    assert cut.model.plan.shape.num_classes == len(images.task.classes)
    cut.model.save_pretrained(tmp_path / "cut")
    again = CompactViT.from_pretrained(tmp_path / "cut")
    vitcut.finetune(again, shuffled, images, settings=FINETUNE, repair_dense=False, bench=None)


def test_a_rest_is_of_classes_that_the_model_knows_and_the_data_may_lack(shuffled, capsys):
    images = _images("groups: {a: [ring, star, disc]}\nrest: b", shuffled)
    assert set(images.task.class_ids) == set(SHUFFLED)
    assert "unicorn" in images.task.class_ids
    assert "left out" not in capsys.readouterr().err
    narrow = _model(("ring", "star", "unicorn"))
    with pytest.raises(DataError, match="has no train images of the rest, group 'b'"):
        _images("groups: {a: [ring, star]}\nrest: b", narrow)
    with pytest.raises(TaskError, match=r"names 1 classes that the data lacks: unicorn"):
        _images("groups: {a: [ring], b: [unicorn]}", narrow)
    _images("groups: {a: [ring], b: [star]}", narrow)
    assert "left out 10 of 12 classes" in capsys.readouterr().err


def test_a_class_that_the_model_lacks_is_refused(shuffled):
    with pytest.raises(TaskError, match=r"names 1 classes that model 'mine' lacks: centaur"):
        _images("classes: [ring, centaur]", shuffled)
    with pytest.raises(TaskError, match=r"lacks: zigzag; .* such as ring, star, .*: name them"):
        vitcut.evaluate(_model(("ring", "star", "wolf")), _images("classes: [ring, zigzag]"))
    with pytest.raises(ModelError, match="names 14 classes and gives 3 logits: expected as many"):
        _fitted(_model(SHUFFLED, count=3), _images("classes: [ring, disc]"))


@pytest.mark.parametrize(
    ("count", "text", "told", "rows"),
    [
        (12, PAIR, "12 logits are taken as the data's classes, in the order", [4, 7, 10]),
        (12, "groups: {a: ['4'], b: ['7']}", "taken as the data's classes", [4, 7]),
        (3, "classes: [disc, ring, star]", "3 logits are taken as the task's classes", [0, 1, 2]),
    ],
)
def test_what_unnamed_logits_mean_is_told_by_their_number(count, text, told, rows, capsys):
    model = _nameless(count)
    images = _images(text, model)
    fitted = _fitted(model, images)
    assert told in capsys.readouterr().err
    torch.testing.assert_close(fitted.module.head.weight, model.module.head.weight[rows])


def _folders(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for shade in range(12):
            Image.new("L", (8, 8), shade).save(tmp_path / name / f"{shade}.png")
    return str(tmp_path)


def test_folders_that_are_called_by_position_need_no_names(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    source = _folders(tmp_path / "images", ["3", "11", "20"])
    model = _nameless(30)
    task = parse_task("groups: {a: ['3'], b: ['11']}", origin="x.yaml")
    images = vitcut.load_images(source, task=task, model=model)
    fitted = _fitted(model, images)
    torch.testing.assert_close(fitted.module.head.weight, model.module.head.weight[[11, 3]])


def test_a_thousand_unnamed_logits_are_imagenets_where_the_data_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    source = _folders(tmp_path / "images", ["n02123045", "n02099601", "n01440764", "n99999999"])
    model = _nameless(1000)
    task = parse_task("classes: [tabby, Golden_Retriever]", origin="x.yaml")
    images = vitcut.load_images(source, task=task, model=model)
    fitted = _fitted(model, images)
    assert "1000 logits are taken as ImageNet-1k's classes" in capsys.readouterr().err
    positions = [list(imagenet_names()).index(key) for key in ("n02099601", "n02123045")]
    assert positions == [207, 281]
    torch.testing.assert_close(fitted.module.head.weight, model.module.head.weight[positions])


def test_unnamed_logits_that_fit_nothing_are_refused():
    match = "does not say what its classes are: it has 5 classes, task 'labels' has 3, the data 12"
    with pytest.raises(TaskError, match=match):
        _images(PAIR, _nameless(5))
    with pytest.raises(TaskError, match=match):
        vitcut.discover(_nameless(5), _images(PAIR))
    with pytest.raises(TaskError, match=r"by position, 0 to 4; or train it for the data.s classes"):
        _images(PAIR, _nameless(5))
    with pytest.raises(TaskError, match=r"by position, 0 to 999, or by ImageNet's WordNet ids; or"):
        _images(PAIR, _nameless(1000))


def test_images_of_another_size_than_the_models_are_refused(shuffled):
    with pytest.raises(ConfigError, match="takes images of 16 pixels, got image_size=32"):
        vitcut.load_images("drawn", task="drawn", model=shuffled, image_size=32)


TRAIN = (
    *("--source", "drawn", "--image-size", "16", "--patch-size", "8", "--width", "16"),
    *("--depth", "1", "--num-heads", "2", "--epochs", "1", "--warmup-epochs", "0"),
    *("--batch-size", "64", "--augmentation", "none", "--precision", "float32", "--device", "cpu"),
    *("--compile", "false"),
)


def test_positions_in_a_label_file_mean_the_data_that_a_model_was_trained_on(tmp_path):
    labels = tmp_path / "labels.yaml"
    labels.write_text("groups: {a: ['7', '4'], b: ['1']}")
    assert main(["train", *TRAIN, "--task", str(labels), "--out", str(tmp_path / "run")]) == 0
    model = vitcut.load_model(tmp_path / "run")
    images = vitcut.load_images(model=model)
    assert images.task.class_ids == ("disc", "ring", "star")
    assert _fitted(model, images).module.num_classes == 3


def test_the_dense_model_given_the_same_repair_has_the_tasks_classes(finished, tmp_path, capsys):
    labels, cut, fine = tmp_path / "pair.yaml", tmp_path / "cut", tmp_path / "fine"
    labels.write_text("classes: [Disc, grid]")
    model = vitcut.load_model(finished)
    images = vitcut.load_images(task=labels, model=model)
    circuit = finished / "points" / "acdc-resample-0.001" / "circuit.json"
    bench = BenchSettings(
        runtimes=("torch",), batches=(1,), seconds=0.05, min_rounds=3, min_sample_ms=0.1
    )
    settings = CutSettings(images=24, verify_images=8)
    made = vitcut.cut(model, images, circuit, settings=settings, bench=bench, out=cut)
    assert "keeps 2 of its 4 logits, those of task 'pair'" in capsys.readouterr().err
    vitcut.finetune(made, model, images, settings=FINETUNE, bench=bench, out=fine)
    dense = vitcut.load_model(fine / "dense-repaired" / "dense")
    assert dense.labels.ids == ("disc", "grid")
    assert isinstance(dense.module.head, nn.Linear)
    assert dense.module.head.out_features == dense.module.num_classes == 2
    results = Results.load(fine / "results.json")
    assert results.dense.params == sum(item.numel() for item in dense.module.parameters())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("classes: [disc, unicorn]", "names 1 classes that model"),
        ("one: disc\nrest: ignore", "needs at least 2 groups"),
        ("groups: {a: [disc]}\nrests: b", "did you mean 'rest'"),
    ],
)
def test_the_command_line_tells_it_in_one_line(finished, tmp_path, capsys, text, match):
    labels = tmp_path / "labels.yaml"
    labels.write_text(text)
    typed = ["discover", "--model", str(finished), "--task", str(labels), "--tau", "0.1"]
    assert main([*typed, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line
    assert not (tmp_path / "out").exists()


def test_a_task_of_positions_is_the_same_data_whoever_loads_it():
    images = _images("groups: {a: ['0'], b: ['1']}", _model(DRAWN))
    assert images.fingerprint == _images("groups: {a: [crescent], b: [disc]}").fingerprint


def test_without_a_task_every_class_is_its_own_group(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    source = _folders(tmp_path / "images", ["owl", "cat", "dog"])
    images = vitcut.load_images(source, image_size=8)
    assert (images.task.name, images.task.groups) == ("all", ("cat", "dog", "owl"))
    assert vitcut.load_images("drawn", image_size=8).task.name == "drawn"
