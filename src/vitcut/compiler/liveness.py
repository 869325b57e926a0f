"""Passes a and b of planning: what depends on the image, and what of it is needed.

Both are known per token group. Which groups share a tensor is left to ``joining.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vitcut.compiler.reads import EMBED_BIT, Reads
from vitcut.names import LETTERS


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
    graph = reads.graph
    # Class token and registers enter block 0 the same for every image.
    varying = [0] * reads.num_groups
    varying[-1] = EMBED_BIT
    for layer in range(graph.num_layers):
        before = tuple(varying)
        for head, source in reads.heads(layer):
            q, k, v = (graph.head_target(layer, head, letter) for letter in LETTERS)
            mixed = any(reads.masks[g][t] & before[g] for g in reads.groups for t in (k, v))
            for group in reads.groups:
                if mixed or reads.masks[group][q] & before[group]:
                    varying[group] |= 1 << source
        for group in reads.groups:
            target = graph.mlp_target(layer)
            if reads.masks[group][target] & varying[group] and reads.hidden[layer][group]:
                varying[group] |= 1 << graph.mlp_source(layer)
    return varying


def _find_needed(reads: Reads, alive: Sequence[int]) -> list[int]:
    """Sources that some target reads which is not dead, as far as they are alive."""
    graph = reads.graph
    needed = [0] * reads.num_groups

    def read(group: int, target: int) -> None:
        needed[group] |= reads.masks[group][target] & alive[group]

    for group in reads.readout:
        read(group, graph.classifier)
    for layer in reversed(range(graph.num_layers)):
        for group in reads.groups:
            if needed[group] >> graph.mlp_source(layer) & 1:
                read(group, graph.mlp_target(layer))
        for head, source in reads.heads(layer):
            asking = [group for group in reads.groups if needed[group] >> source & 1]
            for group in asking:
                read(group, graph.head_target(layer, head, "q"))
            for group in reads.groups if asking else ():
                read(group, graph.head_target(layer, head, "k"))
                read(group, graph.head_target(layer, head, "v"))
    return needed


def _union(masks: Sequence[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total
