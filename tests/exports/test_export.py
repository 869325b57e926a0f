import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fresh
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from strategies import parts_per_kind
from timm.models.vision_transformer import VisionTransformer
from tiny import random_fill, random_vit

import vitcut
from vitcut.compact.info import ModelInfo
from vitcut.compiler.emit import compile_circuit
from vitcut.delivery import check_export
from vitcut.errors import ArtefactError, ConfigError, ExactnessError, ModelError
from vitcut.exports.pictures import PictureModel
from vitcut.exports.settings import ExportSettings
from vitcut.images.decoding import decode
from vitcut.preprocessing import Framing, Preprocessing

pytestmark = [pytest.mark.graph, pytest.mark.filterwarnings("ignore")]
SIZE = 8
NAMES = ("cat", "grey cat", "dog", "<b>dog</b>")


def need(package):
    """Skip where a target's package is missing, but fail in CI, which must have it."""
    if importlib.util.find_spec(package) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{package} is missing")


@pytest.fixture(scope="module")
def model():
    weights = random_vit(num_heads=3, width=16, hidden=9, patch_size=4).to(torch.float32)
    circuit = parts_per_kind(weights)
    compact = compile_circuit(weights, circuit, random_fill(weights, circuit))
    compact.info = ModelInfo(
        preprocessing=Preprocessing(image_size=SIZE, framing=Framing(crop_fraction=0.8)),
        class_names=NAMES,
        group_names=("cats", "dogs"),
        group_of_class=(0, 0, 1, 1),
        source_model="tiny",
    )
    return compact


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((210, 150))


def groups_of(model, picture):
    """The probabilities of a picture's groups, in torch with Pillow's preprocessing."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    taken = model.info.preprocessing
    pixels = decode(file.getvalue(), SIZE, taken.framing).pixels
    with torch.inference_mode():
        images = vitcut.images.load.normalise(pixels[None], taken)
        return model.eval()(images).softmax(-1)[0].reshape(2, 2).sum(1).numpy()


@pytest.mark.parametrize("batch", ["dynamic", 1, 3])
@pytest.mark.parametrize("target", ["onnx", "openvino", "pt2"])
def test_a_target_gives_torch_logits_and_says_so(model, target, batch, tmp_path):
    need({"onnx": "onnxruntime", "openvino": "openvino", "pt2": "torch"}[target])
    (made,) = vitcut.export(model, settings=ExportSettings(to=(target,), batch=batch), out=tmp_path)
    about = json.loads((tmp_path / target / "export.json").read_text())
    assert about == json.loads(json.dumps(made.about))
    assert about["parity"]["labels_equal"] == about["parity"]["images"] == 32
    assert about["parity"]["max_abs_diff"] < 1e-4
    assert (about["parity_on"], about["batch"]) == ("random images", batch)
    assert (tmp_path / target / "labels.txt").read_text().splitlines() == list(NAMES)
    assert about["bytes"] == sum(file["bytes"] for file in about["files"].values())
    assert list(tmp_path.iterdir()) == [tmp_path / target]
    assert len(repr(made)) < 250


@pytest.mark.parametrize(
    ("target", "given"),
    [("onnx", {}), ("onnx", {"with_preprocessing": True}), ("openvino", {}), ("pt2", {})],
)
def test_the_program_in_the_readme_runs_as_it_stands(model, target, given, picture, tmp_path):
    need("openvino")
    vitcut.export(model, settings=ExportSettings(to=(target,), **given), out=tmp_path)
    folder = tmp_path / target
    picture.save(folder / "picture.jpg", quality=100)
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    with Image.open(folder / "picture.jpg") as stored:
        expected = groups_of(model, stored.convert("RGB"))
    best = int(expected.argmax())
    first = done.stdout.splitlines()[0]
    assert first.endswith(("cats", "dogs")[best])
    assert abs(float(first.partition("%")[0]) / 100 - expected[best]) < 0.02


def test_the_default_file_is_for_old_runtimes_and_says_what_it_is(model, tmp_path):
    vitcut.export(model, out=tmp_path)
    file = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert (file.opset_import[0].version, file.ir_version) == (20, 9)
    (noted,) = file.metadata_props
    told = json.loads(noted.value)
    assert (noted.key, told["format_version"]) == ("vitcut", 1)
    assert (told["class_names"], told["group_of_class"]) == (list(NAMES), [0, 0, 1, 1])
    assert told["preprocessing"]["image_size"] == SIZE
    # 1.17 ends the process where a norm before an attention has no bias.
    norms = [node for node in file.graph.node if node.op_type == "LayerNormalization"]
    assert norms
    assert all(len(node.input) == 3 for node in norms)
    assert str(Path(vitcut.__file__).parent) not in str(file)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_opset_is_what_was_asked_for(model, opset, tmp_path):
    vitcut.export(model, settings=ExportSettings(opset=opset), out=tmp_path)
    assert onnx.load(tmp_path / "onnx" / "model.onnx").opset_import[0].version == opset


def test_pictures_of_any_size_go_in_where_preprocessing_is_inside(model, picture, tmp_path):
    vitcut.export(model, settings=ExportSettings(with_preprocessing=True), out=tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for size in [(210, 150), (30, 90), (8, 8), (5, 5)]:
        shown = picture.resize(size)
        (got,) = session.run(["probabilities"], {"pictures": np.asarray(shown)[None]})
        assert np.allclose(got[0], groups_of(model, shown), atol=0.02)


@pytest.mark.parametrize("filter_name", ["box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize(("fit", "channels"), [("crop", 3), ("squash", 1)])
def test_pictures_are_scaled_as_pillow_does(fit, channels, filter_name, picture):
    framing = Framing(fit=fit, channels=channels, interpolation=filter_name, crop_fraction=0.9)
    taken = Preprocessing(image_size=64, mean=(0.5,) * channels, std=(0.5,) * channels)
    taken = Preprocessing(image_size=64, mean=taken.mean, std=taken.std, framing=framing)
    model = PictureModel(torch.nn.Identity(), ModelInfo(preprocessing=taken))
    file = io.BytesIO()
    picture.save(file, "PNG")
    seen = decode(file.getvalue(), 64, framing).pixels
    got = model.scaled(torch.from_numpy(np.array(picture)[None]))[0].permute(1, 2, 0).numpy()
    assert np.abs(got - seen).max() <= 2
    assert (got != seen).mean() < 0.02


@pytest.mark.parametrize("given", [{}, {"precision": "float16"}, {"with_preprocessing": True}])
def test_no_flipped_bit_of_a_file_changes_an_answer_in_silence(model, given, picture, tmp_path):
    vitcut.export(model, settings=ExportSettings(to=("onnx",), **given), out=tmp_path)
    path, shown = tmp_path / "onnx" / "model.onnx", tmp_path / "a.png"
    picture.save(shown)
    content, draw = path.read_bytes(), np.random.default_rng(0)
    expected = [*vitcut.predict(path, shown)]
    for _ in range(12):
        altered = bytearray(content)
        altered[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        path.write_bytes(altered)
        with suppress(ArtefactError):
            assert [*vitcut.predict(path, shown)] == expected
    path.write_bytes(content.replace(b"cats", b"rats"))
    with pytest.raises(ArtefactError, match="was altered: its hash"):
        vitcut.predict(path, shown)


def test_float16_takes_half_the_room_and_is_not_held_to_float32(model, tmp_path):
    vitcut.export(model, settings=ExportSettings(precision="float16"), out=tmp_path)
    about = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert about["precision"] == "float16"
    assert 1e-6 < about["parity"]["max_abs_diff"] < 0.1


def test_a_file_that_computes_something_else_is_not_written(model, tmp_path, monkeypatch):
    from vitcut.exports import pt2_file

    load = torch.export.load

    class Wrong:
        def __init__(self, path):
            self.inner = load(path).module()

        def module(self):
            return lambda images: self.inner(images) + 0.01

    monkeypatch.setattr(pt2_file.torch.export, "load", Wrong)
    with pytest.raises(ExactnessError, match="pt2 differs from torch"):
        vitcut.export(model, settings=ExportSettings(to=("pt2",)), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "an unknown target": ({"to": ("onxx",)}, "did you mean 'onnx'"),
    "a target twice": ({"to": ("onnx", "onnx")}, "different targets, got onnx, onnx"),
    "an opset that is too old": ({"opset": 17}, "opset must be between 18 and 23, got 17"),
    "an opset that is too new": ({"opset": 24}, "opset must be between 18 and 23, got 24"),
    "an opset of OpenVINO": ({"opset": 21, "to": ("openvino",)}, "opset is for onnx and"),
    "a batch of a browser": ({"batch": 2, "to": ("transformers-js",)}, "any number of images"),
    "no images per call": ({"batch": 0}, "batch must be between 1"),
    "an unknown precision": ({"precision": "int4"}, "precision must be one of"),
    "int8 of a target without": ({"precision": "int8", "to": ("pt2",)}, "precision is for onnx"),
    "pictures in int8": ({"precision": "int8", "with_preprocessing": True}, "leave one of them"),
    "many pictures": ({"batch": 2, "with_preprocessing": True}, "one picture of any size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_are_refused(case):
    given, told = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(told)):
        ExportSettings(**given)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures of the classes of a dense model, in folders."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for at in range(12):
                pixels = draw.integers(0, 256, (9, 12, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{at}.png")
    return root


@pytest.mark.parametrize("opset", [18, 20])
def test_int8_is_in_the_products_that_bear_it(images, opset, tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=2
    )
    dense = vitcut.load_model(vit, mean=0.5, std=0.25, labels=["ant", "bee"])
    settings = ExportSettings(precision="int8", opset=opset)
    given = vitcut.load_images(images, model=dense)
    (made,) = vitcut.export(dense, given, settings=settings, out=tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph
    maker = {name: node for node in graph.node for name in node.output}
    whole = {item.name: item.data_type for item in graph.initializer}
    both = [
        node.name
        for node in graph.node
        if node.op_type in {"MatMul", "Gemm"}
        and maker[node.input[0]].op_type == "DequantizeLinear"
        and whole.get(maker[node.input[1]].input[0]) == onnx.TensorProto.INT8
    ]
    # Per block query, key and value, what the heads write, and the first of the MLP; then the
    # classifier. The second of an MLP takes what its activation function gives.
    assert len(both) == made.about["beside_float32"]["int8_products"] == 2 * 3 + 1
    assert made.about["parity"]["labels_equal"] >= 20


def test_a_file_without_products_in_int8_is_no_int8_file(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr("vitcut.exports.precision.count_int8", lambda _: 0)
    with pytest.raises(ModelError, match="int8 changed none of the model's products"):
        test_int8_is_in_the_products_that_bear_it(images, 20, tmp_path, monkeypatch)
    assert not (tmp_path / "out" / "onnx").exists()


def test_int8_without_images_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="int8 needs images"):
        vitcut.export(model, settings=ExportSettings(precision="int8"), out=tmp_path)


def test_a_missing_package_is_named_by_its_extra_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("vitcut.extras.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "vitcut\[openvino\]"'):
        check_export({"settings": ExportSettings(to=("openvino",)), "out": tmp_path})


def test_what_is_no_export_is_not_replaced(model, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for out, told in [(tmp_path, "is no export"), (tmp_path / "file" / "x", "is a file")]:
        with pytest.raises(ArtefactError, match=told):
            vitcut.export(model, out=out)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        with pytest.raises(ArtefactError, match="no permission"):
            vitcut.export(model, out=tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize("release", ["1.17.3", "1.20.1", "1.23.2"])
def test_older_runtimes_compute_the_same(model, release, picture, tmp_path):
    packages = (f"onnxruntime=={release}", "numpy<2")
    python = fresh.environment(tmp_path / "env", *packages, python="3.11")
    vitcut.export(model, out=tmp_path / "plain")
    vitcut.export(model, settings=ExportSettings(with_preprocessing=True), out=tmp_path / "whole")
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    shown = np.asarray(picture)[None]
    for name, given in (("plain", images.numpy()), ("whole", shown)):
        np.save(tmp_path / "given.npy", given)
        code = f"""
import numpy, onnxruntime
session = onnxruntime.InferenceSession("{name}/onnx/model.onnx")
given = {{session.get_inputs()[0].name: numpy.load("given.npy")}}
numpy.save("got.npy", session.run(None, given)[0])"""
        fresh.run(python, "-c", code, folder=tmp_path)
        session = onnxruntime.InferenceSession(tmp_path / name / "onnx" / "model.onnx")
        expected = session.run(None, {session.get_inputs()[0].name: given})[0]
        assert np.allclose(np.load(tmp_path / "got.npy"), expected, atol=1e-5)
