"""The commands eval and info: what a model is, and how accurate it is on any images."""

import json
import shutil
from dataclasses import replace

import pytest

import vitcut
from vitcut.cli import main
from vitcut.inputs import load_either
from vitcut.results import Results
from vitcut.selection.settings import Budget

POINT = "acdc-resample-0.03"
TASK = (
    "groups: {plain: {disc: disc, square: square}, striped: {grid: grid of dots, stripes: stripes}}"
)


@pytest.fixture(scope="module")
def point(finished):
    """What the run itself measured of its cut."""
    points = Results.load(finished / "results.json").points
    return next(point for point in points if point.name == POINT)


def test_the_cut_of_a_run_is_as_accurate_as_the_run_says(finished, point, tmp_path, capsys):
    out, dense = tmp_path / "eval", str(finished / "dense")
    words = ["eval", str(finished), "--point", POINT, "--against", dense, "--out", str(out)]
    assert main(words) == 0
    own, other = Results.load(out / "results.json").points
    measured = ("accuracy_coarse", "accuracy_fine", "images", "confusion", "macs", "params")
    assert [getattr(own, key) for key in measured] == [getattr(point, key) for key in measured]
    assert own.kl == pytest.approx(point.kl)
    assert other.name == dense
    assert other.kl is None
    difference = json.loads((out / "difference.json").read_text())
    assert difference["difference"] == pytest.approx(own.accuracy_coarse - other.accuracy_coarse)
    assert difference["low"] <= difference["difference"] <= difference["high"]
    printed = capsys.readouterr().out
    assert f"against {dense}: coarse accuracy" in printed
    assert "images by group and answer" in printed
    assert printed.endswith(f"results: {out}\n")


def test_a_model_directory_alone_knows_its_classes_by_name(finished, point, tmp_path, capsys):
    folder, labels = tmp_path / "moved", tmp_path / "labels.yaml"
    shutil.copytree(finished / point.model, folder)
    # The task of the run gives one class another name than the data does.
    assert main(["eval", str(folder), "--source", "drawn"]) == 2
    assert "names only, such as 'grid of dots': give the label file" in capsys.readouterr().err
    labels.write_text(TASK)
    for given in (folder, vitcut.CompactViT.from_pretrained(folder)):
        model = load_either(given) if given is folder else given
        images = vitcut.load_images("drawn", task=labels, model=model)
        assert vitcut.evaluate(model, images).accuracy_coarse == point.accuracy_coarse
    names = ("disc", "grid", "square", "stripes")
    model.info = replace(model.info, class_names=names)
    images = vitcut.load_images("drawn", model=model)
    assert (images.task.groups, images.task.class_names) == (("plain", "striped"), names)
    assert vitcut.evaluate(model, images).accuracy_coarse == point.accuracy_coarse


def test_a_run_with_several_cuts_asks_which_and_can_give_its_dense_model(finished, capsys):
    assert main(["eval", str(finished)]) == 2
    assert "choose --point" in capsys.readouterr().err
    assert main(["eval", str(finished), "--point", "dense"]) == 0
    assert main(["eval", str(finished), "--point", "nope"]) == 2
    assert "has no point 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--point", POINT, "--arch", "vit_tiny_patch16_224"], "arch is for a dense model"),
        (["--point", POINT, "--device", "cuda:99"], "device 'cuda:99' is not here: torch "),
        (["--point", POINT, "--device", "gpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["--point", POINT, "--task", "drawn"], "the model's classes are not those of task"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words, message, finished, capsys):
    assert main(["eval", str(finished), *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vitcut: error: ")
    assert message in error


def test_a_model_differs_from_itself_in_no_image(finished):
    model = load_either(finished, point=POINT)
    images = vitcut.load_images(model=model)
    found = vitcut.evaluate(model, images, against=model)
    assert (found.difference.low, found.difference.difference, found.difference.high) == (0, 0, 0)
    assert found.kl == pytest.approx(0, abs=1e-12)


def test_info_of_a_dense_model_says_the_smallest_budget_which_can_be_met(finished, capsys):
    found = vitcut.info(vitcut.load_model(finished))
    model = vitcut.load_model(finished)
    images = vitcut.load_images(model=model)
    graphs = model.weights.graph, model.weights.split_graph
    assert found.num_edges == tuple(graph.num_useful_edges for graph in graphs)
    for factor, met in ((1.001, True), (0.999, False)):
        budget = Budget(target_macs=found.smallest_fraction * factor, score_images=8, rounds=1)
        settings = vitcut.CutSettings(images=16, verify_images=4)
        if met:
            cut = vitcut.cut(model, images, budget=budget, settings=settings, bench=None)
            assert vitcut.info(cut).point.macs <= budget.target_macs * found.dense_macs
        else:
            with pytest.raises(vitcut.VitcutError, match="cannot be met"):
                vitcut.cut(model, images, budget=budget, settings=settings, bench=None)
    assert main(["info", str(finished), "--point", "dense"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 blocks x 2 heads of 8, width 16, 32 neurons per MLP" in out
    assert "5: cls 1, patch 4; the classifier reads cls" in out
    assert "classes 4: disc, grid of dots, square, stripes" in out
    assert f"target-macs from {found.smallest_fraction:.3f}" in out


def test_info_of_a_cut_says_what_is_left_and_where_it_came_from(finished, point, capsys):
    assert main(["info", str(finished), "--point", POINT]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cut by vitcut" in out
    assert f"kept {point.heads_kept} of {point.heads_total} heads" in out
    assert "groups plain, striped" in out
    assert "target-macs" not in out.partition("next:")[0]
    assert out.endswith(f"next: vitcut show --plan {finished / point.model}")


def test_a_model_that_cannot_be_read_is_refused_with_the_reason(capsys):
    assert main(["info", "timm:resnet18", "--random-weights"]) == 2
    assert "not supported: ResNet" in capsys.readouterr().err
