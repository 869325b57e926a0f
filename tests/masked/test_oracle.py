import math

import numpy as np
import pytest
import torch
from tiny import random_pixels, random_vit

from vitcut.errors import CircuitError
from vitcut.masked.fill import Fill
from vitcut.masked.masking import full_run, masked_logits
from vitcut.masked.oracle import Examples, Oracle

GROUPS = torch.tensor([0, 1, 1, 2])


def make_examples(weights, images: int = 5, pairs: int = 7) -> Examples:
    random = np.random.default_rng(0)
    return Examples(
        pixels=random_pixels(weights, images=images),
        clean=random.integers(0, images, pairs),
        corrupted=random.integers(0, images, pairs),
        group_of_class=GROUPS,
    )


def group_probs(logits: torch.Tensor) -> torch.Tensor:
    fine = logits.softmax(-1)
    return torch.stack([fine[:, kind == GROUPS].sum(-1) for kind in range(3)], dim=-1)


def test_resample_cuts_carry_the_paired_images_value():
    weights = random_vit()
    examples = make_examples(weights)
    kept = weights.graph.edges.copy()
    kept[1, 5:] = kept[0, 2] = False
    clean, corrupted = examples.pixels[examples.clean], examples.pixels[examples.corrupted]
    ablated = torch.stack(full_run(weights, corrupted).sources)
    p = group_probs(full_run(weights, clean).logits)
    q = group_probs(masked_logits(weights, clean, kept, Fill(sources=ablated)))
    expected = (p * (p / q).log()).sum(-1)
    oracle = Oracle(weights, examples, "resample")
    torch.testing.assert_close(oracle.kl_per_pair(kept), expected, rtol=0, atol=1e-10)
    assert oracle.kl(kept) == pytest.approx(expected.mean().item(), abs=1e-10)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_full_circuit_has_no_divergence(ablation):
    weights = random_vit()
    oracle = Oracle(weights, make_examples(weights), ablation)
    assert abs(oracle.kl(weights.graph.edges)) < 1e-12


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_images_count_once_where_the_pairing_is_not_read(ablation):
    weights = random_vit()
    oracle = Oracle(weights, make_examples(weights, images=5, pairs=7), ablation)
    values = oracle.kl_per_pair(np.zeros_like(weights.graph.edges))
    assert len(values) == 5
    assert oracle.kl(np.zeros_like(weights.graph.edges)) == math.fsum(values.tolist()) / 5


def test_single_precision_weights_are_measured_in_double():
    weights = random_vit().to(torch.float32)
    examples = make_examples(weights)
    oracle = Oracle(weights, examples, "mean")
    assert oracle.kl_per_pair(weights.graph.edges).dtype == torch.float64


def test_no_pairs_are_refused():
    weights = random_vit()
    with pytest.raises(CircuitError, match="no pairs"):
        Oracle(weights, make_examples(weights, pairs=0), "resample")
