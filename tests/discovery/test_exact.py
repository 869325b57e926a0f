from collections.abc import Callable

import numpy as np
import pytest
import torch
from part_scores import exact_edges, exact_heads, exact_neurons
from tiny import random_pixels, random_vit
from tiny_oracle import GROUP_OF_CLASS, make_oracle

from vitcut.errors import CircuitError
from vitcut.masked.masking import full_run
from vitcut.masked.oracle import Examples, Oracle
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.model.forward import classify

TOKENS = pytest.mark.parametrize("tokens", ["all", "split"])
WEIGHTS = random_vit(num_layers=2, num_heads=2, num_prefix=2, hidden=3)
EDGES = WEIGHTS.split_graph.edges
SHAPES = {exact_edges: EDGES.shape, exact_heads: (2, 2, 3), exact_neurons: (2, 3, 3)}


@TOKENS
def test_every_edge_is_scored_by_cutting_it_alone(tokens):
    weights = random_vit(num_layers=1, num_heads=2)
    oracle = make_oracle(weights, "mean", tokens=tokens)
    graph = oracle.graph
    scores = exact_edges(oracle)
    assert np.isnan(scores[~graph.edges]).all()
    assert np.isfinite(scores[graph.edges]).all()
    source, target = graph.head_source(0, 1), graph.mlp_target(0)
    kept = graph.edges.copy()
    kept[source, target] = False
    assert scores[source, target] == oracle.kl(kept) > 0


def test_exactly_the_structurally_dead_edges_of_a_split_graph_score_zero():
    oracle = make_oracle(random_vit(num_layers=1, num_heads=2), "zero", tokens="split")
    scores = exact_edges(oracle)
    useful = oracle.graph.useful_edges
    assert (scores[useful] > 1e-9).all()
    np.testing.assert_allclose(scores[oracle.graph.edges & ~useful], 0, atol=1e-12)


@TOKENS
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_a_head_is_scored_by_cutting_all_that_it_writes(tokens, ablation):
    oracle = make_oracle(WEIGHTS, ablation, tokens=tokens)
    graph = oracle.graph
    scores = exact_heads(oracle)
    assert scores.shape == (2, 2, graph.num_kinds)
    for layer, head, kind in np.ndindex(scores.shape):
        kept = graph.edges.copy()
        kept[graph.head_source(layer, head, kind)] = False
        assert scores[layer, head, kind] == oracle.kl(kept)


def kl_of_last_block_without(neuron: int, pixels: torch.Tensor) -> float:
    """Zero one neuron of the last MLP, by hand."""
    run = full_run(WEIGHTS, pixels)
    gone = run.neurons[-1][:, :1, neuron, None] * WEIGHTS.blocks[-1].mlp.out_weight[:, neuron]
    logits = classify(WEIGHTS, run.inputs[-1][0, :, :1] - gone)
    p, q = (coarse_log_probs(x, GROUP_OF_CLASS, 3) for x in (run.logits, logits))
    return float(kl_divergence(p, q).mean())


@TOKENS
def test_a_neuron_is_scored_by_cutting_it_alone(tokens):
    oracle = make_oracle(WEIGHTS, "zero", tokens=tokens)
    neurons = np.ones((2, oracle.graph.num_kinds, 3), dtype=np.bool_)
    scores = exact_neurons(oracle, neurons)
    assert np.isfinite(scores).all()
    for neuron in range(3):
        expected = kl_of_last_block_without(neuron, oracle.examples.pixels)
        assert scores[1, 0, neuron] == pytest.approx(expected, abs=1e-10)
        assert expected > 1e-6


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_neurons_of_groups_that_reach_nothing_score_zero(ablation):
    oracle = make_oracle(WEIGHTS, ablation, tokens="split")
    scores = exact_neurons(oracle, np.ones((2, 3, 3), dtype=np.bool_))
    np.testing.assert_allclose(scores[1, 1:], 0, atol=1e-12)
    assert (scores[1, 0] > 1e-9).all()
    assert (scores[0, 2] > 1e-9).all()


def test_an_edge_that_carries_what_is_ablated_scores_zero():
    weights = random_vit(num_layers=1, num_heads=1)
    pixels = random_pixels(weights, images=1).expand(3, -1, -1, -1)
    images = np.arange(3)
    examples = Examples(
        pixels=pixels, clean=images, corrupted=images, group_of_class=GROUP_OF_CLASS
    )
    scores = exact_edges(Oracle(weights, examples, "mean"))
    np.testing.assert_allclose(scores[weights.graph.edges], 0, atol=1e-12)


@pytest.mark.parametrize("measure", SHAPES)
def test_only_the_parts_asked_for_are_measured(measure: Callable):
    oracle = make_oracle(WEIGHTS, tokens="split")
    chosen = np.zeros(SHAPES[measure], dtype=np.bool_)
    part = tuple(np.argwhere(EDGES if measure is exact_edges else ~chosen)[-1])
    chosen[part] = True
    scores = measure(oracle, chosen)
    assert oracle.calls == 1
    assert scores.shape == chosen.shape
    assert np.array_equal(np.isfinite(scores), chosen)


@pytest.mark.parametrize("measure", SHAPES)
def test_a_choice_of_another_shape_is_refused(measure):
    chosen = np.ones(SHAPES[measure], dtype=np.bool_)[1:]
    with pytest.raises(CircuitError, match=rf"must have shape .* got \({len(chosen)}, "):
        measure(make_oracle(WEIGHTS, tokens="split"), chosen)


def test_what_is_no_edge_is_refused():
    with pytest.raises(CircuitError, match=r"embed\.cls -> attn\.0\.0\.q\.register is no edge"):
        exact_edges(make_oracle(WEIGHTS, tokens="split"), np.ones_like(EDGES))
