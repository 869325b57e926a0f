import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits, parts_per_kind
from tiny import REFERENCE, random_vit

from vitcut.circuit import Circuit
from vitcut.compact.operations import count_macs, dense_macs, describe
from vitcut.compact.plan import Plan
from vitcut.compiler.cost import CostModel
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph

GRAPH = Graph(num_layers=6, num_heads=8)


def streams_of(plan):
    for block in plan.blocks:
        yield from block.attention.streams if block.attention else ()
        yield from (mlp.stream for mlp in block.mlps)
    yield from plan.readout


def names(terms):
    return [term.name for term in terms]


def without_heads(heads):
    kept = GRAPH.edges.copy()
    kept[[GRAPH.head_source(*head) for head in heads]] = False
    return Circuit(graph=GRAPH, kept=kept, ablation="mean")


def test_the_full_circuit_costs_the_dense_model_less_what_the_class_token_does_not_need():
    plan = plan_circuit(REFERENCE, Circuit.full(GRAPH))
    block = (dense_macs(REFERENCE) - 64 * 192 * 64 - 64 * 58) // 6
    q_and_output, per_head_weights, tokens, mlp = (
        2 * 64 * 64,
        2 * 64 * 64,
        2 * 8 * 65 * 64,
        2 * 64 * 256,
    )
    last = q_and_output + per_head_weights + tokens + mlp
    assert count_macs(plan) == dense_macs(REFERENCE) - block + last


def test_the_full_circuit_is_the_plain_residual():
    plan = plan_circuit(REFERENCE, Circuit.full(GRAPH))
    for block in plan.blocks:
        attention = block.attention
        assert len(attention.streams) == len(attention.head_sets) == len(attention.outputs) == 1
        assert len(attention.projections) == len(block.mlps) == 1
    first, *others = streams_of(plan)
    assert (names(first.terms), first.table_rows) == (["embed"], 65)
    assert all(len(stream.terms) == 2 and stream.table_rows == 0 for stream in others)


def test_targets_that_read_alike_share_a_stream_and_others_build_on_it():
    graph = Graph(num_layers=2, num_heads=2)
    kept = graph.edges.copy()
    kept[graph.mlp_source(0), graph.head_target(1, 0, "k")] = False
    plan = plan_circuit(random_vit().shape, Circuit(graph=graph, kept=kept, ablation="mean"))
    before = plan.blocks[0].mlps[0].stream.name
    smaller, larger = plan.blocks[1].attention.streams
    assert (names(smaller.terms), smaller.table_rows) == ([before], 5)
    assert (names(larger.terms), larger.table_rows) == ([before, "mlp.0"], 0)


def test_equal_head_subsets_are_one_product():
    kept = GRAPH.edges.copy()
    chosen = [GRAPH.head_source(0, head) for head in (1, 4)]
    for layer in (2, 3, 4):
        kept[:, GRAPH.mlp_target(layer)] = False
        kept[chosen, GRAPH.mlp_target(layer)] = True
    plan = plan_circuit(REFERENCE, Circuit(graph=GRAPH, kept=kept, ablation="zero"))
    assert [item.heads for item in plan.blocks[0].attention.outputs] == [tuple(range(8)), (1, 4)]


def test_the_class_token_row_of_the_patch_embedding_is_not_added():
    kept = np.zeros_like(GRAPH.edges)
    kept[0, [GRAPH.head_target(0, 0, "v"), GRAPH.classifier]] = True
    kept[GRAPH.head_source(0, 0), GRAPH.classifier] = True
    plan = plan_circuit(REFERENCE, Circuit(graph=GRAPH, kept=kept, ablation="mean"))
    assert names(plan.readout[0].terms) == ["out.0.0"]


@given(st.permutations([(layer, head) for layer in range(6) for head in range(8)]))
@settings(max_examples=5, deadline=None)
def test_macs_fall_with_every_whole_head(heads):
    costs = [
        count_macs(plan_circuit(REFERENCE, without_heads(heads[:count])))
        for count in range(0, 49, 6)
    ]
    assert all(after < before for before, after in itertools.pairwise(costs))


@given(circuits(Graph(num_layers=3, num_heads=3)))
@settings(max_examples=30, deadline=None)
def test_a_plan_survives_json(circuit):
    shape = dataclasses.replace(REFERENCE, num_layers=3, num_heads=3)
    plan = plan_circuit(shape, circuit)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_table_of_a_plan_counts_what_is_left():
    embed, first, *_, last, classifier = describe(plan_circuit(REFERENCE, without_heads([(0, 3)])))
    assert (embed.part, embed.macs) == ("embed", 64 * 192 * 64)
    assert (first.heads, first.query_rows, first.neurons, first.mlp_rows) == (7, 65, 256, 65)
    assert (last.heads, last.query_rows, last.mlp_rows) == (8, 1, 1)
    assert (classifier.streams, classifier.macs) == (1, 64 * 58)


NO_OVERHEAD = CostModel(nanoseconds=CostModel().nanoseconds | {"operation": 0.0, "moved": 0.0})
"""Under it two products that follow each other are as good as one of as many MACs."""


def parts_plan(**changes):
    weights = random_vit(num_layers=3, num_heads=4, width=32, head_dim=8, hidden=20)
    circuit = dataclasses.replace(parts_per_kind(weights), **changes)
    return plan_circuit(weights.shape, circuit, NO_OVERHEAD)


def test_token_kinds_that_keep_other_parts_have_their_own_streams_heads_and_mlps():
    first, second, third = parts_plan().blocks
    assert [(item.rows.count, len(item.heads)) for item in first.attention.head_sets] == [
        (1, 4),
        (4, 1),
    ]
    assert [(mlp.stream.rows.count, mlp.hidden) for mlp in first.mlps] == [(1, 20), (4, 10)]
    assert [stream.rows.count for stream in second.attention.streams] == [4, 1]
    for block in (second, third):
        (mlp,) = block.mlps
        assert (mlp.stream.rows.count, mlp.hidden) == (1, 20)


def test_one_query_meets_the_tokens_directly_and_many_have_keys_and_values():
    first, second, _ = parts_plan().blocks
    alone, patches = first.attention.head_sets
    streams = [first.attention.streams[number] for number in alone.keys]
    assert [(stream.rows.count, bool(stream.terms)) for stream in streams] == [
        (1, False),
        (4, True),
    ]
    assert alone.keys == alone.values
    assert (patches.keys, patches.values) == ((), ())
    (head_set,) = second.attention.head_sets
    tokens = [second.attention.streams[number].rows.first for number in head_set.keys]
    assert (tokens, head_set.keys == head_set.values) == ([0, 1], True)
    assert [(item.q, item.k) for item in second.attention.projections] == [((0, 1, 2, 3), ())]


def test_what_a_linear_fill_may_write_differently_per_kind_is_not_written_jointly():
    graph = Graph(num_layers=2, num_heads=2, kinds=("cls", "patch"), readout=("cls",))
    shape = dataclasses.replace(REFERENCE, num_layers=2, num_heads=2)
    joint, apart = (
        plan_circuit(shape, Circuit.full(graph, ablation=ablation)).blocks[0]
        for ablation in ("mean", "linear")
    )
    assert (len(joint.attention.outputs), len(joint.mlps)) == (1, 1)
    assert (len(apart.attention.outputs), len(apart.mlps)) == (2, 2)


def test_a_circuit_over_whole_tokens_and_the_same_per_kind_have_one_plan():
    for circuit in (Circuit.full(GRAPH), without_heads([(0, 3), (4, 1), (5, 5)])):
        split = circuit.split(("cls", "patch"), ("cls",))
        assert plan_circuit(REFERENCE, split) == plan_circuit(REFERENCE, circuit)


def test_a_table_takes_over_the_biases_of_what_its_stream_adds():
    kept = GRAPH.edges.copy()
    kept[GRAPH.head_source(0, 0), GRAPH.mlp_target(0) :] = False
    plan = plan_circuit(REFERENCE, Circuit(graph=GRAPH, kept=kept, ablation="mean"))
    (mlp,), (output,) = plan.blocks[0].mlps, plan.blocks[0].attention.outputs
    assert (mlp.stream.table_rows, output.bias, mlp.bias) == (65, False, True)


def test_neurons_of_another_model_are_refused():
    neurons = np.ones((6, 1, 7), dtype=np.bool_)
    circuit = dataclasses.replace(Circuit.full(GRAPH), neurons=neurons)
    with pytest.raises(CircuitError, match="7 neurons per MLP, this one has 256"):
        plan_circuit(REFERENCE, circuit)


def test_nothing_is_planned_for_an_empty_circuit():
    circuit = Circuit(graph=GRAPH, kept=np.zeros_like(GRAPH.edges), ablation="mean")
    assert count_macs(plan_circuit(REFERENCE, circuit)) == 0


def test_queries_of_most_rows_are_computed_with_keys_and_values():
    (first, *_) = parts_plan().blocks
    alone, patches = first.attention.head_sets
    (joint,) = first.attention.projections
    assert patches.heads == joint.q == joint.k == joint.v
    assert (joint.rows.count, patches.rows.count, alone.rows.count) == (5, 4, 1)


def test_a_product_without_a_bias_has_one_reader_of_the_same_rows():
    plan = parts_plan()
    products = [
        (product.name, rows)
        for block in plan.blocks
        for product, rows in (
            *((item, item.rows) for item in (block.attention.outputs if block.attention else ())),
            *((item, item.stream.rows) for item in block.mlps),
        )
        if not product.bias
    ]
    assert {name for name, _ in products} == {"out.0.1", "mlp.0.1"}
    for name, rows in products:
        (reader,) = (stream for stream in streams_of(plan) if name in names(stream.terms))
        assert reader.rows == rows
        assert reader.table_rows == rows.count
