import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitcut.metrics import coarse_log_probs, kl_divergence

GROUP_OF_CLASS = torch.tensor([0, 1, 1, 2, 1, 0])


def _logits(seed: int, images: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(images, len(GROUP_OF_CLASS), generator=draw, dtype=torch.float64) * 5


@given(st.integers(0, 2**32 - 1))
def test_the_task_distribution_sums_fine_probabilities_per_group(seed):
    logits = _logits(seed)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected.index_add_(1, GROUP_OF_CLASS, logits.softmax(1))
    coarse = coarse_log_probs(logits, GROUP_OF_CLASS, 3)
    torch.testing.assert_close(coarse.exp(), expected, rtol=1e-12, atol=1e-15)


def test_the_best_group_need_not_hold_the_best_class():
    logits = torch.tensor([[0.4, 0.3, 0.3]]).log()
    coarse = coarse_log_probs(logits, torch.tensor([0, 1, 1]), 2)
    assert logits.argmax(1).item() == 0
    assert coarse.argmax(1).item() == 1


def test_improbable_groups_are_not_clamped():
    coarse = coarse_log_probs(torch.tensor([[0.0, -500.0]]), torch.tensor([0, 1]), 2)
    assert coarse[0, 1].item() == -500.0


@given(st.integers(0, 2**32 - 1))
def test_kl_is_zero_for_equals_and_positive_otherwise(seed):
    full, circuit = (_logits(seed + i).log_softmax(1) for i in range(2))
    assert kl_divergence(full, full).abs().max() == 0
    assert kl_divergence(full, circuit).min() > 0


def test_kl_of_a_coin_is_what_paper_says():
    full, circuit = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(full, circuit).item() == pytest.approx(expected, abs=1e-6)


def test_kl_counts_what_the_full_model_holds_impossible_as_nothing():
    full = torch.tensor([[0.0, -math.inf]])
    assert kl_divergence(full, torch.tensor([[0.0, -math.inf]])).item() == 0
    assert kl_divergence(full, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(
        math.log(2)
    )


def test_kl_is_infinite_where_the_circuit_excludes_what_happens():
    full = torch.tensor([[0.5, 0.5]]).log()
    assert kl_divergence(full, torch.tensor([[0.0, -math.inf]])).item() == math.inf
