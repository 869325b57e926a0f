import json
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
from forging import forge
from hypothesis import given, settings
from hypothesis import strategies as st

from vitcut.errors import ArtefactError, ConfigError, ModelError
from vitcut.results import Comparison, Latency, Point, Results

MACHINE = {"cpu": "a CPU", "cores": 2, "versions": {"torch": "2.15.0", "openvino": None}}
positive = st.floats(min_value=1e-6, max_value=1e6)
fractions = st.floats(min_value=0, max_value=1)
counts = st.integers(min_value=0, max_value=10**9)


def maybe(strategy):
    return st.none() | strategy


def in_order(p10_ms, rest):
    return Latency(p10_ms=p10_ms, median_ms=2 * p10_ms, p90_ms=2 * p10_ms, **rest)


latencies = st.builds(
    in_order,
    positive,
    st.fixed_dictionaries(
        {
            "runtime": st.sampled_from(["torch", "onnxruntime"]),
            "device": st.just("cpu"),
            "dtype": st.just("float32"),
            "batch": st.integers(1, 1024),
            "threads": st.integers(1, 64),
            "images_per_s": positive,
        }
    ),
)
points = st.builds(
    Point,
    name=st.text(min_size=1),
    method=maybe(st.just("acdc")),
    tau=maybe(positive),
    budget=maybe(st.just({"latency": 0.25, "runtime": "onnxruntime", "batch": 64})),
    edges_total=maybe(counts),
    neurons_kept_fraction=maybe(fractions),
    accuracy_fine=maybe(fractions),
    accuracy_coarse=st.just(7 / 8),
    kl=maybe(positive),
    macs=maybe(counts),
    latency=st.lists(latencies, max_size=3).map(tuple),
    confusion=maybe(st.just(((3, 1), (0, 4)))),
    faithfulness=maybe(st.just({"discovery": {"ablation": "mean", "kl": 0.1}, "cut": None})),
    model=maybe(st.just("points/a/model")),
)


def comparison(point: str, *, against: str = "dense", low: float = 1.5) -> Comparison:
    return Comparison(
        point=point,
        against=against,
        runtime="onnxruntime",
        batch=64,
        threads=1,
        ratio=2.0,
        low=low,
        high=2.5,
    )


def results(*names: str) -> Results:
    cut = tuple(Point(name=name) for name in names)
    return Results(task="animals", machine=MACHINE, dense=Point(name="dense"), points=cut)


@settings(max_examples=40, deadline=None)
@given(st.lists(points, max_size=3, unique_by=lambda point: point.name), st.booleans())
def test_saving_and_loading_is_the_identity(tmp_path_factory, several, with_dense):
    path = tmp_path_factory.mktemp("results") / "results.json"
    dense = several[0] if several and with_dense else None
    cut = tuple(several[1:] if dense else several)
    compared = tuple(comparison(point.name, against=dense.name) for point in cut if dense)
    before = Results(task="animals", machine=MACHINE, dense=dense, points=cut, comparisons=compared)
    before.save(path)
    assert Results.load(path) == before


def test_every_key_is_in_the_file_though_nothing_was_measured(tmp_path):
    path = tmp_path / "results.json"
    results("a").save(path)
    content = json.loads(path.read_text())
    assert list(content) == [
        "format_version", "task", "machine", "dense", "points", "comparisons", "sha256",
    ]  # fmt: skip
    assert list(content["points"][0]) == [
        "name", "method", "granularity", "ablation", "tau", "budget", "edges_total", "edges_kept",
        "heads_total", "heads_kept", "neurons_kept_fraction", "positions_kept_fraction",
        "accuracy_fine", "accuracy_coarse",
        "change_low", "change_high", "kl", "macs", "params", "bytes", "max_abs_diff", "seconds",
        "images", "latency",
        "confusion", "faithfulness", "circuit", "model",
    ]  # fmt: skip
    assert content["points"][0]["kl"] is None
    assert content["dense"]["latency"] == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=3), "upgrade vitcut"),
        (lambda c: c.update(format_version=1), "make it again"),
        (lambda c: c["points"][0].update(model="../../home"), "within the run directory"),
        (lambda c: c["points"][0].update(circuit="/etc/passwd"), "within the run directory"),
        (lambda c: c["points"][0].update(heads_kept=3, heads_total=2), "what point 'a' keeps"),
        (lambda c: c["points"][0].update(macs=-1), "macs of point 'a' must be >= 0"),
        (lambda c: c["points"][0].update(change_low=0.2, change_high=0.1), "must not fall"),
        (lambda c: c["points"][0].update(confusion=[[3, 1], [0, 4]]), "contradicts its accuracy"),
        (lambda c: c["points"][0].update(ablation="magic"), "Invalid enum value"),
        (lambda c: c["points"][0].update(budget={"macs": "0.2"}), "budget"),
        (lambda c: c["points"][0].update(faithfulness={"cut": {"kl": 1.0}}), "faithfulness"),
        (lambda c: c.update(machine={}), "does not say its cpu"),
        (
            lambda c: c.update(comparisons=[asdict(comparison("b"))]),
            "compares point 'b', which it does not hold",
        ),
        (lambda c: c.pop("format_version"), "no format_version"),
        (lambda c: c.pop("dense"), "dense"),
        (lambda c: c["dense"].pop("kl"), "kl"),
        (lambda c: c["dense"].update(speed=3), "speed"),
        (lambda c: c["dense"].update(accuracy_fine=40.0), "accuracy_fine"),
        (lambda c: c.update(points=[c["dense"]]), "two points"),
        (lambda c: c["dense"].update(latency=[{"batch": 1}]), "results file"),
        (lambda c: c.update(points=3), "results file"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_one_line(tmp_path, edit, message):
    path = tmp_path / "results.json"
    results("a").save(path)
    forge(path, edit)
    with pytest.raises(ArtefactError, match=message) as caught:
        Results.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_name(value):
    with pytest.raises(ModelError, match="kl is"):
        Point(name="a", kl=value)


@pytest.mark.parametrize("name", ["accuracy_fine", "accuracy_coarse", "neurons_kept_fraction"])
def test_a_percentage_is_refused_where_a_fraction_belongs(name):
    with pytest.raises(ConfigError, match=name):
        Point(name="a", **{name: 40.0})


def test_a_comparison_and_a_latency_are_found_by_where_they_were_measured():
    latency = Latency(
        runtime="torch",
        device="cpu",
        dtype="float32",
        batch=8,
        threads=1,
        median_ms=2.0,
        p10_ms=1.0,
        p90_ms=3.0,
        images_per_s=4000.0,
    )
    point = Point(name="a", latency=(latency,))
    found = replace(results("a"), comparisons=(comparison("a"),))
    assert point.find_latency(runtime="torch", batch=8) == latency
    assert point.find_latency(runtime="torch", batch=1) is None
    assert found.find_comparison("a", runtime="onnxruntime", batch=64) == comparison("a")
    assert found.find_comparison("a", runtime="onnxruntime", batch=1) is None


@pytest.mark.parametrize(("low", "differs"), [(1.01, True), (1.0, False), (0.9, False)])
def test_a_speedup_is_claimed_only_if_the_interval_excludes_one(low, differs):
    assert comparison("a", low=low).differs is differs
    assert replace(comparison("a"), low=0.5, high=0.9).differs


def test_two_points_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="'dense'"):
        results("dense")


def test_points_hold_plain_values_only():
    assert json.dumps(asdict(Point(name="a")))
    assert len(fields(Point)) == 28


def test_results_and_bench_settings_load_no_torch():
    code = "import sys, vitcut.results, vitcut.benchmark.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
