"""The residual graph of a ViT: sources write to the residual stream, targets read from it.

Numbers and names only, no tensors. Sources are numbered in the order in which they write: embed,
then per block its heads and its MLP. A target reads all sources written before it: these pairs are
the edges. As in EAP and AutoCircuit, each q, k and v input of a head is a target of its own.

With token kinds there is one source, target and edge per kind, and one stream per kind. A head and
the MLP of one block, for two kinds (targets in brackets, sources in parentheses, o is a sum)::

    cls ----+----------+----------------o-----------+--------------o---> [classifier.cls]
            |          |                |           |              |
            |       [q.cls] -----> (attn.cls)   [mlp.cls] ---> (mlp.cls)
            |                           ^
      [k.cls, v.cls] -------------------+
      [k.patch, v.patch] ---------------+
            |                           v
            |      [q.patch] ---> (attn.patch)  [mlp.patch] -> (mlp.patch)
            |          |                |           |              |
    patch --+----------+----------------o-----------+--------------o---> [classifier.patch]

A query sees the keys and values of all tokens, so k and v of each kind feed the head's sources of
all kinds. Only kinds that are read out have a classifier.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import CircuitError
from vitcut.names import LETTERS, TOKEN_KINDS, Letter, TokenKind, Tokens

SiteKey = tuple[int, str, int]
"""Block, "heads" or "neurons", number of the token kind: parts that can stand in for each other.
Positions, which all blocks share, are a site of block 0: (0, "positions", kind of the patches)."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A source or a target; targets read before their LayerNorm."""

    role: Literal["embed", "head", "q", "k", "v", "mlp", "classifier"]
    """An MLP has a target and a source of the same role and name."""
    layer: int
    """Block number; -1 for embed, the number of blocks for the classifier."""
    head: int = -1
    """Head number within the block, for the roles head, q, k and v."""
    kind: TokenKind | None = None
    """The tokens that are written or read; None for all tokens."""

    @property
    def name(self) -> str:
        """``embed``, ``attn.L.H`` (``.q``, ``.k``, ``.v``), ``mlp.L`` or ``classifier``.

        With token kinds, ``.KIND`` is appended.
        """
        if self.role in {"embed", "classifier"}:
            name = self.role
        elif self.role == "mlp":
            name = f"mlp.{self.layer}"
        else:
            name = f"attn.{self.layer}.{self.head}"
            name += "" if self.role == "head" else f".{self.role}"
        return name if self.kind is None else f"{name}.{self.kind}"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All sources, targets and edges of a pre-norm ViT, over whole tokens or per token kind.

    Methods that take a ``kind`` take its position in ``kinds``; without kinds it is 0.
    """

    # Numbering. Without kinds, block L of H heads has the sources
    #     1 + L (H + 1) + {0 ... H-1 heads, H the MLP}          after embed, which is 0
    # and the targets
    #     L (3H + 1) + {0 ... H-1 all q, H ... all k, 2H ... all v, 3H the MLP}
    # with the classifier last. With K kinds, number n becomes the K numbers n K + kind. So the
    # parts of one kind are a slice with step K, except the classifier: it has one number per kind
    # of the readout.

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
        for field, chosen, known in (
            ("kinds", self.kinds, TOKEN_KINDS),
            ("readout", self.readout, self.kinds),
        ):
            if chosen != tuple(kind for kind in known if kind in chosen):
                raise CircuitError(
                    f"{field} must be distinct kinds from {', '.join(known) or '(none)'}, in this "
                    f"order, got {', '.join(chosen)}"
                )
        if bool(self.kinds) != bool(self.readout):
            raise CircuitError(
                f"kinds and readout must both be given or both be empty, got {self.kinds} and "
                f"{self.readout}"
            )

    @property
    def tokens(self) -> Tokens:
        """Whether sources and targets are over whole tokens or per kind."""
        return "split" if self.kinds else "all"

    @property
    def num_kinds(self) -> int:
        """The number of token kinds; 1 for whole tokens."""
        return max(1, len(self.kinds))

    @cached_property
    def unsplit(self) -> "Graph":
        """The graph of the same model over whole tokens."""
        return Graph(num_layers=self.num_layers, num_heads=self.num_heads)

    @cached_property
    def sources(self) -> tuple[Place, ...]:
        """All sources, in the order in which they write."""
        whole = [Place(role="embed", layer=-1)]
        for layer in range(self.num_layers):
            whole += [Place(role="head", layer=layer, head=head) for head in range(self.num_heads)]
            whole += [Place(role="mlp", layer=layer)]
        numbered = product(whole, self.kinds or (None,))
        return tuple(replace(source, kind=kind) for source, kind in numbered)

    @cached_property
    def targets(self) -> tuple[Place, ...]:
        """All targets, in the order in which they read: per block q, k, v, then the MLP."""
        whole: list[Place] = []
        for layer in range(self.num_layers):
            inputs = product(LETTERS, range(self.num_heads))
            whole += [Place(role=letter, layer=layer, head=head) for letter, head in inputs]
            whole += [Place(role="mlp", layer=layer)]
        last = Place(role="classifier", layer=self.num_layers)
        numbered = [
            *product(whole, self.kinds or (None,)),
            *product([last], self.readout or (None,)),
        ]
        return tuple(replace(target, kind=kind) for target, kind in numbered)

    @cached_property
    def source_numbers(self) -> dict[str, int]:
        """The number of each source, by name."""
        return {source.name: number for number, source in enumerate(self.sources)}

    @cached_property
    def target_numbers(self) -> dict[str, int]:
        """The number of each target, by name."""
        return {target.name: number for number, target in enumerate(self.targets)}

    def kind_number(self, place: Place) -> int:
        """The position of a source's or target's kind in ``kinds``; 0 for whole tokens."""
        return 0 if place.kind is None else self.kinds.index(place.kind)

    def head_source(self, layer: int, head: int, kind: int = 0) -> int:
        """The number of the source ``attn.layer.head``."""
        return (1 + layer * (self.num_heads + 1) + head) * self.num_kinds + kind

    def mlp_source(self, layer: int, kind: int = 0) -> int:
        """The number of the source ``mlp.layer``."""
        return self.head_source(layer, self.num_heads, kind)

    def head_target(self, layer: int, head: int, letter: Letter, kind: int = 0) -> int:
        """The number of the target ``attn.layer.head.letter``."""
        first = layer * (3 * self.num_heads + 1)
        place = first + LETTERS.index(letter) * self.num_heads + head
        return place * self.num_kinds + kind

    def letter_targets(self, layer: int, letter: Letter, kind: int = 0) -> range:
        """The numbers of the targets ``attn.layer.*.letter`` of one kind, one per head."""
        first = self.head_target(layer, 0, letter, kind)
        return range(first, first + self.num_heads * self.num_kinds, self.num_kinds)

    def mlp_target(self, layer: int, kind: int = 0) -> int:
        """The number of the target ``mlp.layer``: the last of its block."""
        return self.head_target(layer + 1, 0, "q", kind) - self.num_kinds

    @cached_property
    def classifiers(self) -> tuple[int, ...]:
        """The numbers of the targets ``classifier``: the last ones, one per readout kind."""
        first = self.head_target(self.num_layers, 0, "q")
        return tuple(range(first, first + max(1, len(self.readout))))

    @property
    def classifier(self) -> int:
        """The number of the first target ``classifier``; the only one if one kind is read out."""
        return self.classifiers[0]

    def target_of_kind(self, target: int, kind: int) -> int | None:
        """The number that a target of the unsplit graph has here, for one kind.

        None for the classifier of a kind that is not read out.
        """
        name = self.kinds[kind] if self.kinds else None
        return self.target_numbers.get(replace(self.unsplit.targets[target], kind=name).name)

    def sources_of(self, target: int) -> tuple[int, ...]:
        """The sources that are computed from a target; none from the classifier."""
        item = self.targets[target]
        if item.role == "classifier":
            return ()
        own = self.kind_number(item)
        if item.role == "mlp":
            return (self.mlp_source(item.layer, own),)
        kinds = range(self.num_kinds) if item.role in {"k", "v"} else (own,)
        return tuple(self.head_source(item.layer, item.head, kind) for kind in kinds)

    def targets_of(self, source: int) -> tuple[int, ...]:
        """The targets that a source is computed from; none for embed.

        For a head: q of the source's own kind, then k of all kinds, then v of all kinds.
        """
        item = self.sources[source]
        if item.role == "embed":
            return ()
        own = self.kind_number(item)
        if item.role == "mlp":
            return (self.mlp_target(item.layer, own),)
        layer, head, kinds = item.layer, item.head, range(self.num_kinds)
        return (
            self.head_target(layer, head, "q", own),
            *(self.head_target(layer, head, "k", kind) for kind in kinds),
            *(self.head_target(layer, head, "v", kind) for kind in kinds),
        )

    def num_written(self, target: int) -> int:
        """How many sources of the unsplit graph are written before a target reads."""
        item = self.targets[target]
        # Attention reads before the heads of its own block write, the MLP after them.
        heads = self.num_heads if item.role == "mlp" else 0
        return 1 + item.layer * (self.num_heads + 1) + heads

    def readable(self, target: int) -> range:
        """The numbers of the sources that a target can read, in the order in which they write."""
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
        """The edges with a path to the classifier, shape [sources, targets]; read-only.

        The others are structurally dead, for example what the patches of the last block read if
        the classifier reads no patches. They are left out of percentages.
        """
        useful = self.edges & self.find_live(self.edges)[0]
        useful.setflags(write=False)
        return useful

    @cached_property
    def num_useful_edges(self) -> int:
        """The number of edges with a path to the classifier."""
        return int(self.useful_edges.sum())

    def find_live(self, kept: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Find the targets and sources that have a path of kept edges to the classifier.

        Args:
            kept: True where an edge is kept, shape [sources, targets].

        Returns:
            Live targets and live sources, shapes [targets] and [sources].
        """
        targets = np.zeros(len(self.targets), dtype=np.bool_)
        targets[list(self.classifiers)] = True
        sources = np.zeros(len(self.sources), dtype=np.bool_)
        # One pass is enough. Every reader of a source feeds only sources with larger numbers (or
        # is the classifier), so in descending order its readers are decided before the source is.
        for source in reversed(range(len(self.sources))):
            sources[source] = bool((kept[source] & targets).any())
            if sources[source]:
                targets[list(self.targets_of(source))] = True
        return targets, sources

    def by_block(
        self, of_sources: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Arrange one value per source by block; embed is left out.

        Args:
            of_sources: Shape [sources].

        Returns:
            Those of heads, shape [blocks, heads, kinds], and of MLPs, shape [blocks, kinds]; views
            if ``of_sources`` is contiguous.
        """
        shape = (self.num_layers, self.num_heads + 1, self.num_kinds)
        found = of_sources[self.num_kinds :].reshape(shape)
        return found[:, :-1], found[:, -1]

    def of_kind(self, kept: NDArray[np.bool_], kind: int) -> NDArray[np.bool_]:
        """The edges of one kind, as edges of the unsplit graph.

        Args:
            kept: True where an edge is kept, shape [sources, targets].
            kind: Position of the kind.

        Returns:
            Shape [sources, targets] of the unsplit graph. The classifier of a kind that is not read
            out keeps no edge.
        """
        columns = list(range(kind, self.classifier, self.num_kinds))
        columns += [t for t in self.classifiers if self.kind_number(self.targets[t]) == kind]
        found = np.zeros(self.unsplit.edges.shape, dtype=np.bool_)
        found[:, : len(columns)] = kept[kind :: self.num_kinds, columns]
        return found

    def backward_order(self) -> Iterator[int]:
        """Iterate over the targets in the order in which ACDC visits them.

        The classifier first, then per block from the last: its MLP, all v, all k, all q, each with
        heads descending and kinds in their own order. This is the order of Conmy et al. 2023
        (arXiv:2304.14997, code version 1.1).
        """
        yield from self.classifiers
        kinds = range(self.num_kinds)
        for layer in reversed(range(self.num_layers)):
            yield from (self.mlp_target(layer, kind) for kind in kinds)
            for letter in reversed(LETTERS):
                for head, kind in product(reversed(range(self.num_heads)), kinds):
                    yield self.head_target(layer, head, letter, kind)
