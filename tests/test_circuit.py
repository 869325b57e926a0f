import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError, CircuitError
from vitcut.graph import Graph

GRAPH = Graph(num_layers=2, num_heads=2)
SMALL = Graph(num_layers=1, num_heads=2)


@st.composite
def any_circuits(draw):
    graph = Graph(num_layers=draw(st.integers(1, 3)), num_heads=draw(st.integers(1, 3)))
    return draw(circuits(graph))


@st.composite
def alike(draw):
    """Two circuits of one graph and ablation."""
    one, other = draw(circuits(GRAPH)), draw(circuits(GRAPH))
    return one, other.with_ablation(one.ablation)


def _circuit(**given):
    return Circuit(graph=GRAPH, kept=GRAPH.edges, ablation="mean", **given)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "circuit.json"
    kept = GRAPH.edges.copy()
    kept[0] = False
    Circuit(graph=GRAPH, kept=kept, ablation="mean").save(path)
    return path


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _expect_refusal(path, match):
    with pytest.raises(ArtefactError, match=match) as caught:
        Circuit.load(path)
    assert "\n" not in str(caught.value)


@given(any_circuits())
@settings(max_examples=40)
def test_a_saved_circuit_comes_back_equal(tmp_path_factory, circuit):
    path = tmp_path_factory.mktemp("saved") / "circuit.json"
    circuit.save(path)
    loaded = Circuit.load(path)
    assert loaded == circuit
    assert hash(loaded) == hash(circuit)
    assert loaded.fingerprint == circuit.fingerprint


def test_origin_comes_back_too(tmp_path):
    provenance = {"model": "animals", "settings": {"images": 4}}
    circuit = _circuit(method="acdc", task="drawn", tau=0.01, provenance=provenance)
    circuit.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json")
    assert (loaded.method, loaded.task, loaded.tau) == ("acdc", "drawn", 0.01)
    assert loaded.provenance == provenance


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c["kept"]["mlp.0"].append("embed"), id="an edge more"),
        pytest.param(lambda c: c["kept"]["classifier"].pop(), id="an edge less"),
        pytest.param(lambda c: c.update(ablation="zero"), id="other ablation"),
        pytest.param(lambda c: c.update(tau=0.5), id="other tau"),
        pytest.param(lambda c: c.update(task="flowers"), id="other task"),
        pytest.param(lambda c: c["provenance"].update(kl=0.0), id="other KL"),
        pytest.param(lambda c: c.update(sha256=None), id="null for a hash"),
    ],
)
def test_an_altered_file_is_refused(file, change):
    _edit(file, change)
    _expect_refusal(file, "was altered")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c["kept"]["mlp.0"].append("mlp.1"), id="no edge"),
        pytest.param(lambda c: c["kept"]["mlp.0"].append("attn.9.9"), id="unknown source"),
        pytest.param(lambda c: c["kept"].update({"mlp.9": ["embed"]}), id="unknown target"),
        pytest.param(lambda c: c["kept"].update({"mlp.0": 3}), id="a number for a list"),
        pytest.param(lambda c: c.pop("graph"), id="no graph"),
        pytest.param(lambda c: c.pop("sha256"), id="no hash"),
        pytest.param(lambda c: c.update(tau=float("nan")), id="NaN"),
        pytest.param(lambda c: c.update(provenance=["abc"]), id="a list as provenance"),
        pytest.param(lambda c: c.update(graph={"num_layers": "2", "num_heads": 2}), id="text"),
        pytest.param(lambda c: c.update(kept=[]), id="a list of edges"),
        pytest.param(lambda c: c.update(provenance=3), id="a number as provenance"),
        pytest.param(lambda c: c.update(ablation="magic"), id="unknown ablation"),
        pytest.param(lambda c: c.update(ablation=[]), id="a list as ablation"),
    ],
)
def test_a_malformed_file_is_refused(file, change):
    _edit(file, change)
    _expect_refusal(file, "is not a valid circuit")


def test_a_truncated_file_is_refused(file):
    file.write_text(file.read_text()[:-20])
    _expect_refusal(file, "not a readable circuit file")


def test_a_file_of_a_newer_version_is_refused(file):
    _edit(file, lambda content: content.update(format_version=99))
    _expect_refusal(file, "format_version 99.*upgrade vitcut")


@pytest.mark.parametrize("text", ["{}", "[]", '{"nodes": {}, "edges": {}}', "null"])
def test_a_foreign_file_is_refused(file, text):
    file.write_text(text)
    _expect_refusal(file, "no format_version")


def test_a_missing_file_is_refused(tmp_path):
    _expect_refusal(tmp_path / "circuit.json", "no circuit file at")


def test_what_is_no_edge_cannot_be_kept():
    kept = GRAPH.edges.copy()
    kept[GRAPH.mlp_source(0), GRAPH.mlp_target(0)] = True
    with pytest.raises(CircuitError, match=r"mlp\.0 -> mlp\.0 is not an edge"):
        Circuit(graph=GRAPH, kept=kept, ablation="mean")


def test_a_mask_of_another_graph_is_refused():
    with pytest.raises(CircuitError, match="this graph needs"):
        Circuit(graph=GRAPH, kept=SMALL.edges, ablation="mean")


def test_a_circuit_cannot_be_changed():
    circuit = _circuit(provenance={"model": "animals"})
    with pytest.raises(ValueError, match="read-only"):
        circuit.kept[0, 0] = False
    with pytest.raises(TypeError, match="mappingproxy"):
        circuit.provenance["model"] = "other"
    with pytest.raises(AttributeError):
        circuit.ablation = "zero"


def test_what_it_was_made_of_stays_the_callers():
    kept, provenance = GRAPH.edges.copy(), {"model": "animals"}
    circuit = Circuit(graph=GRAPH, kept=kept, ablation="mean", provenance=provenance)
    kept[:] = False
    provenance["model"] = "other"
    assert circuit.num_kept == GRAPH.num_edges
    assert circuit.provenance["model"] == "animals"


def _paths(circuit):
    """Every kept path from any source to the classifier, as sets of sources, by walking back."""
    graph, found = circuit.graph, []

    def walk(target, later):
        for source in np.flatnonzero(circuit.kept[:, target]):
            found.append((int(source), *later))
            for earlier in graph.targets_of(int(source)):
                walk(earlier, (int(source), *later))

    walk(graph.classifier, ())
    return found


def _reachable(circuit):
    graph, found = circuit.graph, {0}
    for _ in graph.sources:
        found |= {
            graph.sources_of(int(target))[0]
            for source in found
            for target in np.flatnonzero(circuit.kept[source])
            if target != graph.classifier
        }
    return found


@st.composite
def sparse_circuits(draw):
    """Few enough edges that all paths can be walked."""
    kept = np.zeros(GRAPH.edges.shape, dtype=bool)
    edges = [tuple(edge) for edge in np.argwhere(GRAPH.edges)]
    for edge in draw(st.lists(st.sampled_from(edges), max_size=22)):
        kept[edge] = True
    return Circuit(graph=GRAPH, kept=kept, ablation="zero")


@given(sparse_circuits() | circuits(SMALL))
def test_live_reached_and_kept_heads_agree_with_a_walk_of_all_paths(circuit):
    paths, graph = _paths(circuit), circuit.graph
    live = {source for path in paths for source in path}
    reached = _reachable(circuit)
    from_embed = {source for path in paths if path[0] == 0 for source in path}
    heads = {number for number, source in enumerate(graph.sources) if source.role == "head"}
    assert set(np.flatnonzero(circuit.live_sources)) == live
    assert set(np.flatnonzero(circuit.reached_sources)) == reached
    assert circuit.num_heads_kept == len(heads & from_embed)


def test_the_full_circuit_keeps_every_edge_and_head():
    circuit = Circuit.full(GRAPH)
    assert circuit.num_kept == GRAPH.num_edges
    assert circuit.num_heads_kept == 4
    assert circuit.live_sources.all()
    assert circuit.reached_sources.all()


@given(alike())
def test_and_or_not_obey_the_laws_of_sets(pair):
    one, other = pair
    full = Circuit.full(GRAPH, ablation=one.ablation)
    assert one & other == other & one
    assert one | other == other | one
    assert ~(one & other) == ~one | ~other
    assert ~~one == one
    assert one | ~one == full
    assert (one & ~one).num_kept == 0
    assert (one & other).num_kept + (one | other).num_kept == one.num_kept + other.num_kept
    np.testing.assert_array_equal((one & other).kept, one.kept & other.kept)


def test_a_combination_says_what_it_was_made_of():
    full = _circuit(method="acdc", tau=0.1)
    nothing = ~full
    assert (nothing.method, nothing.tau) == ("complement", None)
    assert nothing.provenance == {"not": full.fingerprint}
    assert (full & nothing).provenance == {"and": [full.fingerprint, nothing.fingerprint]}
    assert (full | nothing).provenance == {"or": [full.fingerprint, nothing.fingerprint]}


@pytest.mark.parametrize(
    "other",
    [
        Circuit.full(SMALL),
        Circuit.full(GRAPH, ablation="zero"),
        _circuit(task="flowers"),
        _circuit(provenance={"weight_hash": "abc"}),
    ],
    ids=["graph", "ablation", "task", "model"],
)
def test_circuits_of_another_model_task_or_ablation_are_not_combined(other):
    with pytest.raises(CircuitError, match="one model, task and ablation"):
        _ = Circuit.full(GRAPH) & other


@pytest.mark.parametrize("other", [Circuit.full(SMALL), Circuit.full(GRAPH, ablation="zero")])
def test_circuits_of_another_graph_or_ablation_differ(other):
    assert Circuit.full(GRAPH) != other


def test_another_ablation_keeps_the_edges_and_names_the_one_of_discovery():
    found = Circuit(graph=GRAPH, kept=GRAPH.edges, ablation="resample", provenance={"kl": 0.1})
    cut = found.with_ablation("mean")
    assert (cut.ablation, found.ablation) == ("mean", "resample")
    np.testing.assert_array_equal(cut.kept, found.kept)
    assert cut.provenance == {"kl": 0.1, "discovered_under": "resample"}
    assert cut.fingerprint != found.fingerprint


def test_the_same_ablation_changes_nothing():
    circuit = _circuit()
    assert circuit.with_ablation("mean") is circuit


def test_discovery_is_remembered_over_several_changes_of_ablation():
    found = Circuit(graph=GRAPH, kept=GRAPH.edges, ablation="resample")
    twice = found.with_ablation("mean").with_ablation("zero")
    assert twice.provenance["discovered_under"] == "resample"


def test_a_circuit_is_not_equal_to_anything_else():
    assert Circuit.full(GRAPH) != "circuit"
