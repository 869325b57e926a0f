import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits

from vitcut.circuit import Circuit
from vitcut.compiler.liveness import Reads, find_liveness
from vitcut.graph import Graph

KINDS = st.sampled_from([("cls", "patch"), ("cls", "register", "patch")])
graphs = st.builds(
    Graph,
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    kinds=KINDS,
    readout=st.just(("cls",)),
)


def split(num_layers, num_heads):
    return Graph(
        num_layers=num_layers, num_heads=num_heads, kinds=("cls", "patch"), readout=("cls",)
    )


def cut(graph, *targets, neurons=None):
    """The full circuit without the edges into the named targets."""
    kept = graph.edges.copy()
    kept[:, [graph.target_numbers[name] for name in targets]] = False
    return Circuit(graph=graph, kept=kept, ablation="mean", neurons=neurons)


def liveness_of(circuit):
    return find_liveness(Reads.of(circuit, 4, maps_differ=False))


def names(circuit, masks):
    """The sources of per-kind masks, by name."""
    graph = circuit.graph
    return {
        source.name
        for number, source in enumerate(graph.sources)
        if masks[number % graph.num_kinds] >> number // graph.num_kinds & 1
    }


def test_the_last_block_computes_the_class_token_alone():
    circuit = Circuit.full(split(2, 1))
    assert names(circuit, liveness_of(circuit).needed) == {
        "embed.patch",
        *("attn.0.0.cls", "mlp.0.cls", "attn.0.0.patch", "mlp.0.patch"),
        *("attn.1.0.cls", "mlp.1.cls"),
    }


def test_patch_parts_that_no_key_or_value_reads_are_not_needed():
    circuit = cut(split(3, 1), *(f"attn.2.0.{x}.patch" for x in "kv"))
    needed = names(circuit, liveness_of(circuit).needed)
    assert not {"mlp.1.patch", "attn.1.0.patch"} & needed
    assert {"mlp.1.cls", "attn.1.0.cls", "mlp.0.patch"} <= needed


def test_what_reads_only_constants_is_constant():
    graph = split(2, 1)
    inputs = [f"attn.0.0.{x}.{kind}" for x in "qkv" for kind in ("cls", "patch")]
    circuit = cut(graph, *inputs)
    varying = names(circuit, liveness_of(circuit).varying)
    assert not {"attn.0.0.cls", "attn.0.0.patch", "mlp.0.cls"} & varying
    assert {"mlp.0.patch", "attn.1.0.cls"} <= varying


def test_the_class_token_is_constant_until_it_attends():
    circuit = cut(split(1, 1))
    varying = names(circuit, liveness_of(circuit).varying)
    assert "embed.cls" not in varying
    assert {"embed.patch", "attn.0.0.cls", "mlp.0.cls"} <= varying


def test_an_mlp_without_neurons_is_constant():
    graph = split(1, 1)
    neurons = np.ones((1, 2, 4), dtype=np.bool_)
    neurons[0, 0] = False
    circuit = cut(graph, neurons=neurons)
    assert "mlp.0.cls" not in names(circuit, liveness_of(circuit).varying)


@given(graphs.flatmap(circuits))
@settings(max_examples=60, deadline=None)
def test_only_what_lies_on_a_kept_path_is_needed(circuit):
    needed = names(circuit, liveness_of(circuit).needed)
    on_path = circuit.live_sources & circuit.reached_sources
    assert needed <= {circuit.graph.sources[number].name for number in np.flatnonzero(on_path)}
