"""A model directory holds together, says nothing of this machine, and is the same everywhere."""

import shutil

import pytest
import torch
from forging import forge
from reliability_cases import BENCH, STAGES

import vitcut
from vitcut.circuit import Circuit
from vitcut.compiler.cut import Cut
from vitcut.errors import ArtefactError
from vitcut.store import sha256_file
from vitcut.tensors import read_tensors, write_tensors


@pytest.fixture
def model(lab, tmp_path):
    return shutil.copytree(lab.root / "cut" / "model", tmp_path / "model")


def test_a_circuit_of_another_model_is_refused(model):
    circuit = Circuit.load(model / "circuit.json")
    Circuit.full(circuit.graph, ablation="linear").save(model / "circuit.json")
    for load in (Cut.load, vitcut.CompactViT.from_pretrained):
        with pytest.raises(ArtefactError, match=r"the circuit in .* is not the one that the model"):
            load(model)


def test_a_fill_of_another_model_is_refused(model):
    path = model / "fill.safetensors"
    tensors, facts = read_tensors(path, kind="fill", version=3)
    tensors["sources"] = tensors["sources"] + 1
    write_tensors(path, tensors, facts, version=3)
    with pytest.raises(ArtefactError, match=r"the fill in .* is not the one that the model"):
        Cut.load(model).read_fill()


@pytest.mark.parametrize("kept", ["nothing", "an older version", "no fill at all"])
def test_a_model_is_loaded_whatever_lies_in_place_of_its_fill(model, kept):
    path = model / "fill.safetensors"
    whole = Cut.load(model)
    assert whole.read_fill().circuit == whole.circuit.fingerprint
    tensors, facts = read_tensors(path, kind="fill", version=3)
    path.unlink()
    if kept == "an older version":
        write_tensors(path, tensors, facts, version=2)
    elif kept == "no fill at all":
        path.write_text("not tensors")
    found = vitcut.info(Cut.load(model))
    assert found.point.macs == vitcut.info(whole).point.macs
    picture = torch.zeros(1, 3, 64, 64)[..., : found.shape.image_size, : found.shape.image_size]
    assert Cut.load(model).model(picture).equal(whole.model(picture))
    if kept == "nothing":
        assert Cut.load(model).read_fill() is None
    else:
        with pytest.raises(ArtefactError, match=r"fill"):
            Cut.load(model).read_fill()


def test_facts_of_another_cut_are_refused(model):
    forge(model / "cut.json", lambda content: content.update(model="0" * 64))
    with pytest.raises(ArtefactError, match=r"cut\.json is not of the model that it lies beside"):
        Cut.load(model)


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", "", "a\n"])
def test_a_cut_is_never_called_by_a_path(model, name):
    forge(model / "cut.json", lambda content: content.update(name=name))
    with pytest.raises(ArtefactError, match="a cut cannot be called"):
        Cut.load(model)


def test_weights_that_are_not_finite_are_refused(model):
    found = vitcut.CompactViT.from_pretrained(model)
    with torch.no_grad():
        next(found.parameters()).fill_(float("nan"))
    found.save_pretrained(model)
    with pytest.raises(ArtefactError, match="holds numbers that are not finite"):
        vitcut.CompactViT.from_pretrained(model)


def test_the_same_cut_in_another_folder_has_the_same_hashes(lab, tmp_path):
    STAGES["cut"](lab, tmp_path / "elsewhere")
    for name in ("model.safetensors", "config.json", "fill.safetensors"):
        one, other = (out / "model" / name for out in (lab.root / "cut", tmp_path / "elsewhere"))
        assert sha256_file(one) == sha256_file(other), name


@pytest.mark.parametrize(
    "folder", ["train/dense", "probe/dense", "cut/model", "finetune/model", "finetune/start"]
)
def test_published_models_hold_no_path_of_this_machine(lab, folder):
    for path in (lab.root / folder).iterdir():
        assert str(lab.root).encode() not in path.read_bytes(), path.name


def test_a_finished_repair_can_be_moved_without_its_cut(lab, tmp_path):
    moved = shutil.copytree(lab.root / "finetune", tmp_path / "moved")
    points = vitcut.bench(moved, settings=BENCH, out=tmp_path / "again").points
    assert [point.name for point in points][-2:] == [
        "fisher-linear-macs-0.6", "fisher-linear-macs-0.6-repaired"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "file", "whole"),
    [
        ("cut", "model/cut.json", "model"),
        ("cut", "model/config.json", "model"),
        ("train", "checkpoints/best.safetensors", "."),
    ],
)
def test_the_remedy_for_a_damaged_part_of_a_whole_works(lab, tmp_path, stage, file, whole):
    out = tmp_path / "run"
    shutil.copytree(lab.root / stage, out)
    shutil.rmtree(out / "dense", ignore_errors=True)
    written = (out / file).read_bytes()
    last = written.rindex(b"0")
    (out / file).write_bytes(written[:last] + b"1" + written[last + 1 :])
    with pytest.raises(ArtefactError, match=r"delete its (training's )?folder and run again"):
        STAGES[stage](lab, out)
    shutil.rmtree(out / whole)
    STAGES[stage](lab, out)
    assert (out / file).is_file()
