"""What a circuit keeps, what of that depends on the image, and what of that is needed.

The first three passes of planning (``planning.py`` lists them all). They work on masks: sets of
sources of the unsplit graph, one for each target and token kind. Kinds go by their position among
the tokens: 0 for the first, and the patches are always the last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import pairwise
from operator import or_
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.graph import Graph
from vitcut.names import LETTERS, Letter

Mask = int
"""A set of sources: bit s is set where source s of the unsplit graph is in it. Planning spends most
of its time on ``&``, ``|`` and ``~`` of masks."""

NOTHING: Mask = 0
EMBED: Mask = 1
"""The source ``embed``, which is number 0 in every unsplit graph."""

Run = range
"""A run of adjacent token kinds, whose rows stand in one tensor: ``range(0, 2)`` for the first two.
Adjacent kinds have adjacent tokens, so the rows of a run are one slice."""


def first_sources(count: int) -> Mask:
    """The sources that are written first, such as all before some target."""
    return (1 << count) - 1


def union(masks: Iterable[Mask]) -> Mask:
    """The sources that are in any mask."""
    return reduce(or_, masks, NOTHING)


def masks_of(columns: NDArray[np.bool_]) -> list[Mask]:
    """One mask per column of an array of shape [sources, targets]."""
    packed = np.packbits(columns, axis=0, bitorder="little").T.tobytes()
    size = -(-len(columns) // 8)
    return [
        int.from_bytes(packed[start : start + size], "little")
        for start in range(0, len(packed), size)
    ]


class Head(NamedTuple):
    """A head of a block."""

    number: int
    source: Mask
    """What it writes, as a mask of one source."""
    targets: dict[Letter, int]


class Block(NamedTuple):
    """A block's sources, each as a mask of its own, and its targets."""

    heads: tuple[Head, ...]
    mlp_source: Mask
    mlp_target: int
    sources: Mask
    """All of its sources."""


@cache
def _find_blocks(graph: Graph) -> tuple[Block, ...]:
    found: list[Block] = []
    for layer in range(graph.num_layers):
        heads = tuple(
            Head(
                number,
                1 << graph.head_source(layer, number),
                {letter: graph.head_target(layer, number, letter) for letter in LETTERS},
            )
            for number in range(graph.num_heads)
        )
        mlp = 1 << graph.mlp_source(layer)
        sources = union(head.source for head in heads) | mlp
        found.append(Block(heads, mlp, graph.mlp_target(layer), sources))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Which sources each target of a circuit keeps, per token kind."""

    graph: Graph
    """The unsplit graph."""
    blocks: tuple[Block, ...]
    kinds: range
    """All token kinds."""
    readout: tuple[int, ...]
    """The kinds that the classifier reads."""
    masks: tuple[tuple[Mask, ...], ...]
    """Per kind and target, the kept sources of that kind."""
    neurons: tuple[tuple[bytes, ...], ...]
    """Per block and kind, the kept neurons; equal bytes mean the same neurons."""
    hidden: tuple[tuple[int, ...], ...]
    """Per block and kind, how many neurons are kept."""
    cut_neurons: tuple[Mask, ...]
    """Per kind, the MLPs that lack neurons."""
    ablates: bool
    """Whether cut parts carry anything but zeros."""
    maps_differ: bool
    """Whether a head or neuron may write differently for different kinds."""

    @classmethod
    def of(cls, circuit: Circuit, hidden: int, *, maps_differ: bool) -> "Reads":
        """Read a circuit over token kinds, of a model with so many neurons per MLP."""
        graph, num_kinds = circuit.graph, circuit.graph.num_kinds
        blocks = _find_blocks(graph.unsplit)
        neurons = circuit.neurons
        if neurons is None:
            neurons = np.ones((len(blocks), num_kinds, hidden), dtype=np.bool_)
        counts: list[list[int]] = neurons.sum(axis=2).tolist()
        return cls(
            graph=graph.unsplit,
            blocks=blocks,
            kinds=range(num_kinds),
            readout=tuple(graph.kinds.index(kind) for kind in graph.readout),
            masks=tuple(
                tuple(masks_of(graph.of_kind(circuit.kept, kind))) for kind in range(num_kinds)
            ),
            neurons=tuple(tuple(kept.tobytes() for kept in block) for block in neurons),
            hidden=tuple(tuple(row) for row in counts),
            cut_neurons=tuple(
                union(
                    block.mlp_source
                    for block, row in zip(blocks, counts, strict=True)
                    if row[kind] < hidden
                )
                for kind in range(num_kinds)
            ),
            ablates=circuit.ablation != "zero",
            maps_differ=maps_differ,
        )


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """What a compact model has to compute for a circuit: sources per token kind."""

    varying: tuple[Mask, ...]
    """Sources that depend on the image. All others write constants."""
    needed: tuple[Mask, ...]
    """Those of them that a needed target reads."""
    useful: tuple[Mask, ...]
    """What would be needed if a source that varies in one kind varied in all."""


def find_liveness(reads: Reads) -> Liveness:
    """Find constants forwards, then needs backwards."""
    # The class token and the registers enter block 0 the same for every image.
    varying = [NOTHING] * len(reads.kinds)
    varying[-1] = EMBED
    for block, hidden in zip(reads.blocks, reads.hidden, strict=True):
        for _, source, targets in block.heads:
            q, k, v = targets.values()
            # Keys and values of every kind reach the queries of all.
            mixed = any(
                (masks[k] | masks[v]) & seen
                for masks, seen in zip(reads.masks, varying, strict=True)
            )
            for kind, masks in enumerate(reads.masks):
                if mixed or masks[q] & varying[kind]:
                    varying[kind] |= source
        for kind, masks in enumerate(reads.masks):
            if hidden[kind] and masks[block.mlp_target] & varying[kind]:
                varying[kind] |= block.mlp_source
    return Liveness(
        varying=tuple(varying),
        needed=_find_needed(reads, varying),
        useful=_find_needed(reads, [union(varying)] * len(varying)),
    )


def _find_needed(reads: Reads, varying: Sequence[Mask]) -> tuple[Mask, ...]:
    """Per kind, the varying sources that some target with a path to the classifier reads."""
    needed = [NOTHING] * len(reads.kinds)

    def read(kind: int, target: int) -> None:
        needed[kind] |= reads.masks[kind][target] & varying[kind]

    for kind in reads.readout:
        read(kind, reads.graph.classifier)
    for block in reversed(reads.blocks):
        for kind in reads.kinds:
            if needed[kind] & block.mlp_source:
                read(kind, block.mlp_target)
        for _, source, targets in block.heads:
            asking = [kind for kind in reads.kinds if needed[kind] & source]
            for kind in asking:
                read(kind, targets["q"])
            for kind in reads.kinds if asking else ():
                read(kind, targets["k"])
                read(kind, targets["v"])
    return tuple(needed)


class Joins:
    """Which adjacent token kinds share one tensor, decided source by source.

    Two kinds share what a source writes if its input is one tensor too, and if some later target
    reads the same sources in both. A table with a row per token holds constants that differ between
    kinds. So a source that is constant in one kind only may be computed for that kind as well.
    """

    def __init__(self, reads: Reads, liveness: Liveness) -> None:
        self.reads, self.liveness = reads, liveness
        self._together = [EMBED] * (len(reads.kinds) - 1)
        """Per pair of adjacent kinds, the sources that are written jointly."""
        self.written: dict[Mask, tuple[Run, ...]] = {}
        """For each needed source, the runs of kinds that it is computed for."""
        varying, neurons = liveness.varying, reads.neurons
        wanted = _find_wanted(reads, liveness)
        # In the order of writing: a target reads earlier sources only, and those are decided.
        for layer, block in enumerate(reads.blocks):
            by_heads, by_mlp = wanted[layer]
            for _, source, targets in block.heads:
                self._decide(source, targets["q"], [bool(mask & source) for mask in by_heads])
            # One product for both kinds needs the same neurons in both.
            may_join = [
                bool(block.mlp_source & (mask | varying[pair] & varying[pair + 1]))
                and neurons[layer][pair] == neurons[layer][pair + 1]
                for pair, mask in enumerate(by_mlp)
            ]
            self._decide(block.mlp_source, block.mlp_target, may_join)

    def _decide(self, source: Mask, target: int, may_join: Sequence[bool]) -> None:
        """Choose the runs that a source is computed for; ``target`` is what it is computed from."""
        useful, needed = self.liveness.useful, self.liveness.needed
        kinds = [kind for kind in self.reads.kinds if useful[kind] & source]
        # A linear fill adds its maps to the output weights, here other ones for each kind.
        if self.reads.maps_differ:
            may_join = [False] * len(may_join)
        runs = self.runs(target, kinds, may_join)
        runs = tuple(run for run in runs if any(needed[kind] & source for kind in run))
        if runs:
            self.written[source] = runs
        for run in runs:
            for pair in run[:-1]:
                self._together[pair] |= source

    def runs(self, target: int, kinds: Sequence[int], may_join: Sequence[bool]) -> tuple[Run, ...]:
        """The runs of kinds for which a target's input is one tensor.

        Args:
            target: A target of the unsplit graph.
            kinds: The kinds to put into runs, in ascending order.
            may_join: Per pair of adjacent kinds, whether they may be in one run.
        """
        found: list[Run] = []
        for kind in kinds:
            if found and found[-1].stop == kind and may_join[kind - 1]:
                run = range(found[-1].start, kind + 1)
                # What varies in the input must be kept in each kind, and be written as one tensor.
                joint = ~NOTHING
                for each in run:
                    joint &= self.reads.masks[each][target] | EMBED
                for pair in run[:-1]:
                    joint &= self._together[pair]
                if not self.live(target, run) & ~joint:
                    found[-1] = run
                    continue
            found.append(range(kind, kind + 1))
        return tuple(found)

    def live(self, target: int, run: Run) -> Mask:
        """The sources in a target's input that depend on the image in some kind of a run."""
        masks, varying = self.reads.masks, self.liveness.varying
        return union(masks[kind][target] & varying[kind] for kind in run)


def _find_wanted(reads: Reads, liveness: Liveness) -> list[tuple[list[Mask], list[Mask]]]:
    """The sources that some later target reads alike in both kinds of a pair.

    Returns:
        Per block, two lists over the pairs of adjacent kinds: what targets behind its heads read
        alike, and what targets behind its MLP do.
    """
    useful, kinds = liveness.useful, reads.kinds
    differing = union(liveness.varying) & ~EMBED
    total = [NOTHING] * (len(kinds) - 1)

    def read(pair: int, target: int) -> None:
        one, other = reads.masks[pair][target], reads.masks[pair + 1][target]
        if not (one ^ other) & differing:
            total[pair] |= one & other

    found: list[tuple[list[Mask], list[Mask]]] = []
    for block in reversed(reads.blocks):
        behind_mlp = list(total)
        for pair, (one, other) in enumerate(pairwise(useful)):
            if one & other & block.mlp_source:
                read(pair, block.mlp_target)
        found.append((list(total), behind_mlp))
        for _, source, targets in block.heads:
            asking = [bool(mask & source) for mask in useful]
            for pair in range(len(total)) if any(asking) else ():
                if asking[pair] and asking[pair + 1]:
                    read(pair, targets["q"])
                read(pair, targets["k"])
                read(pair, targets["v"])
    return found[::-1]
