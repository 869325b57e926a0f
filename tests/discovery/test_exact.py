import numpy as np
import pytest
import torch
from tiny import random_pixels, random_vit

from vitcut.discovery.exact import exact_scores
from vitcut.errors import CircuitError
from vitcut.intervention.oracle import Examples, Oracle


def make_oracle(weights) -> Oracle:
    images = np.arange(3)
    examples = Examples(
        pixels=random_pixels(weights, images=3),
        clean=images,
        corrupted=images,
        group_of_class=torch.tensor([0, 1, 1, 2]),
    )
    return Oracle(weights, examples, "mean")


def test_every_edge_is_scored_by_cutting_it_alone():
    weights = random_vit(num_layers=1, num_heads=2)
    oracle, graph = make_oracle(weights), weights.graph
    scores = exact_scores(oracle, graph)
    assert np.isnan(scores[~graph.edges]).all()
    assert (scores[graph.edges] > 0).all()
    source, target = graph.head_source(0, 1), graph.mlp_target(0)
    kept = graph.edges.copy()
    kept[source, target] = False
    assert scores[source, target] == oracle.kl(kept)


def test_an_edge_that_carries_what_is_ablated_scores_zero():
    weights = random_vit(num_layers=1, num_heads=1)
    pixels = random_pixels(weights, images=1).expand(3, -1, -1, -1)
    images = np.arange(3)
    examples = Examples(
        pixels=pixels,
        clean=images,
        corrupted=images,
        group_of_class=torch.tensor([0, 1, 1, 2]),
    )
    scores = exact_scores(Oracle(weights, examples, "mean"), weights.graph)
    np.testing.assert_allclose(scores[weights.graph.edges], 0, atol=1e-12)


def test_only_the_edges_asked_for_are_measured():
    weights = random_vit(num_layers=1, num_heads=2)
    oracle, edges = make_oracle(weights), np.zeros_like(weights.graph.edges)
    edges[0, weights.graph.classifier] = True
    scores = exact_scores(oracle, weights.graph, edges=edges)
    assert oracle.calls == 1
    assert np.isfinite(scores[0, weights.graph.classifier])
    assert np.isnan(scores).sum() == scores.size - 1


def test_what_is_no_edge_is_refused():
    weights = random_vit(num_layers=1, num_heads=2)
    edges = np.ones_like(weights.graph.edges)
    with pytest.raises(CircuitError, match="must mark edges"):
        exact_scores(make_oracle(weights), weights.graph, edges=edges)
