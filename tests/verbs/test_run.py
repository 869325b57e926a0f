import json
import math
import shutil
from dataclasses import fields

import pytest
import yaml
from forging import forge

from vitcut.benchmark import evaluation
from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.results import Point, Results
from vitcut.selection import search as searching

NAMES = ["class-only", "acdc-resample-0.03", "acdc-resample-0.001"]


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def _run(recipe, out, *flags):
    return main(["run", str(recipe), "--out", str(out), *flags])


def test_results_hold_the_dense_model_its_class_only_form_and_every_tau(finished):
    results = Results.load(finished / "results.json")
    assert results.task == "shapes"
    assert results.dense.name == "dense"
    assert [point.name for point in results.points] == NAMES
    assert [point.tau for point in results.points] == [None, 0.03, 0.001]


def test_every_point_has_every_key_and_what_applies_is_measured(finished):
    content = json.loads((finished / "results.json").read_text())
    keys = {item.name for item in fields(Point)}
    measured = {
        *("edges_total", "edges_kept", "heads_total", "heads_kept", "images", "confusion"),
        *("accuracy_fine", "accuracy_coarse", "macs", "params", "bytes", "latency"),
    }
    compiled = measured | {"method", "ablation", "kl", "max_abs_diff"}
    searched = compiled | {"seconds", "circuit", "model", "tau", "faithfulness"}
    for point in [content["dense"], *content["points"]]:
        assert set(point) == keys
        expected = {"dense": measured, "class-only": compiled}.get(point["name"], searched)
        assert [key for key in sorted(expected) if point[key] is None] == []
        assert [row["runtime"] for row in point["latency"]] == ["torch"]
        assert point["images"] == sum(map(sum, point["confusion"])) == 200


def test_compact_models_compute_the_masked_ones(finished):
    for point in Results.load(finished / "results.json").points:
        assert point.max_abs_diff < 1e-4


def test_the_class_only_point_is_the_dense_model(finished):
    results = Results.load(finished / "results.json")
    dense, uncut = results.dense, results.points[0]
    assert uncut.accuracy_fine == dense.accuracy_fine
    assert math.isclose(uncut.kl, 0, abs_tol=1e-6)
    assert (uncut.edges_kept, uncut.heads_kept) == (dense.edges_kept, dense.heads_kept) == (46, 4)
    assert uncut.macs < dense.macs


def test_a_smaller_tau_keeps_more(finished):
    coarse, fine = Results.load(finished / "results.json").points[1:]
    assert coarse.edges_kept < fine.edges_kept <= 46
    assert coarse.macs <= fine.macs


def test_paths_in_the_results_lead_to_circuits_and_models(finished):
    for point in Results.load(finished / "results.json").points:
        if point.name == "class-only":
            assert (point.circuit, point.model) == (None, None)
            continue
        circuit = Circuit.load(finished / point.circuit)
        model = CompactViT.from_pretrained(finished / point.model)
        assert circuit.num_kept == point.edges_kept
        assert model.info.group_names == ("plain", "striped")
        assert point.name in (finished / point.model / "README.md").read_text()


def test_a_complete_run_is_not_touched_again(recipe, finished, capsys):
    before = _files(finished)
    assert _run(recipe, finished) == 0
    assert _files(finished) == before
    out, err = capsys.readouterr()
    assert f"{finished / 'results.json'} is there already" in err
    assert "acdc-resample-0.03" in out


def test_a_run_of_other_settings_is_refused_by_the_key_that_differs(recipe, finished, capsys):
    before = _files(finished)
    assert _run(recipe, finished, "--train.epochs", "4") == 2
    assert _files(finished) == before
    assert (
        "other settings: train.epochs was 6, now 4; choose another --out" in capsys.readouterr().err
    )


def test_only_what_is_missing_is_made_again(recipe, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "points" / NAMES[1] / "model")
    kept = [copy / "dense", copy / "points" / NAMES[1] / "circuit.json"]
    before = [_files(path) or path.stat().st_mtime_ns for path in kept]
    assert _run(recipe, copy) == 0
    assert [_files(path) or path.stat().st_mtime_ns for path in kept] == before
    assert [point.name for point in Results.load(copy / "results.json").points] == NAMES


def test_an_edited_label_file_is_noticed_even_by_a_complete_run(recipe, finished, capsys):
    labels = recipe.parent / "shapes.yaml"
    before = labels.read_text()
    try:
        for text, code in ((before, 0), (before.replace("disc: disc", "ring: ring"), 2)):
            labels.write_text(text)
            assert _run(recipe, finished) == code
    finally:
        labels.write_text(before)
    assert "holds a run of other settings: images.task.groups" in capsys.readouterr().err


def test_other_images_at_the_same_path_are_noticed(recipe, finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    forge(copy / "config.yaml", lambda c: c["images"].update(fingerprint="of other pictures"))
    assert _run(recipe, copy) == 2
    assert "begun with other images or another label file" in capsys.readouterr().err


def test_more_images_than_there_are_stop_the_run_before_it_trains(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert _run(recipe, out, "--discover.images", "541") == 2
    assert "images must be between 1 and 540" in capsys.readouterr().err
    assert not out.exists()


def test_the_settings_are_written_in_full(finished):
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["train"]["epochs"] == 6
    assert settings["train"]["weight_decay"] == 0.05
    assert settings["discover"]["pairs"] == "one_random"
    assert settings["images"]["task"]["name"] == "shapes"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "dense/README.md"])
def test_no_file_is_left_unnamed(finished, name):
    assert (finished / name).is_file()
    assert not [path for path in finished.rglob("*") if ".part" in path.name]


def test_a_run_that_searches_asks_once_whether_its_model_knows_the_task(
    recipe, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(evaluation, "say_if_no_better", lambda *_, **__: asked.append("before"))
    monkeypatch.setattr(searching, "say_if_no_better", lambda *_, **__: asked.append("search"))
    flags = ("--taus", "0.03", "--select.target_macs", "0.6", "--select.rounds", "1")
    assert _run(recipe, tmp_path / "run", *flags, "--train.epochs", "2") == 0
    assert asked == ["before"]
