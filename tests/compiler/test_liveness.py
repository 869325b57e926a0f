import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits

from vitcut.circuit import Circuit
from vitcut.compiler.liveness import find_liveness
from vitcut.graph import Graph

graphs = st.builds(Graph, num_layers=st.integers(1, 3), num_heads=st.integers(1, 3))


def cut(graph, *names, keep=False):
    """The full circuit without the edges into the named targets."""
    kept = graph.edges.copy()
    kept[:, [graph.target_numbers[name] for name in names]] = keep
    return Circuit(graph=graph, kept=kept & graph.edges, ablation="mean")


def needed(circuit):
    names = [source.name for source in circuit.graph.sources]
    return dict(zip(names, find_liveness(circuit).needed, strict=True))


def test_the_last_block_computes_the_class_token_alone():
    graph = Graph(num_layers=2, num_heads=1)
    assert needed(Circuit.full(graph)) == {
        "embed": "all",
        "attn.0.0": "all",
        "mlp.0": "all",
        "attn.1.0": "readout",
        "mlp.1": "readout",
    }


def test_a_part_whose_only_readers_are_class_only_is_class_only():
    graph = Graph(num_layers=3, num_heads=1)
    circuit = cut(graph, "attn.2.0.k", "attn.2.0.v")
    assert needed(circuit)["mlp.1"] == "readout"
    assert needed(circuit)["attn.1.0"] == "readout"
    assert needed(circuit)["mlp.0"] == "all"


def test_what_reads_only_constants_is_constant():
    graph = Graph(num_layers=2, num_heads=1)
    found = find_liveness(cut(graph, "attn.0.0.q", "attn.0.0.k", "attn.0.0.v"))
    assert graph.source_numbers["attn.0.0"] in found.constant_sources
    assert graph.source_numbers["mlp.0"] not in found.constant_sources


def test_the_class_token_is_constant_until_it_attends():
    graph = Graph(num_layers=1, num_heads=1)
    found = find_liveness(Circuit.full(graph))
    assert graph.target_numbers["attn.0.0.q"] in found.constant_targets
    assert graph.target_numbers["attn.0.0.k"] not in found.constant_targets


@given(graphs.flatmap(circuits))
@settings(max_examples=60, deadline=None)
def test_only_what_lies_on_a_kept_path_is_needed(circuit):
    rows = np.array([rows != "none" for rows in find_liveness(circuit).needed])
    assert not (rows & ~(circuit.live_sources & circuit.reached_sources)).any()
