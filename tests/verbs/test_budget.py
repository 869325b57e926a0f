import json
import shutil
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from forging import forge
from safetensors.torch import load_file

import vitcut
from vitcut.benchmark import points
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs
from vitcut.compiler import cut as cutting
from vitcut.compiler.cut import FILL_FILE, Cut
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ArtefactError, CircuitError
from vitcut.images.load import normalise
from vitcut.masked.fill import Fill
from vitcut.masked.masking import masked_run
from vitcut.results import Results
from vitcut.runs import find_circuit
from vitcut.selection import search as searching
from vitcut.selection.settings import Budget
from vitcut.selection.steps import PathStep, SearchPath
from vitcut.store import sealed, write_json

PATH_FILE, STEP_FILE = "path.json", "step.json"
SHORT = {
    "runtimes": ("torch",),
    "batches": (1,),
    "seconds": 0.05,
    "min_rounds": 3,
    "min_sample_ms": 0.1,
}
BENCH = BenchSettings(**SHORT)
TIMING = [
    *("--runtimes", "torch", "--batches", "1", "--seconds", "0.05", "--min-rounds", "3"),
    *("--min-sample-ms", "0.1"),
]
SELECT = Budget(target_macs=0.55, rounds=2, score_images=16)
CUT = CutSettings(ablation="linear", images=48, verify_images=8)
NAME = "fisher-linear-macs-0.55"


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def _cut(run, out, select=SELECT, cut=CUT):
    model = vitcut.load_model(run)
    images = vitcut.load_images(model=model)
    return vitcut.cut(model, images, budget=select, settings=cut, bench=BENCH, out=out).results


def _cut_circuit(path, out, settings=CUT):
    """Cut to a circuit of a run directory, with that run's model and images."""
    model = vitcut.load_model(vitcut.runs.find_run(path))
    images = vitcut.load_images(model=model)
    return vitcut.cut(model, images, path, settings=settings, bench=BENCH, out=out).results


def _told(out):
    """The results without what differs from one time to the next."""
    content = json.loads((out / "results.json").read_text())
    for point in [content["dense"], *content["points"]]:
        del point["seconds"], point["latency"]
    return content["dense"], content["points"]


def _circuits(out):
    return {path.parent.name: Circuit.load(path) for path in out.glob("path/*/circuit.json")}


def assert_same(one, other):
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert _circuits(one) == _circuits(other)
    assert (one / PATH_FILE).read_bytes() == (other / PATH_FILE).read_bytes()
    assert _told(one) == _told(other)


@pytest.fixture(scope="module")
def cut(finished, tmp_path_factory):
    """What a cut to a budget writes, undisturbed."""
    out = tmp_path_factory.mktemp("budget") / "cut"
    _cut(finished, out)
    return out


def test_the_budget_is_met_and_the_point_says_how(cut):
    results = Results.load(cut / "results.json")
    assert [point.name for point in results.points] == ["class-only", NAME]
    point = results.points[-1]
    assert point.macs <= 0.55 * results.dense.macs
    assert (point.method, point.granularity, point.ablation) == ("fisher", "part", "linear")
    assert point.budget == {"macs": 0.55}
    assert 0 < point.neurons_kept_fraction < 1
    assert 0 <= point.max_abs_diff < 1e-4
    assert (point.circuit, point.model, point.tau) == ("model/circuit.json", "model", None)
    assert point.kl < 0.1
    assert point.accuracy_coarse > 0.6


def test_a_repair_knows_the_budget_of_its_cut(cut):
    assert Cut.load(cut / "model").point().budget == {"macs": 0.55}


def test_the_path_has_a_step_per_round_and_each_costs_less(cut):
    steps = SearchPath.load(cut / PATH_FILE).steps
    assert len(steps) == 2
    macs = [step.macs for step in steps]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == 2
    for step in steps:
        circuit = Circuit.load(cut / step.circuit)
        assert circuit.method == "fisher"
        assert (step.heads_kept, step.neurons_kept_fraction) == (
            circuit.num_heads_kept,
            circuit.neurons_kept_fraction,
        )
        assert PathStep.load(cut / "path" / step.name / STEP_FILE) == step


def test_every_circuit_of_the_path_can_be_cut_by_its_name(cut, tmp_path):
    first = SearchPath.load(cut / PATH_FILE).steps[0]
    path = find_circuit(cut, first.name)
    results = _cut_circuit(path, tmp_path / "out")
    assert results.points[-1].macs == first.macs
    assert find_circuit(cut, None) == cut / "model" / "circuit.json"


def test_the_verb_prints_the_path_and_says_when_there_is_nothing_to_do(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    words = ["cut", "--model", str(finished), "--target-macs", "0.55", "--ablation", "mean"]
    words += ["--rounds", "2", "--images", "32", "--score-images", "16", "--verify-images", "8"]
    words += TIMING
    assert main([*words, "--out", str(out)]) == 0
    first = capsys.readouterr()
    assert "the path, on val images" in first.out
    assert "fisher-mean-macs-0.55" in first.out
    before = {item: item.stat().st_mtime_ns for item in out.rglob("*")}
    assert main([*words, "--out", str(out)]) == 0
    again = capsys.readouterr()
    assert f"{out / 'results.json'} is there already" in again.err
    assert again.out == first.out
    assert {item: item.stat().st_mtime_ns for item in out.rglob("*")} == before


def test_the_saved_fill_is_the_circuits_and_gives_the_compact_model(cut):
    circuit, fill = (
        Circuit.load(cut / "model" / "circuit.json"),
        Fill.load(cut / "model" / FILL_FILE),
    )
    assert fill.circuit == circuit.fingerprint
    assert circuit == _circuits(cut)["macs-0.5500"]
    dense = vitcut.load_model(cut)
    images = vitcut.load_images(model=dense)
    pixels = normalise(images.test.read(range(16)), dense.preprocessing)
    model = CompactViT.from_pretrained(cut / "model")
    with torch.no_grad():
        masked = masked_run(dense.weights, pixels, circuit, fill).logits
        torch.testing.assert_close(model(pixels), masked, atol=1e-4, rtol=1e-4)


def test_two_cuts_come_out_the_same(finished, cut, tmp_path):
    _cut(finished, tmp_path / "again")
    assert_same(cut, tmp_path / "again")


STAGES = {
    "before the first round is measured": (PathStep, "save", 0),
    "in the second round": (Circuit, "save", 0),
    "before the path is written": (SearchPath, "save", 0),
    "before the model is saved": (cutting, "fill_folder", 0),
    "before anything is measured": (points, "measure", 0),
}


def _killed(finished, out, stage, select=SELECT):
    owner, name, times = stage
    left, real = [times], getattr(owner, name)

    def dying(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            _cut(finished, out, select)
    assert not (out / "results.json").exists()


def test_a_cut_that_is_killed_at_every_stage_ends_the_same(finished, cut, tmp_path):
    out = tmp_path / "killed"
    for stage in STAGES.values():
        _killed(finished, out, stage)
    _cut(finished, out)
    assert_same(cut, out)


def test_a_killed_cut_by_first_scores_ends_the_same(finished, tmp_path):
    """Joint scores know what was cut since they were taken, so they are taken up in order."""
    select = replace(SELECT, rescore=False, target_macs=0.65)
    _cut(finished, tmp_path / "whole", select)
    _killed(finished, tmp_path / "killed", (Circuit, "save", 1), select)
    _cut(finished, tmp_path / "killed", select)
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations_meet_the_budget_without_a_fill_of_their_own(finished, tmp_path, ablation):
    select = replace(SELECT, rounds=1)
    results = _cut(finished, tmp_path / "out", select, replace(CUT, ablation=ablation))
    point = results.points[-1]
    assert point.name == f"fisher-{ablation}-macs-0.55"
    assert point.macs <= 0.55 * results.dense.macs
    assert point.max_abs_diff < 1e-4
    assert not (tmp_path / "out" / "model" / FILL_FILE).exists()


@pytest.mark.parametrize("scores", ["random", "magnitude"])
def test_controls_meet_the_budget_too(finished, tmp_path, scores):
    select = replace(SELECT, rounds=1, scores=scores, joint=False)
    results = _cut(finished, tmp_path / "out", select)
    assert results.points[-1].method == scores
    assert results.points[-1].macs <= 0.55 * results.dense.macs


def test_parts_over_whole_tokens_meet_the_budget(finished, tmp_path):
    _cut(finished, tmp_path / "out", replace(SELECT, rounds=1, tokens="all"))
    assert Circuit.load(tmp_path / "out" / "model" / "circuit.json").graph.kinds == ()


def _clock(monkeypatch, milliseconds):
    """Time models by a formula: of the MACs, and of how many were timed before."""
    calls = []

    def measure(models, images, config, *, baselines):
        calls.append(config)
        ratio = 1 / milliseconds(count_macs(models["cut"].plan), len(calls))
        return SimpleNamespace(comparisons=(SimpleNamespace(ratio=ratio),))

    monkeypatch.setattr(searching, "measure_latency", measure)
    return calls


LATENCY = Budget(target_latency=0.5, runtime="torch", score_images=16)
MEAN = replace(CUT, ablation="mean", batch=8)


def test_a_latency_budget_ends_with_the_first_step_that_meets_it(finished, tmp_path, monkeypatch):
    calls = _clock(monkeypatch, lambda macs, _: 0.3 + 0.4 * macs / 34_000)
    results = _cut(finished, tmp_path / "out", LATENCY, MEAN)
    steps = SearchPath.load(tmp_path / "out" / PATH_FILE).steps
    assert steps[-1].latency_fraction <= 0.5
    assert all(step.latency_fraction > 0.5 for step in steps[:-1])
    assert [config.runtimes for config in calls] == [("torch",)] * len(steps)
    point = results.points[-1]
    assert point.name == "fisher-mean-latency-0.5"
    assert point.budget == {"latency": 0.5, "runtime": "torch", "batch": 8}
    assert point.macs == steps[-1].macs


def test_a_killed_latency_search_keeps_what_it_measured(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _clock(monkeypatch, lambda macs, _: 0.4 + 0.2 * macs / 34_000)
    with monkeypatch.context() as patched:
        patched.setattr(SearchPath, "save", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            _cut(finished, out, LATENCY, MEAN)
    steps = {path.parent.name: PathStep.load(path) for path in out.glob(f"path/*/{STEP_FILE}")}
    calls = _clock(monkeypatch, lambda *_: 0.01)
    _cut(finished, out, LATENCY, MEAN)
    assert {step.name: step for step in SearchPath.load(out / PATH_FILE).steps} == steps
    assert calls == []


def test_a_latency_that_nothing_reaches_names_the_nearest(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _clock(monkeypatch, lambda macs, number: 0.9 + number / 100)
    with pytest.raises(
        CircuitError, match=r"target-latency 0\.5 cannot be met.*is 0\.910 of dense"
    ):
        _cut(finished, out, LATENCY, MEAN)
    assert not (out / "results.json").exists()
    assert Circuit.load(next(out.glob("path/*/circuit.json"))).method == "fisher"


def test_a_latency_is_really_measured(finished, tmp_path):
    """On a busy machine the target may be missed; then no path is written."""
    select, out = replace(LATENCY, target_latency=0.95), tmp_path / "out"
    with suppress(CircuitError):
        _cut(finished, out, select, replace(MEAN, batch=64))
    measured = [PathStep.load(path).latency_fraction for path in out.glob(f"path/*/{STEP_FILE}")]
    assert min(measured) > 0
    assert (min(measured) <= 0.95) == (out / "results.json").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [(0.0001, "smallest model that still sees"), (0.9999, "leaves nothing to cut")],
)
def test_an_impossible_budget_is_refused_before_anything_is_written(
    finished, tmp_path, target, message
):
    with pytest.raises(CircuitError, match=message):
        _cut(finished, tmp_path / "out", replace(SELECT, target_macs=target))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{}", '{"steps": [{"name": 1}]}', '{"steps": []}'])
def test_a_damaged_path_is_refused(tmp_path, content):
    write_json(tmp_path / PATH_FILE, sealed(json.loads(content), 2))
    with pytest.raises(ArtefactError, match=r"path\.json is not a path file"):
        SearchPath.load(tmp_path / PATH_FILE)


STEP = {
    "name": "macs-0.5000",
    "circuit": "path/macs-0.5000/circuit.json",
    "macs": 10,
    "macs_fraction": 0.5,
    "accuracy_coarse": 0.9,
    "kl": 0.1,
    "heads_kept": 3,
    "neurons_kept_fraction": 0.5,
    "latency_fraction": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"circuit": "../circuit.json"},
        {"name": "../..", "circuit": "path/../../circuit.json"},
        {"accuracy_coarse": 1.5},
        {"macs": -1},
        {"latency_fraction": 0.0},
        {"change_low": -2.0},
    ],
)
def test_a_step_whose_values_cannot_be_is_refused(tmp_path, change):
    PathStep(**STEP).save(tmp_path / "step.json")
    assert PathStep.load(tmp_path / "step.json") == PathStep(**STEP)
    forge(tmp_path / "step.json", lambda content: content.update(change))
    with pytest.raises(ArtefactError, match=r"step\.json is not a step file"):
        PathStep.load(tmp_path / "step.json")


def test_answers_are_steps_of_the_path(tmp_path):
    SearchPath(steps=(PathStep(**STEP),), answers=("macs-0.5000",)).save(tmp_path / PATH_FILE)
    forge(tmp_path / PATH_FILE, lambda content: content.update(answers=["../../elsewhere"]))
    with pytest.raises(ArtefactError, match=r"answers must be one of macs-0\.5000"):
        SearchPath.load(tmp_path / PATH_FILE)


def test_a_circuit_over_edges_is_cut_with_a_linear_fill(finished, tmp_path):
    path, out = find_circuit(finished, "acdc-resample-0.03"), tmp_path / "out"
    results = _cut_circuit(path, out)
    point = results.points[-1]
    assert (point.granularity, point.ablation, point.tau) == ("edge", "linear", 0.03)
    assert point.max_abs_diff < 1e-4
    fill = Fill.load(out / "model" / FILL_FILE)
    assert fill.circuit == Circuit.load(out / "model" / "circuit.json").fingerprint
    means = Results.load(finished / "results.json").points[1]
    assert point.edges_kept == means.edges_kept


def test_a_cut_that_is_cut_again_keeps_its_ablation(finished, tmp_path):
    path, silent = find_circuit(finished, "acdc-resample-0.03"), replace(CUT, ablation=None)
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    _cut_circuit(path, first)
    own = find_circuit(first, None)
    for out, config in ((again, silent), (other, replace(silent, ablation="zero"))):
        _cut_circuit(own, out, config)
    tensors = [load_file(out / "model" / "model.safetensors") for out in (first, again)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    points = [Results.load(out / "results.json").points[-1] for out in (first, again, other)]
    assert [point.ablation for point in points] == ["linear", "linear", "zero"]
    assert (again / "model" / FILL_FILE).exists()


@pytest.mark.parametrize(
    ("given", "circuit", "expected"),
    [
        (None, "resample", "mean"),
        (None, "zero", "zero"),
        (None, "linear", "linear"),
        (None, None, "linear"),
        ("mean", "linear", "mean"),
        ("zero", None, "zero"),
    ],
)
def test_the_ablation_of_a_cut_is_the_circuits_unless_it_was_given(given, circuit, expected):
    assert CutSettings(ablation=given).ablation_for(circuit) == expected


@pytest.fixture(scope="module")
def run_to_budget(recipe, tmp_path_factory):
    """A run whose recipe ends with a budget and a repair."""
    folder = tmp_path_factory.mktemp("budget")
    settings = yaml.safe_load(recipe.read_text())
    settings["train"] |= {"epochs": 2, "warmup_epochs": 0}
    settings["taus"] = [0.03]
    settings["cut"]["merge"] = True
    settings["select"] = {"target_macs": 0.55, "rounds": 2, "score_images": 16}
    settings["repair"] = {"epochs": 1, "warmup_epochs": 0, "precision": "float32", "device": "cpu"}
    (folder / "budget.yaml").write_text(yaml.safe_dump(settings))
    return folder / "budget.yaml"


def test_a_run_ends_with_a_budget_and_its_repair(run_to_budget, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "run"
    assert main(["run", str(run_to_budget), "--out", str(out)]) == 0
    assert f"{NAME}-repaired" in capsys.readouterr().out
    results = Results.load(out / "results.json")
    names = ["class-only", "acdc-resample-0.03", NAME, f"{NAME}-repaired"]
    assert [point.name for point in results.points] == names
    before, after = results.points[2:]
    assert before.macs == after.macs <= 0.55 * results.dense.macs
    assert (after.budget, after.max_abs_diff) == ({"macs": 0.55}, None)
    merged = ["merge" in (point.faithfulness or {}) for point in results.points]
    assert merged == [False, True, False, False]
    assert after.accuracy_coarse is not None
    for point in (before, after):
        CompactViT.from_pretrained(out / point.model)
        card = (out / point.model / "README.md").read_text()
        assert ("It no longer computes" in card) == (point is after)
    assert find_circuit(out, NAME) == out / "points" / NAME / "model" / "circuit.json"
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "circuit by fisher, linear ablation" in shown
    assert "the path, on val images" in shown


def test_a_run_that_is_killed_in_the_repair_does_not_select_again(
    run_to_budget, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    words = ["run", str(run_to_budget), "--out", str(out)]

    def dying(*args, **options):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("vitcut.training.repair.repair_cut", dying)
        with pytest.raises(Killed):
            main(words)
    monkeypatch.setattr(searching, "Selection", dying)
    assert main(words) == 0
    assert len(Results.load(out / "results.json").points) == 4


def test_a_run_to_an_impossible_budget_stops_before_it_trains(run_to_budget, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["run", str(run_to_budget), "--out", str(out), "--select.target-macs", "0.001"]
    assert main(words) == 2
    assert "target-macs 0.001 cannot be met" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_of_another_budget_is_refused(finished, cut, tmp_path):
    with pytest.raises(ArtefactError, match=r"select\.target_macs was 0\.55, now 0\.5"):
        _cut(finished, cut, replace(SELECT, target_macs=0.5))
    moved = tmp_path / "moved"
    shutil.copytree(cut, moved)
    assert Results.load(moved / "results.json") == Results.load(cut / "results.json")
