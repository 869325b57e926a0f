"""What the label page holds before a browser opens it, and how label files reach it."""

import hashlib
import io
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_api import build_module

import vitcut
from vitcut.cli import main
from vitcut.errors import ConfigError, TaskError
from vitcut.labelling.gallery import odd_first
from vitcut.labelling.page import read_label_file
from vitcut.labels import Labels
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing
from vitcut.task import parse_task
from vitcut.wordnet import synsets

VIEWER = Path(__file__).parents[2] / "viewer"
ASSETS = Path(str(resources.files("vitcut"))) / "assets" / "label"
ANIMALS = resources.files("vitcut") / "assets" / "tasks" / "animals.yaml"


def data_of(path):
    page = path.read_text(encoding="utf-8")
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def test_the_built_page_is_that_of_its_sources():
    files = ["package.json", "build-label.mjs", "src/dom.ts"]
    files += [f"label/{path.name}" for path in (VIEWER / "label").iterdir()]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0".encode() + (VIEWER / name).read_bytes() + b"\0")
    built = (ASSETS / "label.js").read_text(encoding="utf-8")
    assert built.startswith(f"/* sources sha256 {digest.hexdigest()}\n"), (
        "viewer/ has changed: npm install && npm run build there"
    )
    assert "</script" not in built
    assert "<!--" not in built
    assert (ASSETS / "label.html").read_bytes() == (VIEWER / "label" / "label.html").read_bytes()


def test_the_file_holds_classes_pictures_wordnet_and_suggestions(photos, tmp_path, capsys):
    out = tmp_path / "page.html"
    words = ["label", "--source", str(photos), "--task", str(tmp_path / "new.yaml")]
    assert main([*words, "--pictures", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"results: {out}\nnext: open {out} in a browser\n"
    data = data_of(out)
    assert [one["id"] for one in data["classes"]] == sorted(path.name for path in photos.iterdir())
    goldfish = next(one for one in data["classes"] if one["id"] == "n01443537")
    assert goldfish["name"] == "goldfish"
    assert goldfish["wordnet"]["gloss"].startswith("small golden or orange-red freshwater fishes")
    assert goldfish["wordnet"]["above"][-3:] == ["soft-finned fish", "cypriniform fish", "cyprinid"]
    assert {len(own) for own in data["pictures"]} == {2}
    assert all(one.startswith("data:image/jpeg;base64,") for own in data["pictures"] for one in own)
    assert len(set(data["suggested"].values())) == 6
    assert data["suggested"].keys() == {one["id"] for one in data["classes"]}
    assert not (tmp_path / "new.yaml").exists()


def test_a_page_without_pictures_holds_none(photos, tmp_path):
    task = tmp_path / "new.yaml"
    vitcut.label(photos, task=task, no_pictures=True, out=tmp_path / "page.html")
    assert "pictures" not in data_of(tmp_path / "page.html")
    assert "data:image/" not in (tmp_path / "page.html").read_text()


def test_text_from_outside_stands_in_no_markup(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    for folder in (name, "</script><script>alert(1)"):
        (tmp_path / "photos" / folder.replace("/", "\u2215")).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / folder.replace("/", "\u2215") / "0.png")
    vitcut.label(tmp_path / "photos", task=tmp_path / "new.yaml", out=tmp_path / "page.html")
    assert "<img" not in (tmp_path / "page.html").read_text()
    assert name in {one["id"] for one in data_of(tmp_path / "page.html")["classes"]}


def test_a_picture_that_does_not_open_leaves_a_gap(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        Image.new("L", (300, 200)).save(tmp_path / "photos" / folder / "0.png")
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    vitcut.label(tmp_path / "photos", task=tmp_path / "new.yaml", out=tmp_path / "page.html")
    first, second = data_of(tmp_path / "page.html")["pictures"]
    assert sorted(one is None for one in first) == [False, True]
    assert None not in second


def test_pictures_are_made_smaller_and_never_larger(drawn, tmp_path):
    with Image.open(io.BytesIO(drawn.thumbnail(0, 256))) as image:
        assert image.size == (96, 96)
    with Image.open(io.BytesIO(drawn.thumbnail(0, 50))) as image:
        assert image.size == (50, 50)


@pytest.fixture
def labels():
    ids = tuple(key for key, own in synsets().items() if not own.gloss.startswith("?"))
    ids = tuple(sorted(ids))
    return Labels(owner="the data", ids=ids, names=tuple(synsets()[key].names for key in ids))


def test_a_label_file_comes_as_it_is_written(labels, tmp_path):
    path = tmp_path / "animals.yaml"
    path.write_bytes(ANIMALS.read_bytes())
    assert read_label_file(path, labels) == ANIMALS.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["groups: {}", "name: x\ngroups: {a: {n01443537: koi}}\n"])
def test_a_file_may_be_unfinished(labels, tmp_path, text):
    (tmp_path / "new.yaml").write_text(text)
    assert read_label_file(tmp_path / "new.yaml", labels) == text


@pytest.mark.parametrize(
    "text",
    [
        "groups: {cat: [b, 2], dog: pug}",
        "groups: {cat: [tabby, '2'], dog: &x [pug]}\nexcluded: {}\nmodel: {}",
        "groups: {cat: &x [b, 2], dog: pug}\nexcluded: {q: *x}",
        "groups: {cat: {b: tabby, c: manx}, dog: {d: pug}}\nrest: other",
        "classes: [b, c]",
        "one: c",
    ],
)
def test_classes_that_are_named_otherwise_are_listed_by_their_ids(tmp_path, text):
    labels = Labels(owner="the data", ids=("a", "b", "c", "d"), names=("x", "tabby", "y", "pug"))
    (tmp_path / "new.yaml").write_text(text)
    found = read_label_file(tmp_path / "new.yaml", labels)
    expected = parse_task(text, origin="new.yaml").among(labels)
    assert parse_task(found, origin="new.yaml").among(labels) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("groups: {a: [unicorn], b: [a]}", "names 1 classes that the data lacks: unicorn"),
        ("groups: {a: [a], b: [b]}\nfolders: {a: [x], b: [y]}", "has 'folders', so its classes"),
        ("- a", "is not a label file"),
    ],
)
def test_a_file_of_other_classes_is_refused(tmp_path, text, match):
    labels = Labels(owner="the data", ids=("a", "b"), names=("a", "b"))
    (tmp_path / "new.yaml").write_text(text)
    with pytest.raises(TaskError, match=match):
        read_label_file(tmp_path / "new.yaml", labels)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"task": "animals"}, "task must be a .yaml file to write, got animals"),
        ({"serve": True, "out": "page.html"}, "a page that is served is not written"),
        ({"out": "photos.zip"}, "out must be a .html file to write, got photos.zip"),
        ({"port": 8000}, "port is for a page that is served, got 8000"),
        ({"port": 70000, "serve": True}, "port must be between 0 and 65535"),
        ({"pictures": -1}, "pictures must be between 0 and 1000"),
        ({"arch": "vit"}, "arch and labels are of a model: give one"),
    ],
)
def test_what_cannot_be_is_refused_before_the_source_is_read(given, match):
    with pytest.raises(ConfigError, match=match):
        vitcut.label("nowhere", **given)


def test_pictures_that_a_model_finds_odd_come_first(drawn):
    taken = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    ids = drawn.labels.ids
    model = Model.of(build_module(), "tiny", taken, Labels(owner="m", ids=ids, names=ids))
    found = odd_first(drawn, model, first=6)
    for before, after in zip(drawn.shown, found.shown, strict=True):
        assert sorted(before) == sorted(after)

    # By definition, from the logits of one class.
    import torch

    from vitcut.images.decoding import decode
    from vitcut.images.load import normalise

    own = found.shown[3]
    pixels = np.stack([decode(drawn.read(at), 16, taken.framing).pixels for at in own])
    with torch.no_grad():
        shares = model.module(normalise(pixels, taken)).double().softmax(1)
    odd = (shares * (shares / shares.mean(0)).log()).sum(1)
    assert odd[:3].tolist() == sorted(odd.tolist(), reverse=True)[:3]
    assert odd[3:6].tolist() == sorted(odd.tolist())[:3]
    usual = shares.argmax(1).bincount().argmax()
    assert {at for at in own if at in found.taken_for} == {
        at for at, best in zip(own, shares.argmax(1), strict=True) if best != usual
    }
    assert found.answers[3].startswith(ids[int(usual)])
