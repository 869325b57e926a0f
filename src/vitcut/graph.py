"""The residual graph of a ViT: sources write, targets read, edges join them. Knows no tensors.

Sources in the order in which they write: ``embed``, then per block its heads and its MLP. A target
reads every source written before it, so the sources that it can read are a prefix of that order.
The counting follows EAP and AutoCircuit: one edge per source and per q, k or v input of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import CircuitError
from vitcut.names import LETTERS, Letter


@dataclass(frozen=True, kw_only=True)
class Source:
    """What writes into the residual stream."""

    kind: Literal["embed", "head", "mlp"]
    layer: int
    """Block number; -1 for embed."""
    head: int
    """Head number within the block; -1 unless a head."""

    @property
    def name(self) -> str:
        """``embed``, ``attn.L.H`` or ``mlp.L``."""
        if self.kind == "embed":
            return "embed"
        return f"attn.{self.layer}.{self.head}" if self.kind == "head" else f"mlp.{self.layer}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What reads the residual stream, before its LayerNorm."""

    kind: Literal["q", "k", "v", "mlp", "classifier"]
    layer: int
    """Block number; the number of blocks for the classifier."""
    head: int
    """Head number within the block; -1 unless q, k or v."""

    @property
    def name(self) -> str:
        """``attn.L.H.q`` (k, v), ``mlp.L`` or ``classifier``."""
        if self.kind == "classifier":
            return "classifier"
        if self.kind == "mlp":
            return f"mlp.{self.layer}"
        return f"attn.{self.layer}.{self.head}.{self.kind}"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All sources, targets and edges of a pre-norm ViT, over whole tokens."""

    num_layers: int
    num_heads: int

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_heads < 1:
            raise CircuitError(
                f"a graph needs at least 1 block and 1 head, got {self.num_layers} blocks of "
                f"{self.num_heads} heads"
            )

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Every source, in the order in which they write."""
        found = [Source(kind="embed", layer=-1, head=-1)]
        for layer in range(self.num_layers):
            heads = range(self.num_heads)
            found += [Source(kind="head", layer=layer, head=head) for head in heads]
            found.append(Source(kind="mlp", layer=layer, head=-1))
        return tuple(found)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """Every target, in the order in which they read: per block q, k, v, then the MLP."""
        found: list[Target] = []
        for layer in range(self.num_layers):
            found += [
                Target(kind=letter, layer=layer, head=head)
                for letter in LETTERS
                for head in range(self.num_heads)
            ]
            found.append(Target(kind="mlp", layer=layer, head=-1))
        return (*found, Target(kind="classifier", layer=self.num_layers, head=-1))

    def head_source(self, layer: int, head: int) -> int:
        """The number of the source ``attn.layer.head``."""
        return 1 + layer * (self.num_heads + 1) + head

    def mlp_source(self, layer: int) -> int:
        """The number of the source ``mlp.layer``."""
        return self.head_source(layer, self.num_heads)

    def head_target(self, layer: int, head: int, letter: Letter) -> int:
        """The number of the target ``attn.layer.head.letter``."""
        block = layer * (3 * self.num_heads + 1)
        return block + LETTERS.index(letter) * self.num_heads + head

    def letter_targets(self, layer: int, letter: Letter) -> range:
        """The numbers of the targets ``attn.layer.*.letter``, one per head."""
        first = self.head_target(layer, 0, letter)
        return range(first, first + self.num_heads)

    def mlp_target(self, layer: int) -> int:
        """The number of the target ``mlp.layer``."""
        return self.head_target(layer + 1, 0, "q") - 1

    @property
    def classifier(self) -> int:
        """The number of the target ``classifier``, the last one."""
        return self.num_layers * (3 * self.num_heads + 1)

    def source_of(self, target: int) -> int:
        """The source that is computed from a target; the classifier feeds none.

        Raises:
            CircuitError: ``target`` is the classifier.
        """
        item = self.targets[target]
        if item.kind == "classifier":
            raise CircuitError("the classifier feeds no source")
        if item.kind == "mlp":
            return self.mlp_source(item.layer)
        return self.head_source(item.layer, item.head)

    def targets_of(self, source: int) -> tuple[int, ...]:
        """The targets that a source is computed from: q, k, v of a head, the MLP's own, or none."""
        item = self.sources[source]
        if item.kind == "embed":
            return ()
        if item.kind == "mlp":
            return (self.mlp_target(item.layer),)
        return tuple(self.head_target(item.layer, item.head, letter) for letter in LETTERS)

    def num_readable(self, target: int) -> int:
        """How many sources a target can read: the first so many."""
        item = self.targets[target]
        if item.kind == "mlp":
            return self.mlp_source(item.layer)
        return self.head_source(item.layer, 0)

    @cached_property
    def edges(self) -> NDArray[np.bool_]:
        """Which (source, target) pairs are edges, shape [sources, targets]; read-only."""
        readable = np.array([self.num_readable(target) for target in range(len(self.targets))])
        edges = np.arange(len(self.sources))[:, None] < readable[None, :]
        edges.setflags(write=False)
        return edges

    @cached_property
    def num_edges(self) -> int:
        """The number of edges."""
        return int(self.edges.sum())

    @cached_property
    def source_numbers(self) -> dict[str, int]:
        """Source names to numbers."""
        return {source.name: number for number, source in enumerate(self.sources)}

    @cached_property
    def target_numbers(self) -> dict[str, int]:
        """Target names to numbers."""
        return {target.name: number for number, target in enumerate(self.targets)}

    def backward_order(self) -> Iterator[int]:
        """Targets as ACDC visits them.

        The classifier, then per block from the last: its MLP, all v, all k, all q, heads
        descending in each (order of Conmy et al. 2023, arXiv:2304.14997, code version 1.1).
        """
        yield self.classifier
        for layer in reversed(range(self.num_layers)):
            yield self.mlp_target(layer)
            for letter in reversed(LETTERS):
                for head in reversed(range(self.num_heads)):
                    yield self.head_target(layer, head, letter)
