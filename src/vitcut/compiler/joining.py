"""Pass c of planning: which neighbouring token kinds share one tensor.

A writer is written jointly for two groups where its input is one tensor too, and where that helps
some later reader. A table with a row per token absorbs constants that differ between groups; so a
source that is constant in one group alone may be computed there all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from vitcut.compiler.liveness import Liveness
from vitcut.compiler.reads import EMBED_BIT, Reads
from vitcut.names import LETTERS

Run = tuple[int, int]
"""Neighbouring token kinds: numbers of the first and the last."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Sources that some later target reads alike in both groups of a pair."""

    heads: list[list[int]]
    """Per block and pair: by targets after its heads."""
    mlps: list[list[int]]
    """Per block and pair: by targets after its MLP."""


class Joins:
    """Decides, writer by writer, and remembers."""

    def __init__(self, reads: Reads, liveness: Liveness) -> None:
        self._reads = reads
        self._liveness = liveness
        self._together = [EMBED_BIT] * (reads.num_groups - 1)
        """Per pair of neighbouring groups the sources that are written jointly."""
        self.written: dict[int, tuple[Run, ...]] = {}
        """Per source the runs of groups that it has to be computed for."""
        wanted = _find_wanted(reads, liveness)
        for layer, block in enumerate(reads.blocks):
            for _, source, targets in block.heads:
                self._decide(source, targets["q"], wanted.heads[layer])
            same = self._same_neurons(layer, wanted.mlps[layer])
            self._decide(block.mlp_source, block.mlp_target, same)

    def runs(self, target: int, groups: Sequence[int], *, constants_apart: bool) -> tuple[Run, ...]:
        """The groups of a target in runs whose inputs are one tensor each.

        Args:
            target: Of the unsplit graph.
            groups: In their order.
            constants_apart: Whether groups in which it is constant stay out of the others' runs.
        """
        varies = [bool(self.live(target, (group, group))) for group in self._reads.groups]
        may_join = [not constants_apart or one == other for one, other in pairwise(varies)]
        return self._runs(target, groups, may_join)

    def live(self, target: int, run: Run) -> int:
        """The sources in a run's input that depend on the image, in some of its groups."""
        total = 0
        for group in range(run[0], run[1] + 1):
            total |= self._reads.masks[group][target] & self._liveness.varying[group]
        return total

    def _decide(self, source: int, target: int, wanted: Sequence[int]) -> None:
        bit = 1 << source
        live, reads = self._liveness, self._reads
        groups = [group for group in reads.groups if live.useful[group] & bit]
        may_join = [bool(mask & bit) and not reads.maps_differ for mask in wanted]
        runs = self._runs(target, groups, may_join)
        chosen = [
            run for run in runs if any(live.needed[g] & bit for g in range(run[0], run[1] + 1))
        ]
        if chosen:
            self.written[source] = tuple(chosen)
        for first, last in chosen:
            for pair in range(first, last):
                self._together[pair] |= bit

    def _same_neurons(self, layer: int, wanted: Sequence[int]) -> list[int]:
        """The MLP's bit in the masks of pairs in which it may be joined."""
        neurons, varying = self._reads.neurons[layer], self._liveness.varying
        bit = 1 << self._reads.blocks[layer].mlp_source
        return [
            bit & (mask | varying[pair] & varying[pair + 1])
            if neurons[pair] == neurons[pair + 1]
            else 0
            for pair, mask in enumerate(wanted)
        ]

    def _runs(
        self, target: int, groups: Sequence[int], may_join: Sequence[bool]
    ) -> tuple[Run, ...]:
        found: list[Run] = []
        for group in groups:
            last = group - 1
            if (
                found
                and found[-1][1] == last
                and may_join[last]
                and self._fits(target, (found[-1][0], group))
            ):
                found[-1] = (found[-1][0], group)
            else:
                found.append((group, group))
        return tuple(found)

    def _fits(self, target: int, run: Run) -> bool:
        """Whether all that a run's input is made of is kept in each group, and written jointly."""
        joint = -1
        for group in range(run[0], run[1] + 1):
            joint &= self._reads.masks[group][target] | EMBED_BIT
        for pair in range(*run):
            joint &= self._together[pair]
        return not self.live(target, run) & ~joint


def _find_wanted(reads: Reads, liveness: Liveness) -> _Wanted:
    found = _Wanted(heads=[], mlps=[])
    total = [0] * (reads.num_groups - 1)
    for block in reversed(reads.blocks):
        found.mlps.insert(0, list(total))
        for pair in range(len(total)):
            both = liveness.useful[pair] & liveness.useful[pair + 1]
            if both >> block.mlp_source & 1:
                total[pair] |= _alike(reads, liveness, pair, block.mlp_target)
        found.heads.insert(0, list(total))
        for pair, (_, source, targets) in product(range(len(total)), block.heads):
            asking = [group for group in reads.groups if liveness.useful[group] >> source & 1]
            letters = LETTERS if {pair, pair + 1} <= set(asking) else LETTERS[1:] if asking else ()
            for letter in letters:
                total[pair] |= _alike(reads, liveness, pair, targets[letter])
    return found


def _alike(reads: Reads, liveness: Liveness, pair: int, target: int) -> int:
    """What a target keeps in both groups of a pair, if that is the same."""
    one, other = reads.masks[pair][target], reads.masks[pair + 1][target]
    return 0 if (one ^ other) & liveness.somewhere & ~EMBED_BIT else one & other
