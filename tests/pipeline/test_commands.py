import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import vitcut
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, CircuitError, ConfigError
from vitcut.images.settings import DataSettings
from vitcut.model import tracing
from vitcut.model.given import Given
from vitcut.pipeline.checks import calibrate
from vitcut.pipeline.commands import (
    bench_command,
    cut_command,
    discover_command,
    find_circuit,
    find_origin,
    resolve_origin,
)
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.subject import Origin
from vitcut.results import Results
from vitcut.task import parse_task

DATA = DataSettings()
FOUND = DiscoverSettings(tau=0.03, images=8, ablation="resample")
SEARCH = ["--ablation", "resample", "--images", "8"]
CUT = CutSettings(images=32, verify_images=8)
BENCH = BenchSettings(
    runtimes=("torch",), batches=(1, 256), seconds=0.05, min_rounds=3, min_sample_ms=0.1
)


@pytest.fixture(scope="module")
def found(finished, tmp_path_factory):
    """What ``discover --model RUN`` writes."""
    out = tmp_path_factory.mktemp("verbs") / "found"
    flags = ["--tau", "0.03", *SEARCH, "--out", str(out)]
    assert main(["discover", "--model", str(finished), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def cut(found, tmp_path_factory):
    """What ``cut`` makes of it, with a timing that is shorter than the command line's."""
    out = tmp_path_factory.mktemp("verbs") / "cut"
    path = find_circuit(found, None)
    cut_command(Circuit.load(path), find_origin(path), CUT, BENCH, out)
    return out


def test_discovery_by_itself_finds_the_circuit_of_the_run(finished, found):
    ours, runs = (
        Circuit.load(find_circuit(path, "acdc-resample-0.03")) for path in (found, finished)
    )
    assert ours == runs
    assert (ours.method, ours.task, ours.tau) == ("acdc", "shapes", 0.03)


def test_a_run_directory_is_the_model_that_it_is_about(finished, found, cut, monkeypatch):
    own = vitcut.load_model(finished)
    for run in (found, cut, str(cut)):
        assert vitcut.load_model(run).weight_hash == own.weight_hash

    def measured(shape, *_args, **_settings):
        raise ArtefactError(f"{shape.num_layers} blocks")

    monkeypatch.setattr("vitcut.pipeline.checks.measure_circuits", measured)
    with pytest.raises(ArtefactError, match="2 blocks"):
        calibrate(str(cut), models=3, seconds=0.01)


def test_what_is_said_of_a_runs_model_goes_before_what_the_run_says(tmp_path, finished):
    origin = Origin.load(finished)
    given = Given(random_weights=True, image_size=32)
    about = replace(origin, model="timm:test_vit", given=given)
    about.claim(RunFolder(tmp_path / "run", about.settings()))
    assert vitcut.load_model(tmp_path / "run").image_size == 32
    assert vitcut.load_model(tmp_path / "run", image_size=48).image_size == 48


@pytest.mark.parametrize("verb", ["discover", "cut"])
def test_a_model_that_is_not_understood_is_refused_before_images_are_touched(
    found, tmp_path, capsys, monkeypatch, verb
):
    monkeypatch.setattr("vitcut.pipeline.classes.prepare", None)
    run = [str(found)] if verb == "cut" else ["--tau", "0.1"]
    model = ["--model", "timm:swin_tiny_patch4_window7_224", "--random-weights", "true"]
    typed = [verb, *run, *model, "--source", "drawn", "--task", "drawn"]
    assert main([*typed, "--out", str(tmp_path / "out")]) == 2
    assert "not supported: SwinTransformer" in capsys.readouterr().err


def test_a_model_is_checked_once_for_a_run(finished, monkeypatch):
    counted = []
    check = tracing._require_same_logits
    monkeypatch.setattr(
        tracing, "_require_same_logits", lambda *both: counted.append(1) or check(*both)
    )
    pair = parse_task("classes: [disc, grid]", origin="pair.yaml")
    subject = replace(Origin.load(finished), task=pair).load_subject()
    assert subject.weights.num_classes == 2
    assert len(counted) == 1


def test_a_circuit_that_is_there_is_not_searched_again(finished, found, capsys):
    path = find_circuit(found, None)
    before = path.stat().st_mtime_ns
    discover_command(resolve_origin(str(finished), None, DATA), FOUND, found)
    assert path.stat().st_mtime_ns == before
    assert "is there: nothing to do" in capsys.readouterr().err


def test_a_cut_by_itself_gives_the_model_of_the_run(finished, cut):
    ours = load_file(cut / "model" / "model.safetensors")
    runs = load_file(finished / "points" / "acdc-resample-0.03" / "model" / "model.safetensors")
    assert all(torch.equal(ours[key], runs[key]) for key in runs)
    point = Results.load(cut / "results.json").points[-1]
    run_point = Results.load(finished / "results.json").points[1]
    assert (point.name, point.circuit, point.model) == (
        "acdc-resample-0.03",
        "model/circuit.json",
        "model",
    )
    assert point.accuracy_coarse == run_point.accuracy_coarse
    assert point.kl == run_point.kl
    assert point.faithfulness == run_point.faithfulness


def test_a_batch_larger_than_the_test_images_is_timed(cut):
    rows = Results.load(cut / "results.json").dense.latency
    assert [row.batch for row in rows] == [1, 256]


def test_a_finished_cut_is_not_redone(found, cut, capsys):
    path = find_circuit(found, None)
    before = {item: item.stat().st_mtime_ns for item in cut.rglob("*")}
    cut_command(Circuit.load(path), find_origin(path), CUT, BENCH, cut)
    assert {item: item.stat().st_mtime_ns for item in cut.rglob("*")} == before
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_a_run_is_measured_again_with_its_own_models(finished, tmp_path):
    before = (finished / "results.json").read_bytes()
    results = bench_command(finished, BENCH, tmp_path / "bench")
    assert (finished / "results.json").read_bytes() == before
    earlier = Results.load(finished / "results.json")
    for new, old in zip(results.all_points(), earlier.all_points(), strict=True):
        assert (new.name, new.accuracy_fine, new.kl) == (old.name, old.accuracy_fine, old.kl)
    assert Results.load(tmp_path / "bench" / "results.json") == results


def test_what_was_not_measured_is_refused_with_what_to_do(finished, found, cut, tmp_path):
    refused = {
        found: f"a circuit is measured when it is cut: vitcut cut {found}",
        cut / "model": f"give the run directory that it lies in, {cut}",
        finished / "points" / "acdc-resample-0.03": f"that it lies in, {finished}",
        tmp_path: "expected the run directory of a finished `vitcut run`, `cut` or `finetune`",
    }
    for path, remedy in refused.items():
        with pytest.raises(ArtefactError) as caught:
            bench_command(path, BENCH, tmp_path / "bench")
        assert str(caught.value).startswith(f"nothing was measured in {path}: ")
        assert str(caught.value).endswith(remedy)
    assert not (tmp_path / "bench").exists()


def test_a_run_directory_given_as_a_compact_model_names_its_models(finished, cut, tmp_path):
    with pytest.raises(ArtefactError, match=f"give one of its models: {cut / 'model'}$"):
        CompactViT.from_pretrained(cut)
    with pytest.raises(ArtefactError, match=str(finished / "points/acdc-resample-0.001/model")):
        CompactViT.from_pretrained(finished)
    with pytest.raises(ArtefactError, match=r"expected a model directory that vitcut wrote, with"):
        CompactViT.from_pretrained(tmp_path)


def test_a_run_directory_can_be_moved(finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    assert Origin.load(moved).model == str(moved)
    assert find_origin(moved / "points" / "acdc-resample-0.03" / "circuit.json") == Origin.load(
        moved
    )


def test_a_relative_model_is_found_from_everywhere(finished, monkeypatch):
    monkeypatch.chdir(finished.parent)
    task = json.dumps(Origin.load(finished).task.to_dict())
    (finished.parent / "task.yaml").write_text(task)
    for model, given in (("finished", None), ("finished/dense", "task.yaml")):
        origin = resolve_origin(model, given, DATA)
        assert origin.model == str(finished.parent / model)


def test_a_source_typed_for_a_cut_keeps_the_model_of_the_run(finished):
    base = Origin.load(finished)
    typed = DataSettings(source="elsewhere.zip", skip_bad_images=True)
    origin = resolve_origin(None, None, typed, base=base)
    assert (origin.model, origin.task) == (base.model, base.task)
    assert (origin.data.source, origin.data.skip_bad_images) == ("elsewhere.zip", True)
    assert origin.data.seed == base.data.seed


def test_a_model_typed_for_a_cut_takes_the_place_of_the_runs(finished):
    origin = resolve_origin("animals", None, DATA, base=Origin.load(finished))
    assert (origin.model, origin.task.name) == ("animals", "shapes")


def test_a_circuit_of_other_weights_is_not_cut(finished, found, tmp_path):
    circuit = Circuit.load(find_circuit(found, None))
    foreign = replace(circuit, provenance={**circuit.provenance, "weight_hash": "f" * 64})
    with pytest.raises(CircuitError, match="found in a model whose weights hash to ffffffffffff"):
        cut_command(foreign, Origin.load(finished), CUT, BENCH, tmp_path / "cut")


def test_a_model_folder_typed_for_a_cut_keeps_task_and_images_of_the_run(finished):
    base = Origin.load(finished)
    origin = resolve_origin(str(finished / "dense"), None, DATA, base=base)
    assert origin.model == str(finished / "dense")
    assert (origin.task, origin.data) == (base.task, base.data)


def test_other_weights_at_the_same_path_are_noticed(finished, found, tmp_path, capsys):
    copy = tmp_path / "found"
    shutil.copytree(found, copy)
    origin = json.loads((copy / "origin.json").read_text())
    origin["weight_hash"] = "of an earlier training"
    (copy / "origin.json").write_text(json.dumps(origin))
    flags = ["--tau", "0.03", *SEARCH, "--out", str(copy)]
    assert main(["discover", "--model", str(finished), *flags]) == 2
    assert "was begun with other weights" in capsys.readouterr().err


def test_a_tau_that_shares_a_name_with_another_is_refused(finished, found, capsys):
    flags = ["--tau", "0.0300000001", *SEARCH, "--out", str(found)]
    assert main(["discover", "--model", str(finished), *flags]) == 2
    assert "was found at tau 0.03, not 0.0300000001" in capsys.readouterr().err


def test_a_directory_holds_the_circuits_of_several_taus(found, capsys):
    flags = ["--tau", "0.2", *SEARCH, "--out", str(found)]
    model = Origin.load(found).model
    assert main(["discover", "--model", model, *flags]) == 0
    assert find_circuit(found, "acdc-resample-0.2").exists()
    assert find_circuit(found, "acdc-resample-0.03").exists()
    shutil.rmtree(found / "points" / "acdc-resample-0.2")


def test_what_is_given_replaces_what_the_run_brings(finished):
    origin = resolve_origin(str(finished), "drawn", DataSettings(source="elsewhere"))
    assert origin.task.name == "drawn"
    assert origin.data.source == "elsewhere"
    assert origin.data.image_size == 16


def test_a_model_without_a_task_asks_for_one(tmp_path):
    with pytest.raises(ConfigError, match="brings no task along: give --task"):
        resolve_origin(str(tmp_path), None, DATA)


def test_one_of_several_points_has_to_be_chosen(finished, tmp_path):
    with pytest.raises(
        ArtefactError, match=r"2 points: choose --point acdc-resample-0.001, acdc-resample-0.03"
    ):
        find_circuit(finished, None)
    with pytest.raises(
        ArtefactError,
        match=r"has no point 'acdc-1': it has acdc-resample-0.001, acdc-resample-0.03",
    ):
        find_circuit(finished, "acdc-1")
    with pytest.raises(ArtefactError, match=r"no circuit at .*expected a circuit\.json"):
        find_circuit(tmp_path, None)


@pytest.mark.parametrize("change", [{"task": None}, {"data": {"bogus": 1}}, {"data": None}])
def test_a_damaged_origin_is_refused(finished, tmp_path, change):
    content = json.loads((finished / "origin.json").read_text())
    (tmp_path / "origin.json").write_text(json.dumps(content | change))
    with pytest.raises(ArtefactError, match=r"origin\.json is damaged"):
        Origin.load(tmp_path)


def test_a_path_outside_every_run_has_no_origin(tmp_path):
    assert find_origin(tmp_path / "circuit.json") is None
