"""Passes a and b of planning: what depends on the image, and what of it is needed.

Both are known per token kind. Which groups share a tensor is left to ``joining.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vitcut.compiler.reads import EMBED_BIT, Reads


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """What a compact model has to compute for a circuit, as masks of sources per group."""

    varying: tuple[int, ...]
    """Sources that depend on the image; all others write constants."""
    needed: tuple[int, ...]
    """Those of them that a needed target reads."""
    useful: tuple[int, ...]
    """Sources that would be needed if whatever varies in some group varied in all."""

    @property
    def somewhere(self) -> int:
        """Sources that depend on the image in some group."""
        return _union(self.varying)


def find_liveness(reads: Reads) -> Liveness:
    """Constants forwards, then needs backwards."""
    varying = _find_varying(reads)
    everywhere = [_union(varying)] * reads.num_groups
    return Liveness(
        varying=tuple(varying),
        needed=tuple(_find_needed(reads, varying)),
        useful=tuple(_find_needed(reads, everywhere)),
    )


def _find_varying(reads: Reads) -> list[int]:
    # Class token and registers enter block 0 the same for every image.
    varying = [0] * reads.num_groups
    varying[-1] = EMBED_BIT
    for block, hidden in zip(reads.blocks, reads.hidden, strict=True):
        before = tuple(varying)
        for _, source, targets in block.heads:
            q, k, v = targets.values()
            mixed = any(
                masks[k] & seen or masks[v] & seen
                for masks, seen in zip(reads.masks, before, strict=True)
            )
            for group, masks in enumerate(reads.masks):
                if mixed or masks[q] & before[group]:
                    varying[group] |= 1 << source
        for group, masks in enumerate(reads.masks):
            if masks[block.mlp_target] & varying[group] and hidden[group]:
                varying[group] |= 1 << block.mlp_source
    return varying


def _find_needed(reads: Reads, alive: Sequence[int]) -> list[int]:
    """Sources that some target reads which is not dead, as far as they are alive."""
    needed = [0] * reads.num_groups

    def read(group: int, target: int) -> None:
        needed[group] |= reads.masks[group][target] & alive[group]

    for group in reads.readout:
        read(group, reads.graph.classifier)
    for block in reversed(reads.blocks):
        for group in reads.groups:
            if needed[group] >> block.mlp_source & 1:
                read(group, block.mlp_target)
        for _, source, targets in block.heads:
            asking = [group for group in reads.groups if needed[group] >> source & 1]
            for group in asking:
                read(group, targets["q"])
            for group in reads.groups if asking else ():
                read(group, targets["k"])
                read(group, targets["v"])
    return needed


def _union(masks: Sequence[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total
