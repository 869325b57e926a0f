from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_vit

from vitcut.discovery.controls import magnitude_scores, random_scores


@pytest.mark.parametrize(("tokens", "kinds"), [("all", 1), ("split", 2)])
def test_controls_score_every_head_and_neuron_of_every_kind(tokens, kinds):
    weights = random_vit(num_layers=3, num_heads=2, hidden=5)
    graph = weights.graph_of(tokens)
    for scores in (random_scores(graph, 5, seed=0), magnitude_scores(weights, graph)):
        assert scores.heads.shape == (3, 2, kinds)
        assert scores.neurons.shape == (3, kinds, 5)
        assert scores.heads.dtype == scores.neurons.dtype == np.float64


def test_random_scores_depend_on_the_seed_alone():
    graph = random_vit().split_graph
    one, same, other = (random_scores(graph, 7, seed=seed) for seed in (3, 3, 4))
    for name in ("heads", "neurons"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
        assert (getattr(one, name) != getattr(other, name)).all()
        assert ((getattr(one, name) >= 0) & (getattr(one, name) < 1)).all()
        assert len(np.unique(getattr(one, name))) == getattr(one, name).size


def test_magnitude_is_the_product_of_the_norms_before_and_behind_a_part():
    weights = random_vit(num_layers=2, num_heads=2, hidden=5)
    scores = magnitude_scores(weights, weights.split_graph)
    for layer, block in enumerate(weights.blocks):
        values, outputs = block.attn.v_weight.numpy(), block.attn.out_weight.numpy()
        for head in range(2):
            expected = np.sqrt((values[head] ** 2).sum() * (outputs[head] ** 2).sum())
            np.testing.assert_allclose(scores.heads[layer, head], expected, rtol=1e-12)
        inputs, outputs = block.mlp.in_weight.numpy(), block.mlp.out_weight.numpy()
        for neuron in range(5):
            expected = np.sqrt((inputs[neuron] ** 2).sum() * (outputs[:, neuron] ** 2).sum())
            np.testing.assert_allclose(scores.neurons[layer, :, neuron], expected, rtol=1e-12)


def test_magnitude_does_not_depend_on_where_the_factors_of_a_norm_over_neurons_stand():
    weights = random_vit(neuron_norm=True)
    folded = []
    for block in weights.blocks:
        mlp, norm = block.mlp, block.mlp.norm
        plain = replace(norm, weight=torch.ones_like(norm.weight))
        folded.append(
            replace(block, mlp=replace(mlp, out_weight=mlp.out_weight * norm.weight, norm=plain))
        )
    expected = magnitude_scores(weights, weights.graph).neurons
    other = replace(weights, blocks=tuple(folded))
    np.testing.assert_allclose(magnitude_scores(other, weights.graph).neurons, expected, rtol=1e-12)
