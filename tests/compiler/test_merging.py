import dataclasses
import itertools
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import split_circuits, vits
from tiny import REFERENCE, random_fill, random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.compact.operations import count_macs, dense_macs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.emit import compile_circuit, verify
from vitcut.compiler.merging import MERGES, merge_streams, num_streams
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph

GRAPH = Graph(num_layers=2, num_heads=2)
SHAPE = random_vit().shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costing(CostModel):
    """A cost model that takes what it is told for the latency of a plan."""

    of: Callable

    def latency_ms(self, plan):
        return self.of(plan)


def costing(shape, *, stream=1.0, macs=10.0):
    """So much per stream, and so much for all multiply-accumulates of the dense model."""
    dense = dense_macs(shape)
    return Costing(of=lambda plan: stream * num_streams(plan) + macs * count_macs(plan) / dense)


def cost_of(circuit, shape, costs):
    return costs.latency_ms(plan_circuit(shape, circuit, costs))


def merge_by(circuit, cost, shape=SHAPE):
    """Merge by a cost of the circuit itself, whatever its plan."""
    with patch("vitcut.compiler.merging.plan_circuit", lambda shape, circuit, costs: circuit):
        return merge_streams(circuit, shape, Costing(of=cost))


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
    weights, circuit, costs = case
    merged = merge_streams(circuit, weights.shape, costs)
    live, _ = circuit.graph.find_live(circuit.kept)
    assert not (merged.kept & ~circuit.kept)[:, ~live].any()
    assert not (circuit.kept & ~merged.kept).any()
    assert (merged.graph, merged.ablation) == (circuit.graph, circuit.ablation)
    assert with_neurons_lists(merged.neurons) == with_neurons_lists(circuit.neurons)
    if merged is not circuit:
        assert merged.num_kept > circuit.num_kept
        before, after = (cost_of(item, weights.shape, costs) for item in (circuit, merged))
        assert after < before


@given(cases())
@settings(max_examples=15, deadline=None)
def test_merging_twice_changes_nothing_and_the_same_circuit_gives_the_same(case):
    weights, circuit, costs = case
    merged = merge_streams(circuit, weights.shape, costs)
    assert merge_streams(merged, weights.shape, costs) is merged
    again = merge_streams(dataclasses.replace(circuit), weights.shape, costs)
    assert again == merged
    assert dict(again.provenance) == dict(merged.provenance)


@given(cases())
@settings(max_examples=25, deadline=None)
def test_compact_equals_masked_for_merged_circuits(case):
    weights, circuit, costs = case
    merged = merge_streams(circuit, weights.shape, costs)
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
    costs = costing(SHAPE)
    merged = merge_streams(circuit, SHAPE, costs)
    assert merged == Circuit.full(GRAPH)
    assert dict(merged.provenance) == {
        "seconds": 1,
        MERGES: [
            {
                "parent": circuit.fingerprint,
                "edges_restored": 1,
                "cost_before": cost_of(circuit, SHAPE, costs),
                "cost_after": cost_of(merged, SHAPE, costs),
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
    assert merge_streams(circuit, shape, costing(shape, stream=0.1)) is circuit
    cheap = costing(shape, stream=0.1, macs=0.1)
    assert merge_streams(circuit, shape, cheap) == Circuit.full(GRAPH)


def column(circuit, target):
    return circuit.kept[:, GRAPH.target_numbers[target]].tobytes()


@pytest.mark.parametrize("lacked", [[], FOR_CLASS_TOKEN], ids=["at once", "with more rows"])
def test_sums_that_pay_only_together_are_merged_together(lacked):
    targets = [f"attn.1.0.{letter}" for letter in "qkv"]
    circuit = lacking(*lacked, ("embed", targets[1]), ("attn.0.0", targets[2]))

    def cost(candidate):
        return float(len({column(candidate, target) for target in targets}) > 1)

    assert len({column(circuit, target) for target in targets}) == 3
    assert cost(merge_by(circuit, cost)) == 0


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

    assert (cost(circuit), cost(merge_by(circuit, cost))) == (4, 2)


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

    assert (cost(circuit), cost(merge_by(circuit, cost))) == (1, 0)


def test_token_kinds_come_to_read_alike_where_that_makes_them_one_tensor():
    graph = Graph(num_layers=2, num_heads=2, kinds=("cls", "patch"), readout=("cls",))
    head = graph.source_numbers["attn.0.0.patch"]
    readers = [
        target.name for target, edge in zip(graph.targets, graph.edges[head], strict=True) if edge
    ]
    circuit = lacking(*(("attn.0.0.patch", reader) for reader in readers), graph=graph)
    shape = dataclasses.replace(REFERENCE, num_layers=2, num_heads=2)
    merged = merge_streams(circuit, shape, costing(shape, macs=1.0))
    assert plan_circuit(shape, merged) == plan_circuit(shape, Circuit.full(graph))
    assert merge_streams(circuit, shape, costing(shape, stream=0.01)) is circuit


def test_what_saves_less_than_a_prediction_can_tell_is_left():
    circuit = lacking(("mlp.0", "attn.1.0.k"))

    def cost(saving):
        return lambda candidate: 1.0 - saving * bool(candidate != circuit)

    assert merge_by(circuit, cost(0.009)) is circuit
    assert merge_by(circuit, cost(0.011)) == Circuit.full(GRAPH)


def test_of_equal_savings_the_fewest_edges_come_back():
    circuit = lacking(("embed", "attn.1.0.v"), ("mlp.0", "attn.1.0.q"), ("attn.0.1", "attn.1.0.q"))

    def cost(candidate):
        return 2.0 - any(
            (candidate.kept & ~circuit.kept)[:, GRAPH.target_numbers[f"attn.1.0.{letter}"]].any()
            for letter in "qv"
        )

    assert merge_by(circuit, cost).num_kept == circuit.num_kept + 1


def test_a_second_merge_is_told_after_the_first():
    circuit = lacking(("mlp.0", "attn.1.0.k"), ("mlp.0", "attn.1.1.q"))
    earlier = dataclasses.replace(circuit, provenance={MERGES: [{"parent": "of another"}]})
    merged = merge_streams(earlier, SHAPE, costing(SHAPE))
    assert [item["parent"] for item in merged.provenance[MERGES]] == [
        "of another",
        circuit.fingerprint,
    ]


@pytest.mark.parametrize("kinds", [(), ("cls", "patch")])
def test_thousands_of_edges_take_few_plans(kinds):
    graph = Graph(num_layers=6, num_heads=8, kinds=kinds, readout=kinds[:1])
    random = np.random.default_rng(0)
    kept = graph.edges & (random.random(graph.edges.shape) < 0.5)
    circuit = Circuit(graph=graph, kept=kept, ablation="mean")
    calls = itertools.count()

    def count_sums(candidate):
        next(calls)
        columns = zip(graph.targets, candidate.kept.T, strict=True)
        return float(len({(t.layer, t.role == "mlp", t.kind, c.tobytes()) for t, c in columns}))

    assert count_sums(merge_by(circuit, count_sums, REFERENCE)) < count_sums(circuit) / 4
    assert next(calls) < 500


def test_a_circuit_that_cannot_be_compiled_is_refused():
    with pytest.raises(CircuitError, match=r"circuit\.with_ablation\('mean'\)"):
        merge_streams(Circuit.full(GRAPH, ablation="resample"), SHAPE, costing(SHAPE))
