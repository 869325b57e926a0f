"""Pairs of clean and corrupted images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcut.discovery.search import make_pairs
from vitcut.errors import TaskError

GROUPS = (
    st.lists(st.integers(0, 5), min_size=2, max_size=40)
    .map(np.array)
    .filter(lambda groups: len(set(groups.tolist())) > 1)
)


@given(groups=GROUPS, seed=st.integers(0, 99))
def test_every_image_meets_each_other_group_once(groups: np.ndarray, seed: int) -> None:
    clean, corrupted = make_pairs(groups, "each_other_group", seed=seed)
    present = set(groups.tolist())
    assert len(clean) == len(groups) * (len(present) - 1)
    for image, group in enumerate(groups):
        met = groups[corrupted[clean == image]]
        assert met.tolist() == sorted(present - {group})


@given(groups=GROUPS, seed=st.integers(0, 99))
def test_one_random_is_of_another_group(groups: np.ndarray, seed: int) -> None:
    clean, corrupted = make_pairs(groups, "one_random", seed=seed)
    assert clean.tolist() == list(range(len(groups)))
    assert (groups[clean] != groups[corrupted]).all()


@pytest.mark.parametrize("mode", ["each_other_group", "one_random"])
def test_a_seed_fixes_the_pairs(mode: str) -> None:
    groups = np.arange(60) % 3
    first, second, other = (make_pairs(groups, mode, seed=seed)[1].tolist() for seed in (4, 4, 5))
    assert first == second != other


def test_all_images_of_other_groups_are_drawn() -> None:
    groups = np.repeat([0, 1, 2], [100, 2, 4])
    _, corrupted = make_pairs(groups, "one_random", seed=0)
    assert set(corrupted[:100].tolist()) == set(range(100, 106))


def test_one_group_alone_cannot_be_paired() -> None:
    with pytest.raises(TaskError, match="at least 2 groups, got 1"):
        make_pairs(np.zeros(4, dtype=np.int64), "one_random", seed=0)
