"""Seeded choices that treat all classes alike."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitcut.images.stratified import choose_evenly, choose_fraction

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


@given(labels=LABELS, seed=st.integers(0, 99), data=st.data())
def test_classes_differ_by_one_at_most_unless_one_runs_out(
    labels: np.ndarray, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(labels)))
    chosen = choose_evenly(labels, count, seed=seed)
    assert len(set(chosen.tolist())) == count
    taken = np.bincount(labels[chosen], minlength=5)
    there = np.bincount(labels, minlength=5)
    assert (taken[taken < there] >= taken.max() - 1).all()


@given(labels=LABELS, seed=st.integers(0, 99), data=st.data())
def test_a_larger_choice_keeps_the_smaller_one(
    labels: np.ndarray, seed: int, data: st.DataObject
) -> None:
    small = data.draw(st.integers(1, len(labels)))
    large = data.draw(st.integers(small, len(labels)))
    first, second = (choose_evenly(labels, n, seed=seed) for n in (small, large))
    assert set(first.tolist()) <= set(second.tolist())


@given(labels=LABELS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_every_class_gives_its_fraction_and_at_least_one(
    labels: np.ndarray, fraction: float, seed: int
) -> None:
    chosen = choose_fraction(labels, fraction, seed=seed)
    for label in np.unique(labels):
        members = labels == label
        assert chosen[members].sum() == max(1, round(members.sum() * fraction))


def test_other_seeds_choose_other_images() -> None:
    labels = np.zeros(100, dtype=np.int64)
    assert set(choose_evenly(labels, 10, seed=0)) != set(choose_evenly(labels, 10, seed=1))
