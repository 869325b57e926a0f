"""The residual graph of a ViT: sources write, targets read, edges join them. Knows no tensors.

Sources in the order in which they write: ``embed``, then per block its heads and its MLP. A target
reads every source written before it. The counting follows EAP and AutoCircuit: one edge per source
and per q, k or v input of a head.

With token groups every source, target and edge exists once per group. A target reads the sources of
its own group; queries of a group feed the head's source of that group, keys and values of every
group feed the head's sources of all groups; the classifier reads the readout groups alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import CircuitError
from vitcut.names import LETTERS, TOKEN_GROUPS, Letter, TokenGroup, Tokens


@dataclass(frozen=True, kw_only=True)
class Source:
    """What writes into the residual stream."""

    kind: Literal["embed", "head", "mlp"]
    layer: int
    """Block number; -1 for embed."""
    head: int
    """Head number within the block; -1 unless a head."""
    group: TokenGroup | None = None
    """The tokens that it writes to; None for all."""

    @property
    def name(self) -> str:
        """``embed``, ``attn.L.H`` or ``mlp.L``, followed by ``.GROUP`` where there are groups."""
        if self.kind == "embed":
            return _in_group("embed", self.group)
        name = f"attn.{self.layer}.{self.head}" if self.kind == "head" else f"mlp.{self.layer}"
        return _in_group(name, self.group)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What reads the residual stream, before its LayerNorm."""

    kind: Literal["q", "k", "v", "mlp", "classifier"]
    layer: int
    """Block number; the number of blocks for the classifier."""
    head: int
    """Head number within the block; -1 unless q, k or v."""
    group: TokenGroup | None = None
    """The tokens that it reads; None for all."""

    @property
    def name(self) -> str:
        """``attn.L.H.q`` (k, v), ``mlp.L`` or ``classifier``, with ``.GROUP`` as for sources."""
        if self.kind == "classifier":
            return _in_group("classifier", self.group)
        if self.kind == "mlp":
            return _in_group(f"mlp.{self.layer}", self.group)
        return _in_group(f"attn.{self.layer}.{self.head}.{self.kind}", self.group)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All sources, targets and edges of a pre-norm ViT, over whole tokens or per token group.

    Numbers: a source of the unsplit graph keeps its place, with one number per group; targets
    likewise, the classifier with one per readout group. Methods that take a ``group`` take its
    position in ``groups``; without groups it is 0.
    """

    num_layers: int
    num_heads: int
    groups: tuple[TokenGroup, ...] = ()
    """The token groups in the order of their tokens; empty for whole tokens."""
    readout: tuple[TokenGroup, ...] = ()
    """The groups that the classifier reads; empty for whole tokens."""

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_heads < 1:
            raise CircuitError(
                f"a graph needs at least 1 block and 1 head, got {self.num_layers} blocks of "
                f"{self.num_heads} heads"
            )
        for name, chosen, known in (
            ("groups", self.groups, TOKEN_GROUPS),
            ("readout", self.readout, self.groups),
        ):
            if tuple(group for group in known if group in chosen) != chosen:
                raise CircuitError(
                    f"{name} must be different ones of {', '.join(known) or 'no group'}, in this "
                    f"order, got {', '.join(chosen)}"
                )
        if bool(self.groups) != bool(self.readout):
            raise CircuitError("a graph has token groups and readout groups, or neither")

    @property
    def tokens(self) -> Tokens:
        """Whether sources and targets are over whole tokens or per group."""
        return "split" if self.groups else "all"

    @property
    def num_groups(self) -> int:
        """Sources per writer: 1 for whole tokens."""
        return max(1, len(self.groups))

    @cached_property
    def unsplit(self) -> "Graph":
        """The graph of the same model over whole tokens."""
        return Graph(num_layers=self.num_layers, num_heads=self.num_heads)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Every source, in the order in which they write."""
        groups = self.groups or (None,)
        found = [Source(kind="embed", layer=-1, head=-1, group=group) for group in groups]
        for layer in range(self.num_layers):
            found += [
                Source(kind="head", layer=layer, head=head, group=group)
                for head, group in product(range(self.num_heads), groups)
            ]
            found += [Source(kind="mlp", layer=layer, head=-1, group=group) for group in groups]
        return tuple(found)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """Every target, in the order in which they read: per block q, k, v, then the MLP."""
        groups = self.groups or (None,)
        found: list[Target] = []
        for layer in range(self.num_layers):
            found += [
                Target(kind=letter, layer=layer, head=head, group=group)
                for letter, head, group in product(LETTERS, range(self.num_heads), groups)
            ]
            found += [Target(kind="mlp", layer=layer, head=-1, group=group) for group in groups]
        found += [
            Target(kind="classifier", layer=self.num_layers, head=-1, group=group)
            for group in self.readout or (None,)
        ]
        return tuple(found)

    def group_number(self, part: Source | Target) -> int:
        """The position of a source's or target's group in ``groups``; 0 for whole tokens."""
        return 0 if part.group is None else self.groups.index(part.group)

    def embed_source(self, group: int = 0) -> int:
        """The number of the source ``embed``."""
        return group

    def head_source(self, layer: int, head: int, group: int = 0) -> int:
        """The number of the source ``attn.layer.head``."""
        return (1 + layer * (self.num_heads + 1) + head) * self.num_groups + group

    def mlp_source(self, layer: int, group: int = 0) -> int:
        """The number of the source ``mlp.layer``."""
        return self.head_source(layer, self.num_heads, group)

    def head_target(self, layer: int, head: int, letter: Letter, group: int = 0) -> int:
        """The number of the target ``attn.layer.head.letter``."""
        block = layer * (3 * self.num_heads + 1)
        place = block + LETTERS.index(letter) * self.num_heads + head
        return place * self.num_groups + group

    def letter_targets(self, layer: int, letter: Letter, group: int = 0) -> range:
        """The numbers of the targets ``attn.layer.*.letter`` of a group, one per head."""
        first = self.head_target(layer, 0, letter, group)
        return range(first, first + self.num_heads * self.num_groups, self.num_groups)

    def mlp_target(self, layer: int, group: int = 0) -> int:
        """The number of the target ``mlp.layer``."""
        return self.head_target(layer + 1, 0, "q", group) - self.num_groups

    @cached_property
    def classifiers(self) -> tuple[int, ...]:
        """The numbers of the targets ``classifier``, one per readout group; the last ones."""
        first = self.head_target(self.num_layers, 0, "q")
        return tuple(range(first, first + max(1, len(self.readout))))

    @property
    def classifier(self) -> int:
        """The number of the first target ``classifier``: the only one of a single readout."""
        return self.classifiers[0]

    def target_in_group(self, target: int, group: int) -> int | None:
        """The number of an unsplit graph's target in a group; None where no classifier reads it."""
        if target != self.unsplit.classifier:
            return target * self.num_groups + group
        if not self.groups:
            return target
        name = self.groups[group]
        return self.classifiers[self.readout.index(name)] if name in self.readout else None

    def sources_of(self, target: int) -> tuple[int, ...]:
        """The sources that are computed from a target; the classifier feeds none."""
        item = self.targets[target]
        if item.kind == "classifier":
            return ()
        own = self.group_number(item)
        if item.kind == "mlp":
            return (self.mlp_source(item.layer, own),)
        groups = range(self.num_groups) if item.kind in {"k", "v"} else (own,)
        return tuple(self.head_source(item.layer, item.head, group) for group in groups)

    def targets_of(self, source: int) -> tuple[int, ...]:
        """The targets that a source is computed from: q, k, v of a head, the MLP's own, or none.

        Of a head: q of the source's own group, then k of every group, then v of every group.
        """
        item = self.sources[source]
        if item.kind == "embed":
            return ()
        own = self.group_number(item)
        if item.kind == "mlp":
            return (self.mlp_target(item.layer, own),)
        query = self.head_target(item.layer, item.head, "q", own)
        return (
            query,
            *(
                self.head_target(item.layer, item.head, letter, group)
                for letter in ("k", "v")
                for group in range(self.num_groups)
            ),
        )

    def num_written(self, target: int) -> int:
        """How many sources of the unsplit graph are written before a target reads."""
        item = self.targets[target]
        heads = self.num_heads if item.kind == "mlp" else 0
        return 1 + item.layer * (self.num_heads + 1) + heads

    def readable(self, target: int) -> range:
        """The numbers of the sources that a target can read, in the order of writing."""
        group = self.group_number(self.targets[target])
        return range(group, self.num_written(target) * self.num_groups, self.num_groups)

    @cached_property
    def edges(self) -> NDArray[np.bool_]:
        """Which (source, target) pairs are edges, shape [sources, targets]; read-only."""
        edges = np.zeros((len(self.sources), len(self.targets)), dtype=np.bool_)
        for target in range(len(self.targets)):
            edges[self.readable(target), target] = True
        edges.setflags(write=False)
        return edges

    @cached_property
    def num_edges(self) -> int:
        """The number of edges."""
        return int(self.edges.sum())

    @cached_property
    def useful_edges(self) -> NDArray[np.bool_]:
        """Edges from which the classifier can be reached, shape [sources, targets]; read-only.

        The others are structurally dead, as in the last block where the classifier reads no patch:
        percentages leave them out.
        """
        live, _ = self.find_live(self.edges)
        useful = self.edges & live
        useful.setflags(write=False)
        return useful

    @cached_property
    def num_useful_edges(self) -> int:
        """The number of edges from which the classifier can be reached."""
        return int(self.useful_edges.sum())

    def find_live(self, kept: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """What has a path to the classifier along kept edges.

        Args:
            kept: True where an edge is kept, shape [sources, targets].

        Returns:
            Live targets and live sources, shapes [targets] and [sources].
        """
        targets = np.zeros(len(self.targets), dtype=np.bool_)
        targets[list(self.classifiers)] = True
        sources = np.zeros(len(self.sources), dtype=np.bool_)
        # A key or value target reads before any source that it feeds is written.
        for source in reversed(range(len(self.sources))):
            sources[source] = bool((kept[source] & targets).any())
            if sources[source]:
                targets[list(self.targets_of(source))] = True
        return targets, sources

    def by_block(
        self, of_sources: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """What holds of each source, by block; views where ``of_sources`` is contiguous.

        Args:
            of_sources: Shape [sources]; embed is left out.

        Returns:
            Of heads, shape [blocks, heads, groups], and of MLPs, shape [blocks, groups].
        """
        shape = (self.num_layers, self.num_heads + 1, self.num_groups)
        found = of_sources[self.num_groups :].reshape(shape)
        return found[:, :-1], found[:, -1]

    @cached_property
    def source_numbers(self) -> dict[str, int]:
        """Source names to numbers."""
        return {source.name: number for number, source in enumerate(self.sources)}

    @cached_property
    def target_numbers(self) -> dict[str, int]:
        """Target names to numbers."""
        return {target.name: number for number, target in enumerate(self.targets)}

    def in_group(self, kept: NDArray[np.bool_], group: int) -> NDArray[np.bool_]:
        """The edges of one group as edges of the unsplit graph.

        Args:
            kept: True where an edge is kept, shape [sources, targets].
            group: Position of the group.

        Returns:
            Shape [sources, targets] of the unsplit graph; a classifier that the group lacks reads
            nothing.
        """
        columns = [t for t, item in enumerate(self.targets) if self.group_number(item) == group]
        found = np.zeros(self.unsplit.edges.shape, dtype=np.bool_)
        found[:, : len(columns)] = kept[group :: self.num_groups, columns]
        return found

    def backward_order(self) -> Iterator[int]:
        """Targets as ACDC visits them.

        The classifier, then per block from the last: its MLP, all v, all k, all q, heads
        descending in each (order of Conmy et al. 2023, arXiv:2304.14997, code version 1.1); of
        each the groups in their order.
        """
        yield from self.classifiers
        groups = range(self.num_groups)
        for layer in reversed(range(self.num_layers)):
            yield from (self.mlp_target(layer, group) for group in groups)
            for letter in reversed(LETTERS):
                for head, group in product(reversed(range(self.num_heads)), groups):
                    yield self.head_target(layer, head, letter, group)


def _in_group(name: str, group: TokenGroup | None) -> str:
    return name if group is None else f"{name}.{group}"
