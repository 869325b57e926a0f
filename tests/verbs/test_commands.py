import shutil
from dataclasses import replace

import pytest
import torch
from forging import forge
from safetensors.torch import load_file

import vitcut
from vitcut import cli
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, CircuitError
from vitcut.model import tracing
from vitcut.results import Results
from vitcut.runs import Run, find_circuit, read_settings
from vitcut.task import parse_task

FOUND = DiscoverSettings(tau=0.03, images=8, ablation="resample")
CUT = CutSettings(images=32, verify_images=8)
BENCH = BenchSettings(
    runtimes=("torch",), batches=(1, 256), seconds=0.05, min_rounds=3, min_sample_ms=0.1
)
TIMING = [
    *("--runtimes", "torch", "--batches", "1", "--seconds", "0.05", "--min-rounds", "3"),
    *("--min-sample-ms", "0.1"),
]
FLAGS = ["--tau", "0.03", "--images", "8", "--ablation", "resample"]


def _load(run):
    model = vitcut.load_model(run)
    return model, vitcut.load_images(model=model)


@pytest.fixture(scope="module")
def found(finished, tmp_path_factory):
    """What ``discover --model RUN`` writes."""
    out = tmp_path_factory.mktemp("verbs") / "found"
    assert main(["discover", "--model", str(finished), *FLAGS, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def cut(found, tmp_path_factory):
    """What ``cut`` makes of it, with a timing that is shorter than the command line's."""
    out = tmp_path_factory.mktemp("verbs") / "cut"
    vitcut.cut(*_load(found), found, settings=CUT, bench=BENCH, out=out)
    return out


def test_discovery_by_itself_finds_the_circuit_of_the_run(finished, found):
    ours, runs = (
        Circuit.load(find_circuit(path, "acdc-resample-0.03")) for path in (found, finished)
    )
    assert ours == runs
    assert (ours.method, ours.task, ours.tau) == ("acdc", "shapes", 0.03)


def test_a_run_directory_is_the_model_that_it_is_about(finished, found, cut):
    own = vitcut.load_model(finished)
    for run in (found, cut, str(cut)):
        assert vitcut.load_model(run).weight_hash == own.weight_hash


def test_what_is_said_of_a_runs_model_goes_before_what_the_run_says(tmp_path):
    about = {"model": {"model": "timm:test_vit", "random_weights": True, "image_size": 32}}
    Run(tmp_path / "run").claim(about)
    assert vitcut.load_model(tmp_path / "run").preprocessing.image_size == 32
    sized = vitcut.load_model(tmp_path / "run", image_size=48)
    assert sized.preprocessing.image_size == 48
    assert sized.origin == {"model": "timm:test_vit", "random_weights": True, "image_size": 48}


@pytest.mark.parametrize("verb", ["discover", "cut"])
def test_a_model_that_is_not_understood_is_refused_before_images_are_touched(
    found, tmp_path, capsys, monkeypatch, verb
):
    monkeypatch.setattr(cli.api, "load_images", None)
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
    model = vitcut.load_model(finished)
    images = vitcut.load_images(task=pair, model=model)
    assert model.for_task(images.task, images.labels).weights.num_classes == 2
    assert len(counted) == 1


def test_a_circuit_that_is_there_is_not_searched_again(finished, found, capsys):
    path = find_circuit(found, None)
    before = path.stat().st_mtime_ns
    vitcut.discover(*_load(finished), settings=FOUND, out=found)
    assert path.stat().st_mtime_ns == before
    assert "circuit.json is there already" in capsys.readouterr().err


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
    before = {item: item.stat().st_mtime_ns for item in cut.rglob("*")}
    vitcut.cut(*_load(found), found, settings=CUT, bench=BENCH, out=cut)
    assert {item: item.stat().st_mtime_ns for item in cut.rglob("*")} == before
    assert "results.json is there already" in capsys.readouterr().err


def test_a_run_is_measured_again_with_its_own_models(finished, tmp_path):
    before = (finished / "results.json").read_bytes()
    results = vitcut.bench(finished, settings=BENCH, out=tmp_path / "bench")
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
            vitcut.bench(path, settings=BENCH, out=tmp_path / "bench")
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
    shutil.rmtree(finished / "nothing", ignore_errors=True)
    model = vitcut.load_model(moved)
    assert model.origin == {"model": str(moved / "dense")}
    assert model.weight_hash == vitcut.load_model(finished).weight_hash
    assert vitcut.load_images(model=model).task.name == "shapes"


def test_a_relative_model_is_found_from_everywhere(finished, monkeypatch):
    monkeypatch.chdir(finished.parent)
    for model in ("finished", "finished/dense"):
        assert vitcut.load_model(model).origin == {"model": str(finished / "dense")}


def test_a_source_typed_for_a_cut_keeps_the_task_of_the_run(finished, tmp_path):
    own = vitcut.load_model(finished)
    images = vitcut.load_images("drawn", model=own, skip_bad_images=True)
    assert images.task.name == "shapes"
    assert (images.origin["source"], images.origin["skip_bad_images"]) == ("drawn", True)
    (tmp_path / "pair.yaml").write_text("groups: {a: [disc], b: [square]}")
    other = vitcut.load_images(task=tmp_path / "pair.yaml", model=own)
    assert other.task.name == "pair"


def test_a_model_typed_for_a_cut_takes_the_place_of_the_runs(finished, found, tmp_path):
    out = tmp_path / "out"
    model = ["--model", str(finished / "dense")]
    assert main(["cut", str(found), *model, "--images", "8", *TIMING, "--out", str(out)]) == 0
    settings = read_settings(out)
    assert settings["model"]["model"] == str(finished / "dense")
    assert settings["images"]["task"]["name"] == "shapes"


def test_a_circuit_of_other_weights_is_not_cut(finished, found):
    circuit = Circuit.load(find_circuit(found, None))
    foreign = replace(circuit, provenance={**circuit.provenance, "weight_hash": "f" * 64})
    with pytest.raises(CircuitError, match="found in a model whose weights hash to ffffffffffff"):
        vitcut.cut(*_load(finished), foreign, settings=CUT, bench=None)


def test_other_weights_at_the_same_path_are_noticed(finished, found, tmp_path, capsys):
    copy = tmp_path / "found"
    shutil.copytree(found, copy)
    forge(copy / "config.yaml", lambda c: c["model"].update(weight_hash="of an earlier training"))
    assert main(["discover", "--model", str(finished), *FLAGS, "--out", str(copy)]) == 2
    assert "was begun with other weights" in capsys.readouterr().err


def test_a_tau_that_shares_a_name_with_another_is_refused(finished, found, capsys):
    flags = [*FLAGS, "--tau", "0.0300000001", "--out", str(found)]
    assert main(["discover", "--model", str(finished), *flags]) == 2
    assert "holds a circuit of tau 0.03, not 0.0300000001" in capsys.readouterr().err


def test_a_directory_holds_the_circuits_of_several_taus(found, capsys):
    flags = [*FLAGS, "--tau", "0.2", "--out", str(found)]
    assert main(["discover", "--model", str(found), *flags]) == 0
    assert find_circuit(found, "acdc-resample-0.2").exists()
    assert find_circuit(found, "acdc-resample-0.03").exists()
    shutil.rmtree(found / "points" / "acdc-resample-0.2")


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


@pytest.mark.parametrize("change", [{"task": None}, {"bogus": 1}, {"seed": -1}])
def test_damaged_settings_of_a_run_are_refused(finished, tmp_path, change):
    shutil.copytree(finished, tmp_path / "run")
    forge(tmp_path / "run" / "config.yaml", lambda content: content["images"].update(change))
    model = vitcut.load_model(tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"config\.yaml does not describe images"):
        vitcut.load_images(model=model)
