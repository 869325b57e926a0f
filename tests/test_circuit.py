import json
from dataclasses import replace

import numpy as np
import pytest
from forging import forge
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits, undisturbed

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError, CircuitError
from vitcut.graph import Graph
from vitcut.store import sha256_file, sha256_json

GRAPH = Graph(num_layers=2, num_heads=2)
SMALL = Graph(num_layers=1, num_heads=2)
SPLIT = Graph(num_layers=2, num_heads=2, kinds=("cls", "patch"), readout=("cls",))


@st.composite
def any_circuits(draw):
    graph = Graph(num_layers=draw(st.integers(1, 3)), num_heads=draw(st.integers(1, 3)))
    return draw(circuits(graph))


@st.composite
def alike(draw):
    """Two circuits of one graph and ablation."""
    one, other = draw(circuits(GRAPH)), draw(circuits(GRAPH))
    return one, other.with_ablation(one.ablation)


@st.composite
@undisturbed
def of_neurons(draw, graph=SPLIT):
    """Circuits of edges, neurons and positions, per token kind."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    neurons = random.random((graph.num_layers, graph.num_kinds, 3))
    positions = random.random(4) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    positions[0] = True
    circuit = replace(draw(circuits(graph)), ablation="linear", positions=positions)
    return replace(circuit, neurons=neurons < draw(st.sampled_from([0.0, 0.5, 1.0])))


def _parts(graph=SPLIT, **cut):
    """Everything but some places of ``heads`` and ``neurons``; three neurons per MLP."""
    heads = np.ones((graph.num_layers, graph.num_heads, graph.num_kinds), dtype=bool)
    neurons = np.ones((graph.num_layers, graph.num_kinds, 3), dtype=bool)
    for place in cut.get("heads", []):
        heads[place] = False
    for place in cut.get("neurons", []):
        neurons[place] = False
    return Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation="linear")


def _circuit(positions=None, **given):
    if positions is not None:
        given["positions"] = np.array(positions, dtype=bool)
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


@given(any_circuits() | of_neurons())
@settings(max_examples=60)
def test_a_saved_circuit_comes_back_equal(tmp_path_factory, circuit):
    path = tmp_path_factory.mktemp("saved") / "circuit.json"
    circuit.save(path)
    loaded = Circuit.load(path)
    assert loaded == circuit
    assert hash(loaded) == hash(circuit)
    assert loaded.fingerprint == circuit.fingerprint
    assert loaded.graph == circuit.graph
    np.testing.assert_array_equal(loaded.kept, circuit.kept)
    np.testing.assert_array_equal(loaded.neurons, circuit.neurons)


def test_origin_comes_back_too(tmp_path):
    provenance = {"model": "animals", "settings": {"images": 4}}
    circuit = _circuit(method="acdc", task="drawn", tau=0.01, provenance=provenance)
    circuit.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json")
    assert (loaded.method, loaded.task, loaded.tau) == ("acdc", "drawn", 0.01)
    assert loaded.provenance == provenance


@pytest.mark.parametrize(
    ("circuit", "file_hash"),
    [
        pytest.param(Circuit.full(SMALL), "0b4b69f8314206e9", id="edges"),
        pytest.param(
            _parts(heads=[(0, 1, 1)], neurons=[(1, 0, 2)]), "9abeb26bbcf7a136", id="parts"
        ),
    ],
)
def test_the_bytes_of_a_file_are_fixed(tmp_path, circuit, file_hash):
    circuit.save(tmp_path / "circuit.json")
    assert sha256_file(tmp_path / "circuit.json").startswith(file_hash)


def test_a_file_of_the_first_version_still_loads(file):
    circuit = Circuit.load(file)

    def of_version_1(content):
        del content["sha256"]
        content["format_version"] = 1
        content["sha256"] = sha256_json(content)

    _edit(file, of_version_1)
    assert Circuit.load(file) == circuit


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
        pytest.param(lambda c: c.pop("sha256"), id="no hash"),
        pytest.param(lambda c: c.update(tau=float("nan")), id="NaN"),
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
        pytest.param(lambda c: c.update(more=1), id="unknown field"),
        pytest.param(lambda c: c.update(tau=-1.0), id="negative tau"),
        pytest.param(lambda c: c["graph"].update(num_layers=10**6), id="a graph beyond its file"),
        pytest.param(lambda c: c["graph"].update(num_layers=True), id="a bool as number"),
        pytest.param(lambda c: c["graph"].update(groups=["cls", "cls"]), id="a kind twice"),
        pytest.param(lambda c: c["kept"]["mlp.0"].append("attn.0.0"), id="other fingerprint"),
        pytest.param(lambda c: c["kept"]["classifier"].append("mlp.0"), id="an edge twice"),
        pytest.param(lambda c: c.update(method=3), id="a number as method"),
        pytest.param(lambda c: c["provenance"].update(kl="0"), id="text as KL"),
        pytest.param(lambda c: c["provenance"].update(merges=[{}]), id="an empty merge"),
        pytest.param(lambda c: c["provenance"].update(discovered_under="x"), id="under nothing"),
        pytest.param(lambda c: c.update(provenance=["abc"]), id="a list as provenance"),
        pytest.param(lambda c: c.update(graph={"num_layers": "2", "num_heads": 2}), id="text"),
        pytest.param(lambda c: c.update(kept=[]), id="a list of edges"),
        pytest.param(lambda c: c.update(provenance=3), id="a number as provenance"),
        pytest.param(lambda c: c.update(ablation="magic"), id="unknown ablation"),
        pytest.param(lambda c: c.update(ablation=[]), id="a list as ablation"),
    ],
)
def test_a_malformed_file_is_refused(file, change):
    forge(file, change)
    _expect_refusal(file, "is not a valid circuit")


def test_a_number_that_json_does_not_have_cannot_be_given_a_hash(file):
    forge(file, lambda content: content.update(tau=1e400))
    _expect_refusal(file, "was altered")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda n: n["kept"]["mlp.0.cls"].append(3), id="a neuron too many"),
        pytest.param(lambda n: n.update(per_mlp=2), id="fewer neurons"),
        pytest.param(lambda n: n.update(per_mlp=0), id="no neurons"),
        pytest.param(lambda n: n.update(per_mlp="3"), id="text"),
        pytest.param(lambda n: n.update(per_mlp=10**9), id="neurons beyond any model"),
        pytest.param(lambda n: n["kept"]["mlp.0.cls"].append(-1), id="a negative number"),
        pytest.param(lambda n: n["kept"].pop("mlp.1.patch"), id="an MLP less"),
        pytest.param(lambda n: n["kept"].update({"mlp.0.cls": {}}), id="no list"),
    ],
)
def test_malformed_neurons_are_refused(tmp_path, change):
    path = tmp_path / "circuit.json"
    _parts().save(path)
    forge(path, lambda content: change(content["neurons"]))
    _expect_refusal(path, "is not a valid circuit")


def test_another_set_of_neurons_is_an_altered_file(tmp_path):
    path = tmp_path / "circuit.json"
    _parts().save(path)
    _edit(path, lambda content: content["neurons"]["kept"]["mlp.0.cls"].pop())
    _expect_refusal(path, "was altered")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: p.update(per_image=3), id="patches too few"),
        pytest.param(lambda p: p.update(per_image=1 << 40), id="patches beyond any image"),
        pytest.param(lambda p: p.update(per_image=0, kept=[]), id="no patches"),
        pytest.param(lambda p: p.update(kept=[]), id="none kept"),
        pytest.param(lambda p: p.update(kept=[0, 0]), id="one twice"),
        pytest.param(lambda p: p.update(kept=[-1]), id="a negative one"),
        pytest.param(lambda p: p.update(kept="0"), id="no list"),
        pytest.param(lambda p: p.pop("kept"), id="no kept"),
    ],
)
def test_malformed_positions_are_refused(tmp_path, change):
    path = tmp_path / "circuit.json"
    _circuit(positions=[True, False, False, True]).save(path)
    forge(path, lambda content: change(content["positions"]))
    _expect_refusal(path, "is not a valid circuit")


def test_only_what_cuts_positions_needs_the_newest_format(tmp_path):
    path = tmp_path / "circuit.json"
    for positions, version in (([True, True], 2), ([True, False], 3)):
        _circuit(positions=positions).save(path)
        assert json.loads(path.read_text())["format_version"] == version


def test_keeping_all_positions_is_no_cut():
    assert _circuit(positions=[True, True]) == _circuit()
    assert _circuit(positions=[True, False]) != _circuit()
    assert _circuit(positions=[True, False]).positions_kept_fraction == 0.5


@pytest.mark.parametrize("positions", [[False, False], [], [[True, False]]])
def test_positions_that_keep_nothing_or_are_no_list_are_refused(positions):
    with pytest.raises(CircuitError, match="positions must be one truth value per patch"):
        _circuit(positions=positions)


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


@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 3), (1, 2, 3), (2, 2, 0)])
def test_neurons_of_another_graph_are_refused(shape):
    with pytest.raises(CircuitError, match=r"needs \(2, 2, neurons\) \(blocks, kinds, neurons\)"):
        Circuit(graph=SPLIT, kept=SPLIT.edges, ablation="mean", neurons=np.ones(shape, dtype=bool))


def test_neurons_are_copied_and_cannot_be_changed():
    neurons = np.ones((2, 2, 3), dtype=bool)
    circuit = Circuit(graph=SPLIT, kept=SPLIT.edges, ablation="mean", neurons=neurons)
    neurons[:] = False
    assert circuit.neurons.all()
    with pytest.raises(ValueError, match="read-only"):
        circuit.neurons[0, 0, 0] = False


def test_a_circuit_of_parts_keeps_every_edge_of_what_it_keeps():
    circuit = _parts(heads=[(0, 1, 1)], neurons=[(1, 0, 2)])
    cut = SPLIT.head_source(0, 1, 1)
    assert not circuit.kept[cut].any()
    others = np.arange(len(SPLIT.sources)) != cut
    np.testing.assert_array_equal(circuit.kept[others], SPLIT.edges[others])
    assert np.argwhere(~circuit.neurons).tolist() == [[1, 0, 2]]
    assert circuit.ablation == "linear"


def test_a_circuit_of_all_parts_keeps_every_edge():
    heads, neurons = np.ones((2, 2, 1), dtype=bool), np.ones((2, 1, 3), dtype=bool)
    circuit = Circuit.of_parts(GRAPH, heads=heads, neurons=neurons, ablation="mean")
    np.testing.assert_array_equal(circuit.kept, GRAPH.edges)


@given(of_neurons(GRAPH))
def test_splitting_keeps_edges_and_neurons_in_every_kind(circuit):
    split = circuit.split(SPLIT.kinds, SPLIT.readout)
    assert split.graph == SPLIT
    for source, target in np.argwhere(SPLIT.edges):
        names = SPLIT.sources[source].name, SPLIT.targets[target].name
        whole = [name.removesuffix(".cls").removesuffix(".patch") for name in names]
        numbers = GRAPH.source_numbers[whole[0]], GRAPH.target_numbers[whole[1]]
        assert split.kept[source, target] == circuit.kept[numbers]
    for kind in range(2):
        np.testing.assert_array_equal(split.neurons[:, kind], circuit.neurons[:, 0])
    assert split.split(SPLIT.kinds, SPLIT.readout) is split


def test_splitting_into_other_kinds_is_refused():
    with pytest.raises(CircuitError, match="use the model that it was found in"):
        _parts().split(("cls", "register", "patch"), ("cls",))


@given(of_neurons(), of_neurons())
def test_neurons_obey_the_laws_of_sets(one, other):
    np.testing.assert_array_equal((one & other).neurons, one.neurons & other.neurons)
    np.testing.assert_array_equal((one | other).neurons, one.neurons | other.neurons)
    everything = replace(other, neurons=None)
    np.testing.assert_array_equal((one & everything).neurons, one.neurons)
    assert (everything | one).neurons.all()
    assert (everything & everything).neurons is None


@given(of_neurons(), of_neurons())
def test_positions_obey_the_laws_of_sets(one, other):
    masks = [np.ones(4, bool) if c.positions is None else c.positions for c in (one, other)]
    assert (one & other) == replace(one & other, positions=masks[0] & masks[1])
    assert (one | other) == replace(one | other, positions=masks[0] | masks[1])


def test_circuits_without_a_common_position_have_no_intersection():
    one, other = _circuit(positions=[True, False]), _circuit(positions=[False, True])
    with pytest.raises(CircuitError, match="at least one is true"):
        _ = one & other


def test_positions_of_another_model_cannot_be_combined():
    one, other = _circuit(positions=[True, False]), _circuit(positions=[True, False, True])
    with pytest.raises(CircuitError, match="2 and 3 patches per image"):
        _ = one & other


def test_a_circuit_that_cuts_neurons_or_positions_has_no_complement():
    for circuit in (_parts(), _circuit(positions=[True, False])):
        with pytest.raises(CircuitError, match="no complement over edges"):
            _ = ~circuit


def test_circuits_of_mlps_of_other_sizes_are_not_combined():
    one = _parts()
    with pytest.raises(CircuitError, match="got 3 and 4 neurons per MLP"):
        _ = one & replace(one, neurons=np.ones((2, 2, 4), dtype=bool))


def test_neurons_are_part_of_what_a_circuit_computes():
    assert _parts() != _parts(neurons=[(0, 0, 0)])
    assert _parts(neurons=[(0, 0, 1)]) != _parts(neurons=[(0, 0, 0)])


def test_sources_are_read_by_all_or_none_in_circuits_of_parts_alone():
    circuit = _parts(heads=[(0, 1, 1), (1, 0, 0)])
    cut = [SPLIT.head_source(0, 1, 1), SPLIT.head_source(1, 0, 0)]
    assert np.flatnonzero(~circuit.read_by_all).tolist() == cut
    kept = circuit.kept.copy()
    kept[SPLIT.mlp_source(0, 0), SPLIT.mlp_target(1, 0)] = False
    assert replace(circuit, kept=kept).read_by_all is None


def test_heads_on_a_path_are_told_apart_by_kind():
    circuit = _parts(heads=[(0, 1, 1), (1, 0, 0)])
    # The last block's patches are read by nothing.
    expected = [[[True, True], [True, False]], [[False, False], [True, False]]]
    assert circuit.heads_on_path.tolist() == expected
    assert circuit.num_heads_kept == 3


def test_the_kept_fraction_counts_neurons_that_can_reach_the_classifier():
    assert Circuit.full(SPLIT).neurons_kept_fraction == 1
    assert _parts(neurons=[(0, 0, 1)]).neurons_kept_fraction == pytest.approx(8 / 9)
    assert _parts(neurons=[(1, 1)]).neurons_kept_fraction == 1, "the last patches reach nothing"
    # Without readers in block 1 the first block's patches reach nothing either.
    blind = _parts(heads=[(1,)])
    assert blind.neurons_kept_fraction == pytest.approx(6 / 9)
    assert Circuit.full(GRAPH).neurons_kept_fraction == 1
