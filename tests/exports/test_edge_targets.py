"""ExecuTorch, LiteRT and Transformers.js; the first two where their packages are installed."""

import importlib.util
import json
import os
import re
import zipfile
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from fresh import environment, run
from PIL import Image
from strategies import parts_per_kind
from tiny import random_fill, random_vit

import vitcut
from vitcut.compact.info import ModelInfo
from vitcut.compiler.emit import compile_circuit
from vitcut.exports.export import export_targets, make_subject
from vitcut.exports.settings import ExportSettings
from vitcut.images.decoding import decode
from vitcut.images.load import normalise
from vitcut.preprocessing import Framing, Preprocessing

EDGE = Path(__file__).parents[2] / "examples" / "edge"
CATS_DOGS = Path(__file__).parents[3] / "shared" / "data" / "cats-dogs-256.zip"
VIT_TINY = CATS_DOGS.with_name("vit_tiny_patch16_224")

pytestmark = [pytest.mark.graph, pytest.mark.filterwarnings("ignore")]


def draw_picture(path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((210, 150)).save(path)
    return path


def run_readme(folder, where):
    """What the program in an export's README prints, after its own ``pip install``."""
    text = (folder / "README.md").read_text()
    (packages,) = re.findall("^ +pip install (.+)$", text, re.MULTILINE)
    (program,) = re.findall("^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    draw_picture(folder / "picture.png").rename(folder / "picture.jpg")
    return run(environment(where, *packages.split()), "-c", program, folder=folder)


def needs(module):
    """Skip where a package is missing, but in CI only that which has an environment of its own."""
    missing = importlib.util.find_spec(module) is None
    must = "CI" in os.environ and module != "litert_torch"
    return pytest.mark.skipif(missing and not must, reason=f"{module} is not installed")


def compact(*, channels=3):
    weights = random_vit(
        num_layers=2, num_heads=3, width=16, hidden=9, patch_size=8, patches_per_side=4
    ).to(torch.float32)
    circuit = parts_per_kind(weights)
    model = compile_circuit(weights, circuit, random_fill(weights, circuit))
    model.info = ModelInfo(
        preprocessing=Preprocessing(
            image_size=32, framing=Framing(channels=channels, crop_fraction=0.8)
        ),
        class_names=("tabby", "Siamese", "beagle", "pug"),
        group_names=("cat", "dog"),
        group_of_class=(0, 0, 1, 1),
    )
    return model


def export(target, folder, *, model=None, **settings):
    model = model or compact()
    settings = ExportSettings(to=(target,), **settings)
    (made,) = export_targets(make_subject(model, model.info, None, settings), folder, settings)
    return made


DEVICES = [
    pytest.param("executorch", marks=needs("executorch")),
    pytest.param("litert", marks=needs("litert_torch")),
]


@pytest.mark.parametrize("target", DEVICES)
def test_a_file_for_devices_gives_the_logits_of_torch(tmp_path, target):
    about = export(target, tmp_path).about
    assert about["batch"] == 1
    assert about["parity"]["labels_equal"] == about["parity"]["images"]
    assert about["parity"]["max_abs_diff"] < 1e-4
    if target == "executorch":
        assert about["xnnpack_calls"] <= 6, "operations that XNNPACK does not take lie in between"
        assert about["other_operations"] <= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["onnx", "pt2", pytest.param("openvino", marks=needs("openvino")), *DEVICES]
)
def test_the_readme_classifies_a_picture_where_nothing_but_the_runtime_is(tmp_path, target):
    made = export(target, tmp_path, batch=3)
    assert made.about["batch"] == 3
    assert "cat" in run_readme(made.folder, tmp_path / "environment")


@pytest.mark.slow
def test_litert_is_written_and_run_in_environments_of_its_own(tmp_path):
    # It needs an older torch than everything else.
    compact().save_pretrained(tmp_path / "model")
    python = environment(tmp_path / "writing", f"{EDGE.parents[1]}[litert]")
    run(python, "-m", "vitcut", "export", "model", "--to", "litert", "--out", ".", folder=tmp_path)
    folder = tmp_path / "litert"
    about = json.loads((folder / "export.json").read_text())
    assert tuple(map(int, about["tools"]["torch"].split(".")[:2])) < (2, 15)
    assert about["parity"]["labels_equal"] == about["parity"]["images"] == 32
    assert about["parity"]["max_abs_diff"] < 1e-4
    assert "cat" in run_readme(folder, tmp_path / "running")


@pytest.mark.slow
def test_the_edge_example_needs_onnxruntime_and_pillow_alone(tmp_path):
    made = export("onnx", tmp_path)
    python = environment(tmp_path / "environment", "onnxruntime", "pillow")
    picture = draw_picture(tmp_path / "picture.png")
    answer = run(python, EDGE / "classify.py", made.folder, picture)
    model = compact()
    taken = model.info.preprocessing
    pixels = decode(picture.read_bytes(), taken.image_size, taken.framing).pixels
    with torch.inference_mode():
        cat = model(normalise(pixels[None], taken)).softmax(-1)[0, :2].sum().item()
    name, score = ("cat", cat) if cat > 0.5 else ("dog", 1 - cat)
    assert answer.split()[1:] == [name, f"{score:.1%}"]
    measured = run(python, EDGE / "measure.py", made.folder, "--picture", picture, "--repeats", 1)
    assert len(measured.splitlines()) == 3


def test_transformers_js_gets_groups_and_pictures_as_they_are(tmp_path):
    made = export("transformers-js", tmp_path)
    config = json.loads((made.folder / "config.json").read_text())
    processor = json.loads((made.folder / "preprocessor_config.json").read_text())
    assert config["model_type"] == "vit"
    assert config["id2label"] == {"0": "cat", "1": "dog"}
    assert config["label2id"] == {"cat": 0, "dog": 1}
    assert not any(processor[name] for name in processor if name.startswith("do_re"))
    assert made.about["file"] == "onnx/model.onnx"
    assert made.about["parity"]["labels_equal"] == made.about["parity"]["images"]
    assert made.about["parity"]["max_abs_diff"] < 0.02


@pytest.mark.slow
@pytest.mark.skipif(bool(browser.missing()), reason=f"not installed: {browser.missing()}")
@pytest.mark.skipif(not CATS_DOGS.is_file(), reason="the pictures of cats and dogs are not here")
def test_a_browser_gives_200_pictures_the_labels_that_torch_gives(tmp_path):
    model = vitcut.load_model(VIT_TINY)
    images = vitcut.load_images(CATS_DOGS, task="cats-dogs", model=model)
    settings = ExportSettings(to=("transformers-js",))
    (made,) = vitcut.export(model, images, settings=settings, out=tmp_path / "export")
    pictures, modules = tmp_path / "pictures", tmp_path / "modules"
    pictures.mkdir()
    with zipfile.ZipFile(CATS_DOGS) as archive:
        names = sorted(name for name in archive.namelist() if "/val/" in name)[::4]
        for number, name in enumerate(names):
            (pictures / f"{number:03}.jpg").write_bytes(archive.read(name))
    browser.install(modules)
    got = browser.classify(made.folder, pictures, modules)
    taken = model.preprocessing
    pixels = np.stack(
        [
            decode(path.read_bytes(), taken.image_size, taken.framing).pixels
            for path in sorted(pictures.iterdir())
        ]
    )
    dense = model.for_task(images.task, images.labels)
    with torch.inference_mode():
        logits = torch.cat([dense.module(part) for part in normalise(pixels, taken).split(32)])
    groups = torch.nn.functional.one_hot(torch.tensor(images.task.group_of_class)).float()
    expected = logits.softmax(-1) @ groups
    names = images.task.groups
    assert len(got) == len(expected) == 200
    assert [max(each, key=each.get) for each in got] == [names[at] for at in expected.argmax(1)]
    scores = torch.tensor([[each[name] for name in names] for each in got])
    assert (scores - expected).abs().max() < 0.02
