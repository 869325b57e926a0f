import json
import shutil
from dataclasses import replace

import pytest
import torch
from forging import forge
from safetensors.torch import load_file

import vitcut
from vitcut.benchmark import points
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.compiler import cut as cutting
from vitcut.compiler.cut import Cut
from vitcut.compiler.emit import compile_circuit
from vitcut.errors import ArtefactError, ConfigError, ModelError, TaskError
from vitcut.masked.fitting import zero_fill
from vitcut.model.model import Model
from vitcut.reports import cards
from vitcut.results import Results
from vitcut.runs import find_cut, find_run
from vitcut.runtimes.onnx_runtime import export_onnx
from vitcut.training.repair import Repair, require_sight
from vitcut.training.settings import FinetuneSettings

REPAIR_FILE = "repair.json"
SHORT = {
    "runtimes": ("torch",),
    "batches": (1,),
    "seconds": 0.05,
    "min_rounds": 3,
    "min_sample_ms": 0.1,
}
FINETUNE = FinetuneSettings(
    epochs=2,
    batch_size=32,
    learning_rate=2e-3,
    augmentation="none",
    precision="float32",
    device="cpu",
)
BENCH = BenchSettings(**SHORT)
POINT = "acdc-resample-0.03"
TIMING = [
    *("--runtimes", "torch", "--batches", "1", "--seconds", "0.05", "--min-rounds", "3"),
    *("--min-sample-ms", "0.1"),
]
FLAGS = [
    *("--epochs", "2", "--batch-size", "32", "--learning-rate", "2e-3", "--augmentation", "none"),
    *("--precision", "float32", "--device", "cpu"),
]


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def _load(run):
    model = vitcut.load_model(run)
    return model, vitcut.load_images(model=model)


def _repair(run, out, *, point=POINT, settings=FINETUNE, **more):
    told = {"settings": settings, "bench": BENCH, "point": point, "out": out, **more}
    done = vitcut.finetune(run, *_load(find_run(run)), **told)
    return done.results, done.repair


@pytest.fixture(scope="module")
def repaired(finished, tmp_path_factory):
    """What a repair of one point of the run gives, undisturbed."""
    out = tmp_path_factory.mktemp("repair") / "fine"
    _repair(finished, out)
    return out


def test_a_repair_is_measured_beside_dense_and_dense_given_the_same(finished, repaired):
    results = Results.load(repaired / "results.json")
    names = [point.name for point in results.all_points()]
    assert names == ["dense", "class-only", "dense-repaired", POINT, f"{POINT}-repaired"]
    earlier = {p.name: p for p in Results.load(finished / "results.json").all_points()}
    _, _, dense, before, after = results.all_points()
    for name in ("accuracy_fine", "accuracy_coarse", "kl", "macs", "params", "edges_kept"):
        assert getattr(before, name) == getattr(earlier[POINT], name)
    assert (after.macs, after.edges_kept) == (before.macs, before.edges_kept)
    assert after.kl < before.kl, "the repair brings the model nearer to the dense one"
    assert (after.max_abs_diff, after.faithfulness) == (None, None)
    assert dense.macs == earlier["dense"].macs
    assert dense.kl > 0
    assert {c.point for c in results.comparisons} == {*names[1:], "dense"}


def test_the_differences_are_paired_on_the_same_images(repaired):
    results = Results.load(repaired / "results.json")
    found = Repair.load(repaired / REPAIR_FILE)
    accuracy = {point.name: point.accuracy_coarse for point in results.all_points()}
    assert [item.against for item in found.paired] == ["dense", "dense-repaired"]
    for item in found.paired:
        assert item.difference == pytest.approx(accuracy[item.point] - accuracy[item.against])
        assert item.low <= item.difference <= item.high
        assert item.images == results.dense.images
    assert found.training.epochs_run == 2


def test_the_repaired_model_keeps_its_form(finished, repaired):
    cut, ours = finished / "points" / POINT / "model", repaired / "model"
    before, after = CompactViT.from_pretrained(cut), CompactViT.from_pretrained(ours)
    assert (after.plan, after.info) == (before.plan, before.info)
    assert (ours / "circuit.json").read_bytes() == (cut / "circuit.json").read_bytes()
    card = (ours / "README.md").read_text()
    assert "best of 2 epochs" in card
    assert "| dense-repaired |" in card
    assert any(
        not torch.equal(one, other)
        for one, other in zip(
            after.state_dict().values(), before.state_dict().values(), strict=True
        )
    )


@pytest.mark.graph
def test_the_repaired_model_can_be_exported(repaired, tmp_path):
    model = CompactViT.from_pretrained(repaired / "model")
    export_onnx(model, tmp_path / "model.onnx", example=torch.randn(2, 3, 16, 16))
    assert (tmp_path / "model.onnx").exists()


def test_the_dense_model_got_the_same_repair(finished, repaired):
    own, its = (
        json.loads((folder / "training.json").read_text())["settings"]
        for folder in (repaired, repaired / "dense-repaired")
    )
    assert {key: own[key] for key in ("config", "loss", "images")} == {
        key: its[key] for key in ("config", "loss", "images")
    }
    dense = vitcut.load_model(finished)
    assert its["start"] == dense.weight_hash
    assert vitcut.load_model(repaired / "dense-repaired").weight_hash != dense.weight_hash


def test_a_finished_repair_is_not_redone(finished, repaired, capsys):
    before = {item: item.stat().st_mtime_ns for item in repaired.rglob("*")}
    results, told = _repair(finished, repaired)
    assert results == Results.load(repaired / "results.json")
    assert told == Repair.load(repaired / REPAIR_FILE)
    assert {item: item.stat().st_mtime_ns for item in repaired.rglob("*")} == before
    assert "results.json is there already" in capsys.readouterr().err


STAGES = {
    "before the compact model is saved": (cutting, "fill_folder"),
    "before the dense model is saved": (Model, "save"),
    "before anything is measured": (points, "measure"),
    "before the card": (cards, "repaired_card"),
    "before the differences": (Repair, "save"),
    "before the results": (Results, "save"),
}


@pytest.fixture(scope="module")
def killed(finished, tmp_path_factory):
    """A repair that was killed at every stage, and then run to its end."""
    out = tmp_path_factory.mktemp("repair") / "killed"
    for owner, name in STAGES.values():
        with pytest.MonkeyPatch.context() as patched:

            def dying(*args, **options):
                raise Killed

            patched.setattr(owner, name, dying)
            with pytest.raises(Killed):
                _repair(finished, out)
        assert not (out / "results.json").exists()
    _repair(finished, out)
    return out


@pytest.mark.parametrize("folder", ["model", "dense-repaired/dense"])
def test_a_killed_repair_ends_with_the_same_weights(repaired, killed, folder):
    one, other = (load_file(out / folder / "model.safetensors") for out in (repaired, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_killed_repair_trains_no_epoch_twice_and_tells_the_same(repaired, killed):
    for path in ("metrics.jsonl", "dense-repaired/metrics.jsonl"):
        rows = [json.loads(line) for line in (killed / path).read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
    one, other = (Repair.load(out / REPAIR_FILE) for out in (repaired, killed))
    assert one.paired == other.paired


def test_a_repaired_dense_model_is_taken_from_another_repair(finished, repaired, tmp_path):
    out, point = tmp_path / "other", "acdc-resample-0.001"
    results, told = _repair(finished, out, point=point, repaired_dense=repaired)
    ours = {p.name: p for p in results.all_points()}["dense-repaired"]
    theirs = {p.name: p for p in Results.load(repaired / "results.json").points}["dense-repaired"]
    assert ours.accuracy_coarse == theirs.accuracy_coarse
    assert told.dense_training == Repair.load(repaired / REPAIR_FILE).dense_training
    assert not (tmp_path / "other" / "dense-repaired").exists()
    again = vitcut.bench(tmp_path / "other", settings=BENCH, out=tmp_path / "bench")
    assert [p.accuracy_coarse for p in again.points] == [p.accuracy_coarse for p in results.points]


def test_a_repaired_dense_model_of_other_settings_is_refused(finished, repaired, tmp_path):
    other = replace(FINETUNE, learning_rate=1e-3)
    with pytest.raises(
        ArtefactError, match=r"other settings: config.learning_rate was 0\.002, now"
    ):
        _repair(finished, tmp_path / "out", settings=other, repaired_dense=repaired)
    assert not (tmp_path / "out").exists()


def test_a_repaired_dense_model_has_to_be_there_and_finished(finished, repaired, tmp_path):
    with pytest.raises(ArtefactError, match="no training file at"):
        _repair(finished, tmp_path / "out", repaired_dense=tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(repaired / "dense-repaired", copy)
    forge(copy / "training.json", lambda content: content.update(result=None))
    with pytest.raises(ArtefactError, match="is not finished"):
        _repair(finished, tmp_path / "out", repaired_dense=copy)


def test_without_the_dense_repair_there_is_one_difference(finished, tmp_path):
    out = tmp_path / "fine"
    results, told = _repair(finished, out, repair_dense=False)
    assert "dense-repaired" not in {point.name for point in results.points}
    assert ([item.against for item in told.paired], told.dense_training) == (["dense"], None)
    assert not (out / "dense-repaired").exists()
    with pytest.raises(ConfigError, match="leave one of them out"):
        _repair(finished, tmp_path / "no", repair_dense=False, repaired_dense="x")


def test_a_repair_is_repaired_again(repaired, tmp_path):
    results, _ = _repair(repaired, tmp_path / "again", point=None, repair_dense=False)
    assert results.points[-1].name == f"{POINT}-repaired-repaired"
    assert (
        results.points[-2].accuracy_coarse
        == Results.load(repaired / "results.json").points[-1].accuracy_coarse
    )


def test_a_model_directory_alone_is_repaired(finished, tmp_path):
    """Its point is read from its circuit; model and images have to be given."""
    model = tmp_path / "alone"
    shutil.copytree(finished / "points" / POINT / "model", model)
    (model / "cut.json").unlink()
    known = Cut.load(find_cut(finished, POINT)).point()
    assert find_run(model) is None
    assert Cut.load(model).point() == replace(
        known, seconds=None, max_abs_diff=None, faithfulness=None
    )
    (model / "circuit.json").unlink()
    told = {"settings": FINETUNE, "bench": BENCH, "repair_dense": False}
    results = vitcut.finetune(model, *_load(finished), **told).results
    assert results.points[-1].name == "cut-repaired"
    assert results.points[-1].circuit is None


def test_a_model_that_sees_nothing_is_refused(finished, tmp_path):
    dense, images = _load(finished)
    circuit = Circuit.full(dense.weights.graph, ablation="zero")
    blind = replace(circuit, kept=circuit.kept & False)
    model = compile_circuit(dense.weights, blind, zero_fill(dense.weights))
    with pytest.raises(ModelError, match=r"gives every image the same logits.*: cut less"):
        require_sight(model)
    model.save_pretrained(tmp_path / "blind")
    with pytest.raises(ModelError, match="cut less"):
        vitcut.finetune(tmp_path / "blind", dense, images, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"source_sha256": "f" * 64}, ModelError, "cut from weights that hash to ffffffffffff"),
        ({"class_names": ("cat",) * 4}, TaskError, "not those of task 'shapes'"),
        ({"group_of_class": (1, 0, 1, 0)}, TaskError, "not those of task 'shapes'"),
    ],
)
def test_a_cut_of_another_model_or_task_is_refused(finished, tmp_path, change, kind, message):
    cut = Cut.load(find_cut(finished, POINT))
    cut.model.info = replace(cut.model.info, **change)
    with pytest.raises(kind, match=message):
        vitcut.finetune(cut, *_load(finished), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_repair_is_refused(finished, repaired):
    with pytest.raises(ArtefactError, match=r"other settings: finetune.seed was 0, now 1"):
        _repair(finished, repaired, settings=replace(FINETUNE, seed=1))
    with pytest.raises(ArtefactError, match="other settings: start was"):
        _repair(finished, repaired, point="acdc-resample-0.001")


def test_a_damaged_record_of_a_repair_is_refused(repaired, tmp_path):
    for change in ({"paired": [{"point": 1}]}, {"training": None}, {"dense_training": 3}):
        shutil.copyfile(repaired / REPAIR_FILE, tmp_path / REPAIR_FILE)
        forge(tmp_path / REPAIR_FILE, lambda content, change=change: content.update(change))
        with pytest.raises(ArtefactError, match=r"repair\.json is not a repair file"):
            Repair.load(tmp_path / REPAIR_FILE)


def test_the_verb_repairs_and_shows_the_differences(finished, repaired, tmp_path, capsys):
    out = tmp_path / "fine"
    words = ["finetune", str(finished), "--point", POINT, "--repaired-dense", str(repaired)]
    assert main([*words, *FLAGS, *TIMING, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{POINT}-repaired against dense-repaired: coarse accuracy " in printed
    assert f"next: vitcut export {out} --to onnx" in printed
    one, other = (load_file(path / "model" / "model.safetensors") for path in (out, repaired))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert main(["show", str(out)]) == 0
    assert "against dense-repaired: coarse accuracy" in capsys.readouterr().out
