import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import split_circuits, vits
from tiny import REFERENCE, random_fill, random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.compact.operations import dense_macs, describe
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.merging import MERGES, merge_streams
from vitcut.compiler.planning import plan_circuit
from vitcut.compiler.verify import verify
from vitcut.errors import CircuitError
from vitcut.graph import Graph

GRAPH = Graph(num_layers=2, num_heads=2)
SHAPE = random_vit().shape


def costing(shape, *, stream=1.0, macs=10.0):
    """So much per stream, and so much for all multiply-accumulates of the dense model."""

    def cost(circuit):
        rows = describe(plan_circuit(shape, circuit))
        streams, total = (sum(getattr(row, name) for row in rows) for name in ("streams", "macs"))
        return stream * streams + macs * total / dense_macs(shape)

    return cost


@st.composite
def cases(draw):
    weights = draw(vits(max_layers=2))
    weight = draw(st.sampled_from([0.0, 0.1, 1.0]))
    return weights, draw(split_circuits(weights)), costing(weights.shape, stream=weight)


def with_neurons_lists(neurons):
    return None if neurons is None else neurons.tolist()


@given(cases())
@settings(max_examples=30, deadline=None)
def test_edges_come_back_none_is_cut_and_the_cost_falls(case):
    weights, circuit, cost = case
    merged = merge_streams(circuit, cost, weights.shape)
    live, _ = circuit.graph.find_live(circuit.kept)
    assert not (merged.kept & ~circuit.kept)[:, ~live].any()
    assert not (circuit.kept & ~merged.kept).any()
    assert (merged.graph, merged.ablation) == (circuit.graph, circuit.ablation)
    assert with_neurons_lists(merged.neurons) == with_neurons_lists(circuit.neurons)
    if merged is not circuit:
        assert merged.num_kept > circuit.num_kept
        assert cost(merged) < cost(circuit)


@given(cases())
@settings(max_examples=15, deadline=None)
def test_merging_twice_changes_nothing_and_the_same_circuit_gives_the_same(case):
    weights, circuit, cost = case
    merged = merge_streams(circuit, cost, weights.shape)
    assert merge_streams(merged, cost, weights.shape) is merged
    again = merge_streams(dataclasses.replace(circuit), cost, weights.shape)
    assert again == merged
    assert dict(again.provenance) == dict(merged.provenance)


@given(cases())
@settings(max_examples=25, deadline=None)
def test_compact_equals_masked_for_merged_circuits(case):
    weights, circuit, cost = case
    merged = merge_streams(circuit, cost, weights.shape)
    fill = random_fill(weights, merged)
    compact = compile_circuit(weights, merged, fill, dtype=torch.float64)
    verify(compact, weights, merged, fill, random_pixels(weights))


def lacking(*edges, graph=GRAPH):
    kept = graph.edges.copy()
    for source, target in edges:
        kept[graph.source_numbers[source], graph.target_numbers[target]] = False
    return Circuit(graph=graph, kept=kept, ablation="mean", provenance={"seconds": 1})


def test_a_target_that_lacks_one_edge_gets_it_back_and_the_circuit_says_so():
    circuit = lacking(("mlp.0", "attn.1.0.k"))
    cost = costing(SHAPE)
    merged = merge_streams(circuit, cost, SHAPE)
    assert merged == Circuit.full(GRAPH)
    assert dict(merged.provenance) == {
        "seconds": 1,
        MERGES: [
            {
                "parent": circuit.fingerprint,
                "edges_restored": 1,
                "cost_before": cost(circuit),
                "cost_after": cost(merged),
            }
        ],
    }
    assert dict(circuit.provenance) == {"seconds": 1}


# Keys and values ask for every token; queries, the MLP and the classifier for the class token only.
FOR_CLASS_TOKEN = [("mlp.0", f"attn.1.{head}.{letter}") for head in (0, 1) for letter in "kv"]


def test_an_edge_that_would_cost_more_rows_than_a_stream_saves_stays_cut():
    shape = dataclasses.replace(REFERENCE, num_layers=2, num_heads=2, head_dim=32)
    circuit = lacking(*FOR_CLASS_TOKEN)
    plan = plan_circuit(shape, circuit)
    assert [mlp.stream.rows.count for mlp in plan.blocks[0].mlps] == [1]
    cost = costing(shape, stream=0.1)
    assert merge_streams(circuit, cost, shape) is circuit
    cheap = costing(shape, stream=0.1, macs=0.1)
    assert merge_streams(circuit, cheap, shape) == Circuit.full(GRAPH)


def column(circuit, target):
    return circuit.kept[:, GRAPH.target_numbers[target]].tobytes()


@pytest.mark.parametrize("lacked", [[], FOR_CLASS_TOKEN], ids=["at once", "with more rows"])
def test_sums_that_pay_only_together_are_merged_together(lacked):
    targets = [f"attn.1.0.{letter}" for letter in "qkv"]
    circuit = lacking(*lacked, ("embed", targets[1]), ("attn.0.0", targets[2]))

    def cost(candidate):
        return float(len({column(candidate, target) for target in targets}) > 1)

    assert len({column(circuit, target) for target in targets}) == 3
    assert cost(merge_streams(circuit, cost, SHAPE)) == 0


def test_merging_goes_on_until_nothing_saves():
    circuit = lacking(
        *(("embed", f"attn.1.{head}.k") for head in (0, 1)),
        *((f"attn.0.{head}", f"attn.1.{head}.{letter}") for head in (0, 1) for letter in "qk"),
    )

    def cost(candidate):
        keys = [column(candidate, f"attn.1.{head}.k") for head in (0, 1)]
        queries = [column(candidate, f"attn.1.{head}.q") for head in (0, 1)]
        embeds = candidate.kept[0, list(GRAPH.letter_targets(1, "k"))].any()
        return len(set(keys)) + len(set(queries)) + 10.0 * embeds

    assert (cost(circuit), cost(merge_streams(circuit, cost, SHAPE))) == (4, 2)


def test_a_later_sum_comes_to_build_on_an_earlier_one_though_others_may_not_change():
    circuit = lacking(
        *(("embed", target) for target in ("mlp.1", "classifier", "attn.1.0.k")),
        ("mlp.0", "attn.1.0.q"),
    )
    read, built = (GRAPH.target_numbers[name] for name in ("attn.1.0.q", "mlp.1"))
    others = [target for target in range(len(GRAPH.targets)) if target != built]

    def cost(candidate):
        apart = (candidate.kept[:, read] & ~candidate.kept[:, built]).any()
        changed = (candidate.kept != circuit.kept)[:, others].any()
        return float(apart) + 10.0 * changed

    assert (cost(circuit), cost(merge_streams(circuit, cost, SHAPE))) == (1, 0)


def test_token_groups_come_to_read_alike_where_that_makes_them_one_tensor():
    graph = Graph(num_layers=2, num_heads=2, kinds=("cls", "patch"), readout=("cls",))
    head = graph.source_numbers["attn.0.0.patch"]
    readers = [
        target.name for target, edge in zip(graph.targets, graph.edges[head], strict=True) if edge
    ]
    circuit = lacking(*(("attn.0.0.patch", reader) for reader in readers), graph=graph)
    shape = dataclasses.replace(REFERENCE, num_layers=2, num_heads=2)
    merged = merge_streams(circuit, costing(shape, macs=1.0), shape)
    assert plan_circuit(shape, merged) == plan_circuit(shape, Circuit.full(graph))
    assert merge_streams(circuit, costing(shape, stream=0.01), shape) is circuit


def test_what_saves_less_than_a_prediction_can_tell_is_left():
    circuit = lacking(("mlp.0", "attn.1.0.k"))

    def cost(saving):
        return lambda candidate: 1.0 - saving * bool(candidate != circuit)

    assert merge_streams(circuit, cost(0.009), SHAPE) is circuit
    assert merge_streams(circuit, cost(0.011), SHAPE) == Circuit.full(GRAPH)


def test_of_equal_savings_the_fewest_edges_come_back():
    circuit = lacking(("embed", "attn.1.0.v"), ("mlp.0", "attn.1.0.q"), ("attn.0.1", "attn.1.0.q"))

    def cost(candidate):
        return 2.0 - any(
            (candidate.kept & ~circuit.kept)[:, GRAPH.target_numbers[f"attn.1.0.{letter}"]].any()
            for letter in "qv"
        )

    assert merge_streams(circuit, cost, SHAPE).num_kept == circuit.num_kept + 1


def test_a_second_merge_is_told_after_the_first():
    circuit = lacking(("mlp.0", "attn.1.0.k"), ("mlp.0", "attn.1.1.q"))
    earlier = dataclasses.replace(circuit, provenance={MERGES: [{"parent": "of another"}]})
    merged = merge_streams(earlier, costing(SHAPE), SHAPE)
    assert [item["parent"] for item in merged.provenance[MERGES]] == [
        "of another",
        circuit.fingerprint,
    ]


@pytest.mark.parametrize("groups", [(), ("cls", "patch")])
def test_thousands_of_edges_take_few_plans(groups):
    graph = Graph(num_layers=6, num_heads=8, kinds=groups, readout=groups[:1])
    random = np.random.default_rng(0)
    kept = graph.edges & (random.random(graph.edges.shape) < 0.5)
    circuit = Circuit(graph=graph, kept=kept, ablation="mean")
    calls = itertools.count()

    def count_sums(candidate):
        next(calls)
        columns = zip(graph.targets, candidate.kept.T, strict=True)
        return float(len({(t.layer, t.role == "mlp", t.kind, c.tobytes()) for t, c in columns}))

    assert count_sums(merge_streams(circuit, count_sums, REFERENCE)) < count_sums(circuit) / 4
    assert next(calls) < 500


def test_a_circuit_that_cannot_be_compiled_is_refused():
    with pytest.raises(CircuitError, match=r"circuit\.with_ablation\('mean'\)"):
        merge_streams(Circuit.full(GRAPH, ablation="resample"), costing(SHAPE), SHAPE)
