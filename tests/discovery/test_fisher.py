import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part_scores import fisher_scores, trace_gradients
from strategies import vits
from tiny import random_pixels, random_vit

from vitcut.errors import CircuitError
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import fixed_fill, resample_fill
from vitcut.masked.masking import full_run, masked_logits
from vitcut.masked.oracle import Examples
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.model.weights import ViTWeights, map_tensors

GROUPS = torch.tensor([0, 1, 1, 2])


def examples_of(weights, images: int = 3) -> Examples:
    return Examples(
        pixels=random_pixels(weights, images=images),
        clean=np.array([*range(images), 0]),
        corrupted=np.array([*range(1, images), 0, images - 1]),
        group_of_class=GROUPS,
    )


class Cuts:
    """Cuts one part at a time, for each pair by its own table: clean + eps * (ablated - clean)."""

    def __init__(self, weights, examples, ablation, tokens):
        self.weights, self.graph = weights, weights.graph_of(tokens)
        examples = examples.for_ablation(ablation)
        self.pixels = examples.pixels[examples.clean]
        run = full_run(weights, self.pixels)
        self.full = self.log_probs(run.logits)
        self.clean = Fill(sources=torch.stack(run.sources), neurons=torch.stack(run.neurons))
        if ablation == "resample":
            pixels = examples.pixels[examples.corrupted]
            self.ablated = resample_fill(weights, pixels, neurons=True)
        else:
            fill = fixed_fill(ablation, weights, [examples.pixels])
            self.ablated = Fill(sources=fill.sources[:, None], neurons=fill.neurons[:, None])

    @staticmethod
    def log_probs(logits):
        return coarse_log_probs(logits, GROUPS, 3)

    def along(self, eps: float, kept=None, neurons=None) -> torch.Tensor:
        """log q of every pair with a part changed by a fraction of its change."""

        def towards(name):
            clean, ablated = getattr(self.clean, name), getattr(self.ablated, name)
            return clean + eps * (ablated - clean)

        fill = Fill(sources=towards("sources"), neurons=towards("neurons"))
        kept = self.graph.edges if kept is None else kept
        logits = masked_logits(
            self.weights, self.pixels, kept, fill, graph=self.graph, neurons=neurons
        )
        return self.log_probs(logits)

    def formula(self, **part) -> float:
        """1/2 mean_x sum_y p < grad log p, d >^2, the products by central differences."""
        step = 1e-5
        slope = (self.along(step, **part) - self.along(-step, **part)) / (2 * step)
        return float((self.full.exp() * slope.square()).sum(-1).mean() / 2)

    def kl(self, eps: float, **part) -> float:
        return float(kl_divergence(self.full, self.along(eps, **part)).mean())

    def without_head(self, layer, head, kind):
        kept = self.graph.edges.copy()
        kept[self.graph.head_source(layer, head, kind)] = False
        return {"kept": kept}

    def without_neuron(self, layer, kind, neuron):
        graph = self.graph
        neurons = np.ones((graph.num_layers, graph.num_kinds, self.weights.num_neurons), bool)
        neurons[layer, kind, neuron] = False
        return {"neurons": neurons}

    def without_edge(self, source, target):
        kept = self.graph.edges.copy()
        kept[source, target] = False
        return {"kept": kept}


CASES = {
    "ablation": st.sampled_from(["zero", "mean", "resample"]),
    "tokens": st.sampled_from(["all", "split"]),
}


@given(weights=vits(max_layers=2, max_heads=2), data=st.data(), **CASES)
@settings(max_examples=25)
def test_scores_are_the_fisher_form_of_the_change(weights, data, ablation, tokens):
    examples = examples_of(weights)
    scores = fisher_scores(weights, examples, ablation, tokens=tokens, edges=True)
    cuts = Cuts(weights, examples, ablation, tokens)

    def compare(got, expected):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-9)

    for place in np.ndindex(scores.heads.shape):
        compare(scores.heads[place], cuts.formula(**cuts.without_head(*place)))
    for place in np.ndindex(scores.neurons.shape):
        compare(scores.neurons[place], cuts.formula(**cuts.without_neuron(*place)))
    edges = np.argwhere(cuts.graph.edges)
    assert np.isnan(scores.edges[~cuts.graph.edges]).all()
    for number in data.draw(st.lists(st.integers(0, len(edges) - 1), min_size=8, max_size=8)):
        compare(
            scores.edges[tuple(edges[number])], cuts.formula(**cuts.without_edge(*edges[number]))
        )


@given(weights=vits(max_layers=2, max_heads=2), tokens=CASES["tokens"])
@settings(max_examples=10)
def test_scores_without_edges_are_the_same(weights, tokens):
    examples = examples_of(weights)
    one, other = (
        fisher_scores(weights, examples, "resample", tokens=tokens, edges=edges)
        for edges in (False, True)
    )
    assert one.edges is None
    np.testing.assert_allclose(one.heads, other.heads, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(one.neurons, other.neurons, rtol=1e-9, atol=1e-15)


def by_hand() -> ViTWeights:
    """One token of width 2 whose only neuron moves logit 0: its score can be written down."""
    weights = random_vit(
        num_layers=1, num_heads=1, width=2, hidden=1, patches_per_side=1, num_classes=2
    )
    weights = map_tensors(weights, torch.zeros_like)
    mlp, norm = weights.blocks[0].mlp, weights.norm
    mlp.in_bias[:] = 3.0
    mlp.out_weight[:] = torch.tensor([[0.1], [-0.1]], dtype=torch.float64)
    norm.weight[:] = 1.0
    weights.prefix[:] = torch.tensor([[2.0, -2.0]])
    weights.head_weight[:] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    weights = replace(weights, norm=replace(norm, eps=12.0 - 2.3**2))
    relu = replace(weights.blocks[0], mlp=replace(mlp, activation="relu"))
    return replace(weights, blocks=(relu,))


def test_a_score_that_can_be_written_down():
    weights = by_hand()
    pixels = random_pixels(weights, images=2)
    examples = Examples(
        pixels=pixels,
        clean=np.arange(2),
        corrupted=np.arange(2),
        group_of_class=torch.tensor([0, 1]),
    )
    # The stream is (2.3, -2.3); normalised (a, -a), a = 2.3 / sqrt(12); logits (a, 0).
    # Cutting the neuron takes 0.3 off: da = 0.3 / sqrt(12) * (1 - 2.3^2 / 12).
    a, da = 2.3 / 12**0.5, -0.3 / 12**0.5 * (1 - 2.3**2 / 12)
    p = 1 / (1 + math.exp(-a))
    expected = p * (1 - p) * da**2 / 2
    for tokens in ("all", "split"):
        scores = fisher_scores(weights, examples, "zero", tokens=tokens, edges=True)
        assert scores.neurons[0, 0, 0] == pytest.approx(expected, rel=1e-12)
        graph = weights.graph_of(tokens)
        edge = scores.edges[graph.mlp_source(0), graph.classifier]
        assert edge == pytest.approx(expected, rel=1e-12)
        assert (scores.heads == 0).all()
    assert scores.neurons[0, 1, 0] == 0, "no patch is read after the last MLP"


@pytest.mark.parametrize("ablation", ["mean", "resample"])
@pytest.mark.parametrize("tokens", ["all", "split"])
def test_scores_of_small_changes_are_the_exact_divergence(ablation, tokens):
    weights = random_vit(3, num_layers=2)
    examples = examples_of(weights)
    scores = fisher_scores(weights, examples, ablation, tokens=tokens, edges=True)
    cuts, eps = Cuts(weights, examples, ablation, tokens), 1e-3
    graph = cuts.graph
    edge = graph.head_source(0, 1), graph.mlp_target(1)
    for score, part in (
        (scores.heads[0, 1, 0], cuts.without_head(0, 1, 0)),
        (scores.heads[1, 0, 0], cuts.without_head(1, 0, 0)),
        (scores.neurons[0, -1, 2], cuts.without_neuron(0, -1 % graph.num_kinds, 2)),
        (scores.edges[edge], cuts.without_edge(*edge)),
    ):
        ratio = score * eps**2 / cuts.kl(eps, **part)
        assert ratio == pytest.approx(1, abs=0.01)


def test_what_changes_nothing_scores_zero():
    weights = random_vit()
    images = np.arange(3)
    examples = replace(examples_of(weights), clean=images, corrupted=images)
    scores = fisher_scores(weights, examples, "resample", edges=True)
    np.testing.assert_allclose(scores.heads, 0, atol=1e-20)
    np.testing.assert_allclose(scores.neurons, 0, atol=1e-20)
    np.testing.assert_allclose(scores.edges[weights.split_graph.edges], 0, atol=1e-20)


def test_parts_that_reach_nothing_score_zero():
    weights = random_vit(num_layers=2)
    scores = fisher_scores(weights, examples_of(weights), "zero", edges=True)
    patch = list(weights.kind_rows).index("patch")
    assert (scores.heads[-1, :, patch] == 0).all()
    assert (scores.neurons[-1, patch] == 0).all()
    graph = weights.split_graph
    assert (scores.edges[graph.edges & ~graph.useful_edges] == 0).all()
    assert (scores.edges[graph.useful_edges] > 0).mean() > 0.95


def test_scores_do_not_depend_on_how_images_are_batched():
    weights = random_vit()
    examples = examples_of(weights, images=19)
    many = fisher_scores(weights, examples, "resample")
    alone = [
        fisher_scores(
            weights,
            replace(examples, clean=examples.clean[[n]], corrupted=examples.corrupted[[n]]),
            "resample",
        )
        for n in range(20)
    ]
    np.testing.assert_allclose(many.heads, np.mean([one.heads for one in alone], 0), rtol=1e-9)
    np.testing.assert_allclose(many.neurons, np.mean([one.neurons for one in alone], 0), rtol=1e-9)


def tensors_of(weights) -> list[torch.Tensor]:
    found = []
    map_tensors(weights, lambda tensor: found.append(tensor) or tensor)
    return found


def test_the_model_and_the_images_are_left_as_they_were():
    weights = map_tensors(random_vit(), lambda tensor: tensor.requires_grad_())
    before = map_tensors(weights, lambda tensor: tensor.detach().clone())
    examples = examples_of(weights)
    with torch.no_grad():
        scores = fisher_scores(weights, examples, "mean", edges=True)
    assert np.isfinite(scores.heads).all()
    for tensor, other in zip(tensors_of(weights), tensors_of(before), strict=True):
        assert torch.equal(tensor, other)
        assert tensor.grad is None
    assert examples.pixels.grad is None
    assert not examples.pixels.requires_grad


def test_gradients_of_log_probabilities_weighted_by_them_sum_to_nothing():
    weights = random_vit()
    _, passes = trace_gradients(
        weights, random_pixels(weights), GROUPS, lambda run: [run.heads[0], run.neurons[1]]
    )
    totals = [torch.zeros(()), torch.zeros(())]
    for found in passes:
        shares = found.log_prob.exp()
        totals[0] = totals[0] + found.by[0] * shares[:, None, None]
        totals[1] = totals[1] + found.by[1] * shares[:, None, None]
    for total in totals:
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)


def test_linear_ablation_has_no_scores_of_single_parts():
    weights = random_vit()
    with pytest.raises(CircuitError, match="choose mean or zero"):
        fisher_scores(weights, examples_of(weights), "linear")
