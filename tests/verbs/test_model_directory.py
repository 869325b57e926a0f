"""Model directories: cards that say what a stranger needs, and damage that is told in one line."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import yaml
from forging import forge
from PIL import Image
from pretrained import fake_pretrained

import vitcut
from vitcut import cli
from vitcut.cli import main
from vitcut.compact.card import IMAGENET_TERMS, Origin, model_card
from vitcut.compact.info import ModelInfo
from vitcut.compact.model import CompactViT
from vitcut.errors import DataError
from vitcut.preprocessing import Framing, Preprocessing
from vitcut.reports.cards import origin_of
from vitcut.results import Results

POINT = "acdc-resample-0.001"


@pytest.fixture
def folder(finished):
    return finished / "points" / POINT / "model"


def _front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_says_what_was_measured_where_and_when(finished, folder):
    card = (folder / "README.md").read_text()
    machine = Results.load(finished / "results.json").machine
    for told in (
        *(f"torch {machine['versions']['torch']}", f"vitcut {vitcut.__version__}"),
        *(machine["cpu"], f"load {machine['load_1min']}", f"measured on {machine['date']}"),
        *("points of coarse accuracy (", "x as fast (torch, batch 1)", "1 thread(s)"),
        *("- plain (2): disc; square", "It tells 2 groups apart: plain, striped."),
        *("The shorter side is scaled to 16 pixels (bicubic)", "less 0.485, 0.456, 0.406"),
        *("Made from: a model that vitcut trained (licence unknown)", "none needed"),
    ):
        assert told in card or told in card.replace("\\", ""), told
    assert _front_matter(card) == {
        "library_name": "vitcut",
        "pipeline_tag": "image-classification",
        "license": "unknown",
        "tags": ["vision-transformer", "circuit", "pruning"],
    }
    # A slash at the beginning of a word would be a path of this machine.
    assert not re.findall(r"(?<![\w/:.<])/\w+", card)


def test_the_labels_beside_a_card_are_those_of_the_logits(folder):
    names = CompactViT.from_pretrained(folder).info.class_names
    assert (folder / "labels.txt").read_text().splitlines() == list(names)


def test_the_lines_of_a_card_classify_a_picture_as_they_stand(folder, tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    place = tmp_path / "model"
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (40, 30), "red").save(place / "picture.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(plain|striped) \d+\.\d%\n", done.stdout)


def test_an_origin_is_named_with_its_licence(tmp_path, monkeypatch):
    name = "vit_tiny_patch16_224"
    fake_pretrained(monkeypatch, name, tmp_path / "weights.pth", num_classes=1000)
    model = vitcut.load_model(f"timm:{name}")
    images = vitcut.load_images("drawn", image_size=8)
    hub_id = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    found = origin_of(model, images)
    assert (found.model, found.license, found.base_model) == (f"timm:{name}", "apache-2.0", hub_id)
    random = replace(model, origin={**model.origin, "random_weights": True})
    assert (origin_of(random, images).base_model, origin_of(random, images).license) == (None, None)
    from_hub = replace(model, origin={"model": "hf-hub:me/owls@main"})
    assert origin_of(from_hub, images).base_model == "me/owls"
    local = replace(model, origin={"model": str(tmp_path / "vit")})
    assert (origin_of(local, images).base_model, origin_of(local, images).model) == (None, "vit")
    for source, told in {
        None: ("Tiny ImageNet", IMAGENET_TERMS, None),
        str(tmp_path / "tiny-imagenet-200.zip"): ("tiny-imagenet-200.zip", IMAGENET_TERMS, None),
        str(tmp_path / "pets"): ("pets", None, None),
        "me/pets": ("me/pets", None, "me/pets"),
    }.items():
        found = origin_of(model, replace(images, origin={"source": source}))
        assert (found.pictures, found.pictures_license, found.dataset) == told


def test_the_shipped_model_has_the_terms_of_its_pictures():
    images = vitcut.load_images("drawn", image_size=8)
    found = origin_of(vitcut.load_model("animals"), images)
    card = model_card(ModelInfo(), origin=found)
    assert found.license == IMAGENET_TERMS
    assert _front_matter(card)["license"] == "other"
    assert _front_matter(card)["license_name"] == "imagenet-non-commercial-research"


@pytest.mark.parametrize(
    ("framing", "told"),
    [
        (Framing(crop_fraction=0.9), "scaled to 17 pixels (bicubic), and the central 16 x 16"),
        (Framing(fit="squash", interpolation="box"), "Both sides are scaled to 16 pixels (box). V"),
        (Framing(channels=1, orientation="apply"), "is turned as its EXIF entry says, and convert"),
    ],
)
def test_a_card_describes_what_is_done_to_pictures(framing, told):
    info = ModelInfo(
        preprocessing=Preprocessing(image_size=16, framing=framing), class_names=("a", "b")
    )
    assert told in model_card(info)


def test_long_lists_are_cut_short_in_a_card():
    names = tuple(f"class {number}" for number in range(50))
    info = ModelInfo(class_names=names, group_names=names, group_of_class=tuple(range(50)))
    card = model_card(info)
    assert "- class 19\n- and 30 more" in card
    assert "It tells 50 groups apart: class 0, class 1, " in card
    grouped = replace(info, group_names=("one",), group_of_class=(0,) * 50)
    assert "- one (50): class 0; class 1; " in model_card(grouped)
    assert "class 19; and 30 more" in model_card(grouped)


def test_what_the_hub_reads_is_escaped():
    origin = Origin(base_model="a: [b", dataset="x\n- y", license="'")
    assert _front_matter(model_card(ModelInfo(), origin=origin)) == {
        "library_name": "vitcut",
        "pipeline_tag": "image-classification",
        "license": "'",
        "base_model": "a: [b",
        "datasets": ["x\n- y"],
        "tags": ["vision-transformer", "circuit", "pruning"],
    }


def _newer(folder):
    forge(folder / "config.json", lambda config: config.update(format_version=99))


def _tampered(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_newer, "format_version 99"),
        (_tampered, "model.safetensors was altered"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
@pytest.mark.parametrize("verb", ["info", "eval", "finetune"])
def test_damage_is_told_in_one_line(verb, damage, message, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run / "points" / POINT / "model")
    more = [] if verb == "info" else ["--out", str(tmp_path / "out")]
    assert main([verb, str(run / "points" / POINT / "model"), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert (err.count("\n"), err.startswith("vitcut: error: ")) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("verb", ["bench", "eval", "finetune"])
def test_a_place_without_write_permission_is_told_in_one_line(
    verb, finished, tmp_path, capsys, monkeypatch
):
    make = Path.mkdir

    def refuse(path, *args, **options):
        if tmp_path in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    point = [] if verb == "bench" else ["--point", POINT]
    assert main([verb, str(finished), *point, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Permission denied" in err
    assert err.splitlines()[-1].startswith("vitcut: error: ")
    assert not any(tmp_path.iterdir())


def test_a_run_whose_images_are_gone_is_exported_without_them(
    finished, tmp_path, monkeypatch, capsys
):
    @wraps(vitcut.load_images)
    def gone(*_, **__):
        raise DataError("no images at old/place")

    taken = []
    verb = cli.VERBS["export"]
    call = wraps(verb.call)(lambda **given: taken.append(given["images"]))
    monkeypatch.setitem(cli.VERBS, "export", replace(verb, call=call, show=None))
    monkeypatch.setitem(cli.LOADERS, "Images", gone)
    words = ["export", str(finished), "--point", "dense", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert taken == [None]
    assert "going on without the run's images: no images at old/place" in capsys.readouterr().err
    assert main([*words, "--source", "old/place"]) == 2
