import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitcut.benchmark.bootstrap import bootstrap_interval, paired_interval
from vitcut.errors import ConfigError

samples = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=40).map(np.array)


@settings(max_examples=20, deadline=None)
@given(samples, st.integers(0, 5))
def test_an_interval_is_ordered_inside_the_samples_and_repeatable(values, seed):
    for statistic in (np.mean, np.median):
        low, high = bootstrap_interval(values, statistic, seed=seed)
        assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9
        assert bootstrap_interval(values, statistic, seed=seed) == (low, high)


def test_equal_samples_leave_no_doubt():
    assert bootstrap_interval(np.full(9, 2.5), np.median, seed=0) == (2.5, 2.5)


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(size=900)
    low, high = bootstrap_interval(values, np.mean, seed=0)
    assert abs((high - low) - 2 * 1.96 / 30) < 0.015
    assert low < values.mean() < high


def test_the_interval_covers_the_truth_nineteen_times_of_twenty():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        low, high = bootstrap_interval(rng.normal(size=60), np.median, seed=seed)
        covered += low <= 0 <= high
    assert 88 <= covered <= 100


def test_a_paired_interval_is_narrow_where_two_models_err_alike():
    rng = np.random.default_rng(0)
    correct = rng.random(1000) < 0.7
    reference = correct.copy()
    reference[:20] = ~reference[:20]
    low, high = paired_interval(correct, reference, seed=0)
    difference = correct.mean() - reference.mean()
    assert low <= difference <= high
    assert high - low < 0.025
    assert paired_interval(correct, correct, seed=0) == (0.0, 0.0)


def test_a_worse_model_has_a_negative_interval():
    low, high = paired_interval(np.zeros(50, bool), np.ones(50, bool), seed=0)
    assert (low, high) == (-1.0, -1.0)


def test_a_paired_interval_of_different_images_is_refused():
    with pytest.raises(ConfigError, match="got 3 and 2"):
        paired_interval(np.ones(3, bool), np.ones(2, bool), seed=0)
