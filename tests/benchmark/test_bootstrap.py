import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vitcut.benchmark.bootstrap import mean_interval, median_interval

samples = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=40).map(np.array)


@settings(max_examples=20, deadline=None)
@given(samples, st.integers(0, 5))
def test_an_interval_is_ordered_inside_the_samples_and_repeatable(values, seed):
    for interval in (mean_interval, median_interval):
        low, high = interval(values, seed=seed)
        assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9
        assert interval(values, seed=seed) == (low, high)


def test_equal_samples_leave_no_doubt():
    assert median_interval(np.full(9, 2.5), seed=0) == (2.5, 2.5)


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(size=900)
    low, high = mean_interval(values, seed=0)
    assert abs((high - low) - 2 * 1.96 / 30) < 0.015
    assert low < values.mean() < high


def test_the_interval_covers_the_truth_nineteen_times_of_twenty():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        low, high = median_interval(rng.normal(size=60), seed=seed)
        covered += low <= 0 <= high
    assert 88 <= covered <= 100
