"""Which sources each target keeps, as bit masks: what every pass of planning works on.

Sources and targets have the numbers of the unsplit graph here; each exists once per token kind.
Bit n of a mask stands for source n.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from vitcut.circuit import Circuit
from vitcut.graph import Graph
from vitcut.names import LETTERS, Letter

EMBED_SOURCE = 0
"""The number of ``embed`` among the sources of any unsplit graph."""
EMBED_BIT = 1 << EMBED_SOURCE


class Head(NamedTuple):
    """A head of a block."""

    number: int
    source: int
    targets: dict[Letter, int]


class Block(NamedTuple):
    """The numbers of a block's sources and targets."""

    heads: tuple[Head, ...]
    mlp_source: int
    mlp_target: int


@cache
def _number_blocks(graph: Graph) -> tuple[Block, ...]:
    return tuple(
        Block(
            heads=tuple(
                Head(
                    number=head,
                    source=graph.head_source(layer, head),
                    targets={x: graph.head_target(layer, head, x) for x in LETTERS},
                )
                for head in range(graph.num_heads)
            ),
            mlp_source=graph.mlp_source(layer),
            mlp_target=graph.mlp_target(layer),
        )
        for layer in range(graph.num_layers)
    )


@dataclass(frozen=True, kw_only=True)
class Reads:
    """A circuit over token kinds in integers."""

    graph: Graph
    """The unsplit one."""
    num_groups: int
    readout: tuple[int, ...]
    """Numbers of the groups that the classifier reads."""
    masks: tuple[tuple[int, ...], ...]
    """Per group and target the kept sources."""
    neurons: tuple[tuple[bytes, ...], ...]
    """Per block and group what tells its kept neurons from others; empty where none is kept."""
    hidden: tuple[tuple[int, ...], ...]
    """Per block and group how many neurons are kept."""
    cut_neurons: tuple[int, ...]
    """Per group the MLPs that lack neurons."""
    ablates: bool
    """Whether what is cut carries anything but zeros."""
    maps_differ: bool
    """Whether the same head or neuron may write differently for two groups."""

    @classmethod
    def of(cls, circuit: Circuit, hidden: int, *, maps_differ: bool) -> "Reads":
        """Read a circuit over token kinds.

        Args:
            circuit: Over token kinds.
            hidden: Neurons per MLP.
            maps_differ: As the attribute.
        """
        graph, unsplit = circuit.graph, circuit.graph.unsplit
        blocks, groups = graph.num_layers, graph.num_kinds
        readout = tuple(graph.kinds.index(group) for group in graph.readout)
        neurons = circuit.neurons
        if neurons is None:
            neurons = np.ones((blocks, groups, hidden), dtype=np.bool_)
        counts = neurons.sum(axis=2).tolist()
        return cls(
            graph=unsplit,
            num_groups=groups,
            readout=readout,
            masks=tuple(_group_masks(circuit, group, readout) for group in range(groups)),
            neurons=tuple(
                tuple(neurons[block, group].tobytes() for group in range(groups))
                for block in range(blocks)
            ),
            hidden=tuple(tuple(row) for row in counts),
            cut_neurons=tuple(
                sum(
                    1 << unsplit.mlp_source(block)
                    for block in range(blocks)
                    if counts[block][group] < hidden
                )
                for group in range(groups)
            ),
            ablates=circuit.ablation != "zero",
            maps_differ=maps_differ,
        )

    @cached_property
    def groups(self) -> range:
        """Numbers of all groups."""
        return range(self.num_groups)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The numbers of each block's sources and targets."""
        return _number_blocks(self.graph)


def _group_masks(circuit: Circuit, group: int, readout: tuple[int, ...]) -> tuple[int, ...]:
    """Per target of the unsplit graph the kept sources of a group."""
    graph = circuit.graph
    columns = list(range(group, graph.classifier, graph.num_kinds))
    if group in readout:
        columns.append(graph.classifiers[readout.index(group)])
    kept = circuit.kept[group :: graph.num_kinds, columns]
    packed = np.packbits(kept, axis=0, bitorder="little").T.tobytes()
    size = len(packed) // len(columns)
    masks = [
        int.from_bytes(packed[start : start + size], "little")
        for start in range(0, len(packed), size)
    ]
    return tuple(masks) if group in readout else (*masks, 0)
