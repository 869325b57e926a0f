"""The residual graph of a ViT: sources write, targets read, edges join them. Knows no tensors.

Sources in the order in which they write: ``embed``, then per block its heads and its MLP. A target
reads every source written before it. The counting follows EAP and AutoCircuit: one edge per source
and per q, k or v input of a head.

With token kinds every source, target and edge exists once per kind. A target reads the sources of
its own kind; queries of a kind feed the head's source of that kind, keys and values of every
kind feed the head's sources of all kinds; the classifier reads the readout kinds alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import CircuitError
from vitcut.names import LETTERS, TOKEN_KINDS, Letter, TokenKind, Tokens


@dataclass(frozen=True, kw_only=True)
class Source:
    """What writes into the residual stream."""

    role: Literal["embed", "head", "mlp"]
    layer: int
    """Block number; -1 for embed."""
    head: int
    """Head number within the block; -1 unless a head."""
    kind: TokenKind | None = None
    """The tokens that it writes to; None for all."""

    @property
    def name(self) -> str:
        """``embed``, ``attn.L.H`` or ``mlp.L``, followed by ``.GROUP`` where there are kinds."""
        if self.role == "embed":
            return _of_kind("embed", self.kind)
        name = f"attn.{self.layer}.{self.head}" if self.role == "head" else f"mlp.{self.layer}"
        return _of_kind(name, self.kind)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What reads the residual stream, before its LayerNorm."""

    role: Literal["q", "k", "v", "mlp", "classifier"]
    layer: int
    """Block number; the number of blocks for the classifier."""
    head: int
    """Head number within the block; -1 unless q, k or v."""
    kind: TokenKind | None = None
    """The tokens that it reads; None for all."""

    @property
    def name(self) -> str:
        """``attn.L.H.q`` (k, v), ``mlp.L`` or ``classifier``, with ``.GROUP`` as for sources."""
        if self.role == "classifier":
            return _of_kind("classifier", self.kind)
        if self.role == "mlp":
            return _of_kind(f"mlp.{self.layer}", self.kind)
        return _of_kind(f"attn.{self.layer}.{self.head}.{self.role}", self.kind)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All sources, targets and edges of a pre-norm ViT, over whole tokens or per token kind.

    Numbers: a source of the unsplit graph keeps its place, with one number per kind; targets
    likewise, the classifier with one per readout kind. Methods that take a ``kind`` take its
    position in ``kinds``; without kinds it is 0.
    """

    num_layers: int
    num_heads: int
    kinds: tuple[TokenKind, ...] = ()
    """The token kinds in the order of their tokens; empty for whole tokens."""
    readout: tuple[TokenKind, ...] = ()
    """The kinds that the classifier reads; empty for whole tokens."""

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_heads < 1:
            raise CircuitError(
                f"a graph needs at least 1 block and 1 head, got {self.num_layers} blocks of "
                f"{self.num_heads} heads"
            )
        for name, chosen, known in (
            ("kinds", self.kinds, TOKEN_KINDS),
            ("readout", self.readout, self.kinds),
        ):
            if tuple(kind for kind in known if kind in chosen) != chosen:
                raise CircuitError(
                    f"{name} must be different ones of {', '.join(known) or 'no kind'}, in this "
                    f"order, got {', '.join(chosen)}"
                )
        if bool(self.kinds) != bool(self.readout):
            raise CircuitError("a graph has token kinds and readout kinds, or neither")

    @property
    def tokens(self) -> Tokens:
        """Whether sources and targets are over whole tokens or per kind."""
        return "split" if self.kinds else "all"

    @property
    def num_kinds(self) -> int:
        """Sources per writer: 1 for whole tokens."""
        return max(1, len(self.kinds))

    @cached_property
    def unsplit(self) -> "Graph":
        """The graph of the same model over whole tokens."""
        return Graph(num_layers=self.num_layers, num_heads=self.num_heads)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Every source, in the order in which they write."""
        kinds = self.kinds or (None,)
        found = [Source(role="embed", layer=-1, head=-1, kind=kind) for kind in kinds]
        for layer in range(self.num_layers):
            found += [
                Source(role="head", layer=layer, head=head, kind=kind)
                for head, kind in product(range(self.num_heads), kinds)
            ]
            found += [Source(role="mlp", layer=layer, head=-1, kind=kind) for kind in kinds]
        return tuple(found)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """Every target, in the order in which they read: per block q, k, v, then the MLP."""
        kinds = self.kinds or (None,)
        found: list[Target] = []
        for layer in range(self.num_layers):
            found += [
                Target(role=letter, layer=layer, head=head, kind=kind)
                for letter, head, kind in product(LETTERS, range(self.num_heads), kinds)
            ]
            found += [Target(role="mlp", layer=layer, head=-1, kind=kind) for kind in kinds]
        found += [
            Target(role="classifier", layer=self.num_layers, head=-1, kind=kind)
            for kind in self.readout or (None,)
        ]
        return tuple(found)

    def kind_number(self, part: Source | Target) -> int:
        """The position of a source's or target's kind in ``kinds``; 0 for whole tokens."""
        return 0 if part.kind is None else self.kinds.index(part.kind)

    def embed_source(self, kind: int = 0) -> int:
        """The number of the source ``embed``."""
        return kind

    def head_source(self, layer: int, head: int, kind: int = 0) -> int:
        """The number of the source ``attn.layer.head``."""
        return (1 + layer * (self.num_heads + 1) + head) * self.num_kinds + kind

    def mlp_source(self, layer: int, kind: int = 0) -> int:
        """The number of the source ``mlp.layer``."""
        return self.head_source(layer, self.num_heads, kind)

    def head_target(self, layer: int, head: int, letter: Letter, kind: int = 0) -> int:
        """The number of the target ``attn.layer.head.letter``."""
        block = layer * (3 * self.num_heads + 1)
        place = block + LETTERS.index(letter) * self.num_heads + head
        return place * self.num_kinds + kind

    def letter_targets(self, layer: int, letter: Letter, kind: int = 0) -> range:
        """The numbers of the targets ``attn.layer.*.letter`` of a kind, one per head."""
        first = self.head_target(layer, 0, letter, kind)
        return range(first, first + self.num_heads * self.num_kinds, self.num_kinds)

    def mlp_target(self, layer: int, kind: int = 0) -> int:
        """The number of the target ``mlp.layer``."""
        return self.head_target(layer + 1, 0, "q", kind) - self.num_kinds

    @cached_property
    def classifiers(self) -> tuple[int, ...]:
        """The numbers of the targets ``classifier``, one per readout kind; the last ones."""
        first = self.head_target(self.num_layers, 0, "q")
        return tuple(range(first, first + max(1, len(self.readout))))

    @property
    def classifier(self) -> int:
        """The number of the first target ``classifier``: the only one of a single readout."""
        return self.classifiers[0]

    def target_of_kind(self, target: int, kind: int) -> int | None:
        """The number of an unsplit graph's target in a kind; None where no classifier reads it."""
        if target != self.unsplit.classifier:
            return target * self.num_kinds + kind
        if not self.kinds:
            return target
        name = self.kinds[kind]
        return self.classifiers[self.readout.index(name)] if name in self.readout else None

    def sources_of(self, target: int) -> tuple[int, ...]:
        """The sources that are computed from a target; the classifier feeds none."""
        item = self.targets[target]
        if item.role == "classifier":
            return ()
        own = self.kind_number(item)
        if item.role == "mlp":
            return (self.mlp_source(item.layer, own),)
        kinds = range(self.num_kinds) if item.role in {"k", "v"} else (own,)
        return tuple(self.head_source(item.layer, item.head, kind) for kind in kinds)

    def targets_of(self, source: int) -> tuple[int, ...]:
        """The targets that a source is computed from: q, k, v of a head, the MLP's own, or none.

        Of a head: q of the source's own kind, then k of every kind, then v of every kind.
        """
        item = self.sources[source]
        if item.role == "embed":
            return ()
        own = self.kind_number(item)
        if item.role == "mlp":
            return (self.mlp_target(item.layer, own),)
        query = self.head_target(item.layer, item.head, "q", own)
        return (
            query,
            *(
                self.head_target(item.layer, item.head, letter, kind)
                for letter in ("k", "v")
                for kind in range(self.num_kinds)
            ),
        )

    def num_written(self, target: int) -> int:
        """How many sources of the unsplit graph are written before a target reads."""
        item = self.targets[target]
        heads = self.num_heads if item.role == "mlp" else 0
        return 1 + item.layer * (self.num_heads + 1) + heads

    def readable(self, target: int) -> range:
        """The numbers of the sources that a target can read, in the order of writing."""
        kind = self.kind_number(self.targets[target])
        return range(kind, self.num_written(target) * self.num_kinds, self.num_kinds)

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
            Of heads, shape [blocks, heads, kinds], and of MLPs, shape [blocks, kinds].
        """
        shape = (self.num_layers, self.num_heads + 1, self.num_kinds)
        found = of_sources[self.num_kinds :].reshape(shape)
        return found[:, :-1], found[:, -1]

    @cached_property
    def source_numbers(self) -> dict[str, int]:
        """Source names to numbers."""
        return {source.name: number for number, source in enumerate(self.sources)}

    @cached_property
    def target_numbers(self) -> dict[str, int]:
        """Target names to numbers."""
        return {target.name: number for number, target in enumerate(self.targets)}

    def of_kind(self, kept: NDArray[np.bool_], kind: int) -> NDArray[np.bool_]:
        """The edges of one kind as edges of the unsplit graph.

        Args:
            kept: True where an edge is kept, shape [sources, targets].
            kind: Position of the kind.

        Returns:
            Shape [sources, targets] of the unsplit graph; a classifier that the kind lacks reads
            nothing.
        """
        columns = [t for t, item in enumerate(self.targets) if self.kind_number(item) == kind]
        found = np.zeros(self.unsplit.edges.shape, dtype=np.bool_)
        found[:, : len(columns)] = kept[kind :: self.num_kinds, columns]
        return found

    def backward_order(self) -> Iterator[int]:
        """Targets as ACDC visits them.

        The classifier, then per block from the last: its MLP, all v, all k, all q, heads
        descending in each (order of Conmy et al. 2023, arXiv:2304.14997, code version 1.1); of
        each the kinds in their order.
        """
        yield from self.classifiers
        kinds = range(self.num_kinds)
        for layer in reversed(range(self.num_layers)):
            yield from (self.mlp_target(layer, kind) for kind in kinds)
            for letter in reversed(LETTERS):
                for head, kind in product(reversed(range(self.num_heads)), kinds):
                    yield self.head_target(layer, head, letter, kind)


def _of_kind(name: str, kind: TokenKind | None) -> str:
    return name if kind is None else f"{name}.{kind}"
