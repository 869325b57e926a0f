"""Passes a and b of planning: which rows of which sources are needed, and what is constant.

A constant depends on no image. Which sums and products follow is left to ``streams.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vitcut.circuit import Circuit
from vitcut.compact.plan import Rows
from vitcut.graph import Graph

Needed = Literal["none", "readout", "all"]
"""Rows of a source that must be computed: none, the class token's, or every token's."""


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """What a compact model has to compute for a circuit."""

    needed: tuple[Needed, ...]
    """Per source; none for what is constant or reaches nothing."""
    constant_sources: frozenset[int]
    """Sources that write the same for every image, at least in the rows that are read."""
    constant_targets: frozenset[int]
    """Targets that read the same for every image."""

    def rows(self, source: int) -> Rows:
        """The rows of a source that is needed."""
        return "all" if self.needed[source] == "all" else "readout"


def find_liveness(circuit: Circuit) -> Liveness:
    """Constants forwards and needed rows backwards, in turn, until nothing changes.

    They depend on each other: the class token's own row of ``embed`` is a constant, so what reads
    nothing else, and is needed in that row alone, is one too.
    """
    graph = circuit.graph
    needed: tuple[Needed, ...] = ("all",) * len(graph.sources)
    while True:
        targets, sources = _find_constants(circuit, needed)
        found = _find_needed(circuit, targets, sources)
        if found == needed:
            return Liveness(needed=needed, constant_sources=sources, constant_targets=targets)
        needed = found


def _input_rows(graph: Graph, target: int, output: Needed) -> Needed:
    """The rows that a target has to read, given those needed of the source that it feeds."""
    keys_or_values = graph.targets[target].kind in {"k", "v"}
    return "all" if keys_or_values and output != "none" else output


def _find_constants(
    circuit: Circuit, needed: Sequence[Needed]
) -> tuple[frozenset[int], frozenset[int]]:
    """Targets and sources that are constant, given the rows that are needed of each source."""
    graph = circuit.graph
    targets: set[int] = set()
    sources: set[int] = set()

    def visit(target: int, rows: Needed) -> None:
        same = sources if rows == "all" else {*sources, 0}
        if set(np.flatnonzero(circuit.kept[:, target]).tolist()) <= same:
            targets.add(target)

    for source in range(1, len(graph.sources)):
        readers = graph.targets_of(source)
        for target in readers:
            visit(target, _input_rows(graph, target, needed[source]))
        if targets.issuperset(readers):
            sources.add(source)
    visit(graph.classifier, "readout")
    return frozenset(targets), frozenset(sources)


def _find_needed(
    circuit: Circuit, constant_targets: frozenset[int], constant_sources: frozenset[int]
) -> tuple[Needed, ...]:
    """Rows that some target reads which is neither constant nor dead."""
    graph = circuit.graph
    needed: list[Needed] = ["none"] * len(graph.sources)
    inputs: list[Needed] = ["none"] * len(graph.targets)
    inputs[graph.classifier] = "readout"
    for source in reversed(range(len(graph.sources))):
        if source not in constant_sources:
            readers = set(np.flatnonzero(circuit.kept[source]).tolist()) - constant_targets
            rows = {inputs[target] for target in readers}
            needed[source] = "all" if "all" in rows else "readout" if "readout" in rows else "none"
        for target in graph.targets_of(source):
            inputs[target] = _input_rows(graph, target, needed[source])
    return tuple(needed)
