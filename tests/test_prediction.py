"""Answers about picture files: from torch and from .onnx files, good files and bad ones."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import vitcut
from vitcut import prediction
from vitcut.cli import main
from vitcut.compact.info import NOTE, ModelInfo
from vitcut.compiler.settings import CutSettings
from vitcut.deployment import for_use
from vitcut.errors import ConfigError, DataError, ModelError
from vitcut.images.load import normalise
from vitcut.prediction import OnnxFile, predict
from vitcut.preprocessing import Framing, Preprocessing
from vitcut.task import parse_task

NAMES = ["ant", "bee", "cat", "dog"]
PREPROCESSING = Preprocessing(
    image_size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), framing=Framing(crop_fraction=0.9)
)
INFO = ModelInfo(
    preprocessing=PREPROCESSING,
    class_names=tuple(NAMES),
    group_names=("insect", "pet"),
    group_of_class=(0, 0, 1, 1),
)

TASK = parse_task("groups: {insect: {ant: ant, bee: bee}, pet: {cat: cat}}", origin="test")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of coloured blocks that are neither square nor of the model's size."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 20)):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            for at in range(count):
                blocks = draw.integers(0, 256, (2, 3, 3), np.uint8).repeat(10, 0).repeat(10, 1)
                Image.fromarray(blocks).save(root / split / name / f"{at}.jpg")
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=4
    )
    with torch.no_grad():
        vit.head.weight.mul_(20)
    return vitcut.load_model(vit, mean=0.5, std=0.25, labels=NAMES)


def linear_onnx(path, *, batch="batch", scale=1.0, note=None, info=INFO):
    """An .onnx file whose logits are a linear map of the images."""
    side, classes = info.preprocessing.image_size, len(info.class_names)
    weight = np.random.default_rng(0).normal(0, scale, (3 * side * side, classes))
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    noted = json.dumps({"format_version": 1, **asdict(info)}) if note is None else note
    if noted:
        helper.set_model_props(made, {NOTE: noted})
    onnx.save(made, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return linear_onnx(tmp_path_factory.mktemp("onnx") / "linear.onnx")


def test_predictions_are_what_evaluate_answers(model, pictures):
    images = vitcut.load_images(pictures, model=model)
    found = vitcut.evaluate(model, images)
    answers = list(predict(model, pictures / "val", best=4))
    assert [item.path for item in answers] == sorted(
        str(path) for path in (pictures / "val").rglob("*.jpg")
    )
    given = np.array([[dict(item.groups)[name] for name in found.groups] for item in answers])
    assert np.allclose(given, found.log_probs.exp(), atol=1e-6)
    best = [found.groups[at] for at in found.log_probs.argmax(dim=1)]
    assert [item.group for item in answers] == best
    assert len(set(best)) > 1


def test_groups_sum_over_the_classes_of_a_task(model, pictures):
    [answer] = predict(model, pictures / "val" / "ant" / "0.jpg", task=TASK)
    sums = {"insect": 0.0, "pet": 0.0}
    for name, probability in answer.classes:
        sums["pet" if name == "cat" else "insect"] += probability
    assert dict(answer.groups) == pytest.approx(sums)
    assert answer.probability == max(sums.values())
    assert sum(sums.values()) == pytest.approx(1)


def test_an_onnx_file_is_normalised_as_torch_does_it(file, pictures):
    loaded = OnnxFile.load(file)
    draw = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)
    scaled = normalise(draw, PREPROCESSING)
    weight = numpy_helper.to_array(onnx.load(file).graph.initializer[0])
    expected = scaled.numpy().reshape(5, -1) @ weight
    assert np.allclose(loaded.run(draw), expected, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, "batch"])
def test_files_of_any_batch_size_give_the_same(batch, file, pictures, tmp_path):
    fixed = linear_onnx(tmp_path / "fixed.onnx", batch=batch)
    expected = list(predict(file, pictures / "val" / "ant"))
    given = list(predict(fixed, pictures / "val" / "ant"))
    assert [item.group for item in given] == [item.group for item in expected]
    assert [item.probability for item in given] == pytest.approx([i.probability for i in expected])
    assert len(given) == 20


def test_a_file_with_preprocessing_gets_whole_pictures(pictures, tmp_path):
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pictures"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float"], ["mean"], keepdims=0),
            helper.make_node("Shape", ["pictures"], ["shape"]),
            helper.make_node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["sizes", "one"], ["height"]),
            helper.make_node("Unsqueeze", ["mean", "zero"], ["means"]),
            helper.make_node("Concat", ["height", "means"], ["both"], axis=0),
            helper.make_node("Unsqueeze", ["both", "zero"], ["probabilities"]),
        ],
        "whole",
        [helper.make_tensor_value_info("pictures", TensorProto.UINT8, [1, "y", "x", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, 2])],
        [
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(np.array([0]), "zero"),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    noted = {"format_version": 1, **asdict(INFO), "with_preprocessing": True}
    helper.set_model_props(made, {NOTE: json.dumps(noted)})
    onnx.save(made, tmp_path / "whole.onnx")
    picture = pictures / "val" / "ant" / "0.jpg"
    [answer] = predict(tmp_path / "whole.onnx", picture)
    with Image.open(picture) as opened:
        mean = np.asarray(opened.convert("RGB")).mean()
    assert dict(answer.groups) == pytest.approx({"insect": 20, "pet": mean})
    assert answer.classes == ()


def test_an_onnx_file_needs_no_torch(file, pictures):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from vitcut.cli import main\n"
        f"code = main(['predict', {str(file)!r}, {str(pictures / 'val')!r}])\n"
        "heavy = {'timm', 'torchvision', 'onnx', 'pyarrow', 'transformers', 'accelerate'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "raise SystemExit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.split("\t") for line in ended.stdout.splitlines()]
    expected = list(predict(file, pictures / "val"))
    assert [(path, group) for path, group, *_ in lines] == [(i.path, i.group) for i in expected]
    assert len(lines) == 80


@pytest.fixture
def mixed(pictures, tmp_path):
    """A folder with bad files, files that are no pictures, and what is left out."""
    root = tmp_path / "mixed"
    (root / "deeper" / ".hidden").mkdir(parents=True)
    good = (pictures / "val" / "ant" / "0.jpg").read_bytes()
    for name in ("b.jpg", "a.picture", "deeper/c.jpg", "deeper/.hidden/x.jpg", ".y.jpg"):
        (root / name).write_bytes(good)
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("hello")
    (root / "notes.txt").write_text("hello")
    (root / "cut short.jpg").write_bytes(good[:400])
    Image.new("1", (20_000, 20_000)).save(root / "huge.png")
    os.mkfifo(root / "fifo.jpg")
    (root / "nothing.png").symlink_to("nowhere")
    return root


BAD = {
    "empty.jpg": "the file is empty",
    "text.jpg": "not an image of a known format",
    "cut short.jpg": "Truncated",
    "huge.png": "400000000 pixels",
    "fifo.jpg": "not a file, or a link to nothing",
    "nothing.png": "not a file, or a link to nothing",
}


def test_bad_files_are_told_and_do_not_stop_the_rest(file, mixed, capsys):
    assert main(["predict", str(file), str(mixed), str(mixed / "gone.jpg")]) == 2
    out, err = capsys.readouterr()
    read = [line.split("\t")[0] for line in out.splitlines()]
    assert read == [str(mixed / name) for name in ("a.picture", "b.jpg", "deeper/c.jpg")]
    *told, last = err.splitlines()
    assert len(told) == len(BAD) + 1
    for name, reason in {**BAD, "gone.jpg": "No such file or directory"}.items():
        [line] = [line for line in told if line.startswith(f"{mixed / name}: ")]
        assert reason in line
    assert last == "vitcut: error: 7 of 10 pictures could not be read: they are listed above"


def test_json_has_a_line_for_every_file(file, mixed, capsys):
    assert main(["predict", str(file), str(mixed), "--json", "--best", "1"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3 + len(BAD)
    answers = [line for line in lines if line["error"] is None]
    assert {line["group"] for line in answers} <= {"insect", "pet"}
    assert all(line["groups"] == [[line["group"], line["probability"]]] for line in answers)
    assert all(line["group"] is None for line in lines if line["error"] is not None)


def test_a_terminal_gets_a_table(file, pictures, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["predict", str(file), str(pictures / "val" / "ant" / "0.jpg")]) == 0
    out = capsys.readouterr().out
    assert "picture" in out
    assert "insect" in out
    assert "%" in out


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\0"])
def test_names_are_read_from_standard_input(ends, file, pictures, monkeypatch):
    names = [str(pictures / "val" / "ant" / f"{at}.jpg") for at in (3, 1)]
    stream = io.TextIOWrapper(io.BytesIO(ends.join([*names, ""]).encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert [item.path for item in predict(file, "-")] == names


def test_pictures_are_read_as_they_are_asked_for(file, pictures, monkeypatch):
    read, own = [], prediction._read
    monkeypatch.setattr(
        prediction,
        "_read",
        lambda path, *given, **more: read.append(path) or own(path, *given, **more),
    )
    many = [pictures / "val" / "ant" / "0.jpg"] * 1000
    answers = predict(file, many)
    next(answers)
    assert len(read) <= 2 * 64
    answers.close()
    assert len(read) <= 2 * 64


def test_nothing_named_is_refused(file, tmp_path, capsys):
    with pytest.raises(DataError, match="no pictures are named"):
        predict(file, [])
    [answer] = predict(file, tmp_path)
    assert answer.error == "no pictures in this folder"


def test_nan_is_never_an_answer(pictures, tmp_path):
    broken = linear_onnx(tmp_path / "nan.onnx", scale=np.inf)
    with pytest.raises(ModelError, match="gave NaN or infinity"):
        list(predict(broken, pictures / "val" / "ant"))


OTHERS = {
    "damaged": (b"\x08\x09 and then nothing", "cannot load"),
    "not ours": ("", "does not say which classes and preprocessing it has"),
    "newer": (
        json.dumps({"format_version": 2, **asdict(INFO)}),
        "metadata of version 2, expected 1",
    ),
    "no json": ("{", "damaged metadata"),
    "a list": ("[]", "damaged metadata"),
    "half": (json.dumps({"format_version": 1, "class_names": []}), "no 'preprocessing'"),
    "other types": (
        json.dumps({"format_version": 1, **asdict(INFO), "class_names": [1, 2]}),
        "damaged metadata",
    ),
    "groups that are not there": (
        json.dumps({"format_version": 1, **asdict(INFO), "group_of_class": [0, 0, 1, 2]}),
        "4 classes in 2 groups for 4 outputs",
    ),
    "other classes": (
        json.dumps({"format_version": 1, **asdict(INFO), "class_names": ["a", "b"]}),
        "2 classes in 2 groups for 4 outputs",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_onnx_file_of_something_else_is_refused_in_one_line(case, tmp_path, capsys):
    note, message = OTHERS[case]
    path = tmp_path / "other.onnx"
    path.write_bytes(note) if isinstance(note, bytes) else linear_onnx(path, note=note)
    assert main(["predict", str(path), "x.jpg"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.onnx", "x.jpg"], "gone.onnx"),
        (["FILE", "x.jpg", "--task", "animals"], "task is for a dense model"),
        (["FILE", "x.jpg", "--point", "x"], "point is not for an .onnx file"),
        (["FILE", "x.jpg", "--device", "cuda"], "device is not for an .onnx file"),
        (["FILE", "x.jpg", "--best", "0"], "best must be >= 1"),
        (["FILE"], "pictures"),
    ],
)
def test_words_that_do_not_fit_are_refused_in_one_line(words, message, file, capsys):
    words = [str(file) if word == "FILE" else word for word in words]
    assert main(["predict", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_cut_answers_with_its_own_groups(model, pictures, tmp_path):
    images = vitcut.load_images(pictures, task=TASK, model=model)
    settings = CutSettings(images=8, verify_images=4)
    cut = vitcut.cut(
        model,
        images,
        budget=vitcut.Budget(target_macs=0.6, score_images=8, rounds=1),
        settings=settings,
        bench=None,
        out=tmp_path / "cut",
    )
    found = vitcut.evaluate(cut, images)
    for loaded in (cut, cut.model, tmp_path / "cut", tmp_path / "cut" / "model"):
        answers = list(predict(loaded, [pictures / "val" / name for name in NAMES[:3]]))
        given = np.array([[dict(item.groups)[name] for name in found.groups] for item in answers])
        assert np.allclose(given, found.log_probs.exp(), atol=1e-6)
    with pytest.raises(ConfigError, match="which has its own"):
        predict(cut, pictures, task=TASK)


def test_the_shipped_model_has_the_groups_of_its_task():
    _, info = for_use(vitcut.load_model("animals"))
    assert len(info.group_names) == 6
    assert len(info.class_names) == len(info.group_of_class) == 58
