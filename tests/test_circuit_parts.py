"""Circuits of heads and neurons, per token kind; those of edges are left to test_circuit.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits, undisturbed

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError, CircuitError
from vitcut.graph import Graph
from vitcut.store import sha256_json

GRAPH = Graph(num_layers=2, num_heads=2)
SPLIT = Graph(num_layers=2, num_heads=2, kinds=("cls", "patch"), readout=("cls",))


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _expect_refusal(path, match):
    with pytest.raises(ArtefactError, match=match):
        Circuit.load(path)


@st.composite
@undisturbed
def of_neurons(draw, graph=SPLIT, ablation="linear"):
    """Circuits of edges and neurons, per token kind."""
    neurons = np.random.default_rng(draw(st.integers(0, 10**6))).random(
        (graph.num_layers, graph.num_kinds, 3)
    )
    circuit = replace(draw(circuits(graph)), ablation=ablation)
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


@given(of_neurons())
@settings(max_examples=40)
def test_a_saved_circuit_of_groups_and_neurons_comes_back_equal(tmp_path_factory, circuit):
    path = tmp_path_factory.mktemp("saved") / "circuit.json"
    circuit.save(path)
    loaded = Circuit.load(path)
    assert loaded == circuit
    assert loaded.graph == circuit.graph
    np.testing.assert_array_equal(loaded.kept, circuit.kept)
    np.testing.assert_array_equal(loaded.neurons, circuit.neurons)


def test_a_file_of_the_first_version_still_loads(tmp_path):
    path = tmp_path / "circuit.json"
    kept = GRAPH.edges.copy()
    kept[0] = False
    circuit = Circuit(graph=GRAPH, kept=kept, ablation="mean")
    circuit.save(path)

    def of_version_1(content):
        del content["sha256"]
        content["format_version"] = 1
        content["sha256"] = sha256_json(content)

    _edit(path, of_version_1)
    assert Circuit.load(path) == circuit


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda n: n["kept"]["mlp.0.cls"].append(3), id="a neuron too many"),
        pytest.param(lambda n: n.update(per_mlp=2), id="fewer neurons"),
        pytest.param(lambda n: n.update(per_mlp=0), id="no neurons"),
        pytest.param(lambda n: n.update(per_mlp="3"), id="text"),
        pytest.param(lambda n: n["kept"].pop("mlp.1.patch"), id="an MLP less"),
        pytest.param(lambda n: n["kept"].update({"mlp.0.cls": {}}), id="no list"),
    ],
)
def test_malformed_neurons_are_refused(tmp_path, change):
    path = tmp_path / "circuit.json"
    _parts().save(path)
    _edit(path, lambda content: change(content["neurons"]))
    _expect_refusal(path, "is not a valid circuit")


def test_another_set_of_neurons_is_an_altered_file(tmp_path):
    path = tmp_path / "circuit.json"
    _parts().save(path)
    _edit(path, lambda content: content["neurons"]["kept"]["mlp.0.cls"].pop())
    _expect_refusal(path, "was altered")


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


def test_what_a_circuit_of_parts_was_found_by_is_kept():
    heads, neurons = np.ones((2, 2, 1), dtype=bool), np.ones((2, 1, 3), dtype=bool)
    circuit = Circuit.of_parts(
        GRAPH, heads=heads, neurons=neurons, ablation="mean", method="fisher", task="drawn"
    )
    assert (circuit.method, circuit.task) == ("fisher", "drawn")
    np.testing.assert_array_equal(circuit.kept, GRAPH.edges)


@given(of_neurons(GRAPH))
def test_splitting_keeps_edges_and_neurons_in_every_group(circuit):
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


def test_splitting_into_other_groups_is_refused():
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


def test_a_circuit_that_cuts_neurons_has_no_complement():
    with pytest.raises(CircuitError, match="no complement over edges"):
        _ = ~_parts()


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


def test_heads_on_a_path_are_told_apart_by_group():
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
