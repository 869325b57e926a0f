"""Pairs of a clean and a corrupted image, as positions in one set of images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import TaskError
from vitcut.names import PairMode


class Pairs(NamedTuple):
    """Which image stands in for which; both index the same images."""

    clean: NDArray[np.int64]
    """Shape [pairs]; ascending."""
    corrupted: NDArray[np.int64]
    """Shape [pairs]; always of another group than the clean image."""


def make_pairs(groups: NDArray[np.int64], mode: PairMode, *, seed: int) -> Pairs:
    """Draw corrupted images for every image, from other coarse groups.

    Args:
        groups: The coarse group number of each image, shape [images].
        mode: "each_other_group": one image of each other group that is present, in ascending order
            of groups; "one_random": one image, all those of other groups being equally likely.
        seed: Equal seeds give equal pairs.

    Raises:
        TaskError: Fewer than two groups are present.
    """
    present = np.unique(groups)
    if len(present) < 2:
        raise TaskError(
            f"pairs need images of at least 2 groups, got {len(present)}: "
            "use more images or another task"
        )
    rng = np.random.default_rng(seed)
    images = np.arange(len(groups))
    if mode == "one_random":
        corrupted = np.empty_like(images)
        for group in present:
            inside = groups == group
            corrupted[inside] = rng.choice(images[~inside], size=inside.sum())
        return Pairs(clean=images, corrupted=corrupted)
    # [groups present, images]: a candidate from each group; that of the own group is not used.
    draws = np.stack([rng.choice(images[groups == group], size=len(images)) for group in present])
    other = groups[:, np.newaxis] != present
    return Pairs(clean=np.nonzero(other)[0], corrupted=draws.T[other])
