import errno
import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from safetensors import SafetensorError
from strategies import skipping_a_head, split_circuits
from tiny import random_fill, random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.compact.artefact import CONFIG, TENSORS
from vitcut.compact.info import ModelInfo
from vitcut.compact.model import CompactViT
from vitcut.compiler.emit import compile_circuit
from vitcut.errors import ArtefactError
from vitcut.masked.fill import Fill
from vitcut.preprocessing import Framing, Preprocessing
from vitcut.store import sealed

WEIGHTS = random_vit(num_heads=3)
INFO = ModelInfo(
    preprocessing=Preprocessing(image_size=4, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 0.5)),
    class_names=("newt", "wasp", "owl", "seal"),
    group_names=("small", "large"),
    group_of_class=(0, 0, 1, 1),
    source_model="timm:vit_tiny",
    source_sha256="ab",
)
SQUASHED = Framing(fit="squash", crop_fraction=0.9, interpolation="box")


def compiled(circuit):
    fill = random_fill(WEIGHTS, circuit)
    model = compile_circuit(WEIGHTS, circuit, fill, dtype=torch.float64)
    model.info = INFO
    return model


@pytest.fixture
def folder(tmp_path):
    compiled(Circuit.full(WEIGHTS.graph)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@given(split_circuits(WEIGHTS))
@example(skipping_a_head(WEIGHTS.graph))
@settings(max_examples=10, deadline=None)
def test_load_after_save_is_the_identity(tmp_path_factory, circuit):
    folder = tmp_path_factory.mktemp("saved") / "model"
    before = compiled(circuit)
    before.save_pretrained(folder)
    after = CompactViT.from_pretrained(folder)
    pixels = random_pixels(WEIGHTS)
    # Bits of the outputs may differ: matrix products depend on how memory is aligned.
    torch.testing.assert_close(before(pixels), after(pixels), rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    assert list(before.state_dict()) == list(after.state_dict())
    assert (after.plan, after.info) == (before.plan, INFO)
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_the_directory_holds_circuit_and_card(tmp_path):
    circuit = Circuit.full(WEIGHTS.graph)
    circuit.save(tmp_path / "circuit.json")
    folder = tmp_path / "deep" / "model"
    compiled(circuit).save_pretrained(folder, circuit=tmp_path / "circuit.json", card="# Owls\n")
    assert Circuit.load(folder / "circuit.json") == circuit
    assert (folder / "README.md").read_text() == "# Owls\n"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_the_directory_holds_the_fill(tmp_path):
    fill = random_fill(WEIGHTS)
    fill.save(tmp_path / "some.safetensors")
    folder = tmp_path / "model"
    compiled(Circuit.full(WEIGHTS.graph)).save_pretrained(
        folder, fill=tmp_path / "some.safetensors"
    )
    assert Fill.load(folder / "fill.safetensors").fingerprint == fill.fingerprint


def test_a_missing_fill_is_named(tmp_path):
    with pytest.raises(ArtefactError, match=r"cannot read the fill .*nowhere"):
        compiled(Circuit.full(WEIGHTS.graph)).save_pretrained(
            tmp_path / "model", fill=tmp_path / "nowhere"
        )


def test_saving_again_replaces_the_directory(folder):
    model = CompactViT.from_pretrained(folder)
    model.save_pretrained(folder, card="new")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
    assert (folder / "README.md").read_text() == "new"


def test_a_failed_write_leaves_the_earlier_directory(folder, monkeypatch):
    model = CompactViT.from_pretrained(folder)

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("vitcut.compact.artefact.write_json", full_disk)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    CompactViT.from_pretrained(folder)


def test_a_failed_rename_brings_the_earlier_directory_back(folder, monkeypatch):
    model = CompactViT.from_pretrained(folder)
    rename = Path.replace

    def fail_for_the_new_one(path, target):
        if path.suffix == ".part" and path.is_dir():
            raise OSError("interrupted")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail_for_the_new_one)
    with pytest.raises(OSError, match="interrupted"):
        model.save_pretrained(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    CompactViT.from_pretrained(folder)


def test_a_directory_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(ArtefactError, match="is not a model directory"):
        compiled(Circuit.full(WEIGHTS.graph)).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_newer_format_is_refused(folder):
    change_config(folder, format_version=99)
    with pytest.raises(ArtefactError, match="format_version 99"):
        CompactViT.from_pretrained(folder)


def test_an_older_format_says_what_to_do(folder):
    change_config(folder, format_version=5)
    with pytest.raises(
        ArtefactError, match=r"format_version 5, this vitcut reads 8: make it again"
    ):
        CompactViT.from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        CompactViT.from_pretrained(folder)


def test_altered_tensors_are_refused(folder):
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)
    with pytest.raises(ArtefactError, match="was altered"):
        CompactViT.from_pretrained(folder)


def test_an_altered_plan_is_refused(folder):
    plan = json.loads((folder / CONFIG).read_text())["plan"]
    plan["shape"]["eps"] = 0.1
    change_config(folder, plan=plan)
    with pytest.raises(ArtefactError, match=r"config\.json was altered"):
        CompactViT.from_pretrained(folder)


TAKEN = asdict(INFO.preprocessing)
ALTERED = {
    "preprocessing": [
        None,
        TAKEN | {"image_size": 8},
        TAKEN | {"mean": [9, 9, 9]},
        TAKEN | {"std": [1.0, 1.0, float("nan")]},
        TAKEN | {"framing": TAKEN["framing"] | {"fit": "squash"}},
    ],
    "class_names": [["wasp", "newt", "owl", "seal"]],
    "group_names": [["large", "small"]],
    "group_of_class": [[0, 0, 0, 0]],
    "source_model": [None],
    "source_sha256": ["cd"],
}


@pytest.mark.parametrize("name", [item.name for item in fields(ModelInfo)])
def test_altered_information_is_refused(folder, name):
    for value in ALTERED[name]:
        change_config(folder, **{name: value})
        with pytest.raises(ArtefactError, match=r"config\.json was altered"):
            CompactViT.from_pretrained(folder)


def _resave(folder, change):
    """Write a model directory with another config and the right hash."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    for key in ("format_version", "sha256"):
        del config[key]
    (folder / CONFIG).write_text(json.dumps(sealed(config, 7)))


@pytest.mark.parametrize("name", [item.name for item in fields(ModelInfo)])
def test_missing_information_is_named(folder, name):
    _resave(folder, lambda config: config.pop(name))
    with pytest.raises(
        ArtefactError, match=f"`{name}` - at .*: *|missing field `{name}`.*save the model again"
    ):
        CompactViT.from_pretrained(folder)


@pytest.mark.parametrize("framing", [None, SQUASHED])
def test_a_preprocessing_comes_back(folder, framing):
    model = CompactViT.from_pretrained(folder)
    taken = None if framing is None else replace(INFO.preprocessing, framing=framing)
    model.info = replace(model.info, preprocessing=taken)
    model.save_pretrained(folder)
    assert CompactViT.from_pretrained(folder).info == model.info


@pytest.mark.parametrize(
    "value",
    [
        [1],
        "round",
        {"image_size": 4},
        *(
            TAKEN | {"framing": framing}
            for framing in ({"crop_fraction": 2}, {"shape": "round"}, None, [1])
        ),
    ],
)
def test_a_preprocessing_that_is_not_known_is_refused(folder, value):
    _resave(folder, lambda config: config.update(preprocessing=value))
    with pytest.raises(
        ArtefactError, match=r"config\.json: its information does not fit.*save the model again"
    ):
        CompactViT.from_pretrained(folder)


def test_saving_twice_gives_the_same_bytes_that_everyone_may_read(folder):
    seen: set[bytes] = set()
    for _ in range(8):
        CompactViT.from_pretrained(folder).save_pretrained(folder)
        seen.add((folder / TENSORS).read_bytes())
    assert len(seen) == 1
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_full_disk_is_told_in_one_line_and_leaves_the_earlier_directory(folder, monkeypatch):
    model = CompactViT.from_pretrained(folder)

    def full_disk(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("vitcut.compact.artefact.save_file", full_disk)
    with pytest.raises(ArtefactError, match=r"cannot write model.*No space left") as caught:
        model.save_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    CompactViT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"classifier.bias": torch.zeros(9, dtype=torch.float64)}),
            r"classifier\.bias in .* the shape \[4\] .* got \[9\]",
        ),
        (lambda t: t.pop("classifier.bias"), r"classifier\.bias in .* the shape \[4\] .* got None"),
        (
            lambda t: t.update(spare=torch.zeros(1, dtype=torch.float64)),
            r"spare in .* the shape None .* got \[1\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_plan_are_refused(folder, monkeypatch, change, message):
    model = CompactViT.from_pretrained(folder)
    tensors = dict(model.state_dict())
    change(tensors)
    monkeypatch.setattr(model, "state_dict", lambda: tensors)
    model.save_pretrained(folder)
    with pytest.raises(ArtefactError, match=message):
        CompactViT.from_pretrained(folder)


@pytest.mark.parametrize("place", ["no such place", Path("owner/name")])
def test_what_is_neither_directory_nor_hub_id_is_refused(place):
    with pytest.raises(ArtefactError, match="no model directory at"):
        CompactViT.from_pretrained(place)


def test_labels_are_one_a_line_in_the_order_of_the_logits(tmp_path):
    model = compiled(Circuit.full(WEIGHTS.graph))
    model.info = replace(INFO, class_names=("newt", "wa\nsp", "ow\x1bl", "seal"))
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "labels.txt").read_text().splitlines() == [
        "newt", "wa sp", r"ow\x1bl", "seal",
    ]  # fmt: skip
    model.info = ModelInfo()
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "labels.txt").exists()
    assert "does not name its classes" in (tmp_path / "model" / "README.md").read_text()


def test_a_model_takes_its_circuit_along_and_its_card_while_that_is_true(tmp_path):
    circuit = Circuit.full(WEIGHTS.graph)
    circuit.save(tmp_path / "circuit.json")
    first, copy, changed = (tmp_path / name for name in ("first", "copy", "changed"))
    compiled(circuit).save_pretrained(first, circuit=tmp_path / "circuit.json", card="measured")
    model = CompactViT.from_pretrained(first)
    model.save_pretrained(copy)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(changed)
    assert (copy / "README.md").read_text() == "measured"
    assert "Nothing was measured of this copy." in (changed / "README.md").read_text()
    for folder in (copy, changed):
        assert Circuit.load(folder / "circuit.json") == circuit
        CompactViT.from_pretrained(folder)


def test_a_model_whose_directory_is_gone_can_be_saved(folder, tmp_path):
    model = CompactViT.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "copy")
    copy = CompactViT.from_pretrained(tmp_path / "copy")
    assert copy.info == model.info
    for own, saved in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(own, saved)


def test_a_shortage_is_not_called_damage(folder, monkeypatch):
    def no_memory(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("vitcut.compact.artefact.safe_open", no_memory)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        CompactViT.from_pretrained(folder)
