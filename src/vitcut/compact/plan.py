"""The plan of a compact model: its streams, products and rows, in integers and names.

A plan holds no tensors, so a circuit's cost is known before any weight is folded.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import ArtefactError, CircuitError
from vitcut.names import Activation, Letter, PatchReadout, TokenKind
from vitcut.store import convert

EMBED = "embed"
"""The name of the patch embedding among the terms of a stream."""

_REMEDY = "save the model again"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A range of tokens."""

    first: int
    end: int

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return self.end - self.first

    def covers(self, other: "Rows") -> bool:
        """Whether all tokens of another range are among these."""
        return self.first <= other.first and other.end <= self.end


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """The sizes of the original model."""

    image_size: int
    """Side of an image in pixels."""
    channels: int
    patch_size: int
    """Side of a patch in pixels."""
    num_prefix: int
    """Tokens before the patches."""
    width: int
    """Width of the residual stream."""
    num_layers: int
    num_heads: int
    """Heads per block."""
    head_dim: int
    hidden: int
    """Neurons per MLP."""
    activation: Activation
    eps: float
    """What every LayerNorm adds to the variance."""
    num_classes: int
    num_read: int = 1
    """Prefix tokens that the classifier reads, which come first."""
    patch_readout: PatchReadout = "none"
    embed_norm: bool = False
    """Whether patches pass a LayerNorm before the first block."""
    final_norm: bool = True
    """Whether a LayerNorm stands before the classifier."""
    head_norm: bool = False
    """Whether the queries and keys of a head pass a LayerNorm before they meet (qk-norm)."""
    rotary: bool = False
    """Whether queries and keys are rotated by their token's position (RoPE)."""
    gated: bool = False
    """Whether a neuron is multiplied by an activated gate (SwiGLU)."""
    neuron_norm: bool = False
    """Whether a LayerNorm over all neurons stands before an MLP's second layer (sub-norm)."""
    kept_patches: tuple[int, ...] | None = None
    """The patches that have a token, out of the image's, row by row; None for all."""

    def at(self, positions: NDArray[np.bool_] | None) -> "ViTShape":
        """The same model on some patches of the image.

        Args:
            positions: True where a patch is kept, shape [patches]; None keeps all.

        Raises:
            CircuitError: The model has another number of patches.
        """
        if positions is None:
            return self
        if len(positions) != self.num_patches:
            raise CircuitError(
                f"the circuit is of a model with {len(positions)} patches per image, this one has "
                f"{self.num_patches}: use the model it was found in"
            )
        return replace(self, kept_patches=tuple(np.flatnonzero(positions).tolist()))

    @property
    def readout(self) -> tuple[TokenKind, ...]:
        """The token kinds that the classifier reads."""
        prefix: tuple[TokenKind, ...] = ("cls",) if self.num_read else ()
        return prefix if self.patch_readout == "none" else (*prefix, "patch")

    @property
    def needs_keys(self) -> bool:
        """Whether keys are more than a linear map of tokens: queries cannot absorb its weight."""
        return self.head_norm or self.rotary

    def num_computed(self, neurons: int) -> int:
        """Neurons that an MLP computes to read so many: all of them under a norm over neurons."""
        return self.hidden if self.neuron_norm and neurons else neurons

    @property
    def num_patches(self) -> int:
        """Patch tokens of an image."""
        return self.grid_size**2 if self.kept_patches is None else len(self.kept_patches)

    @property
    def grid_size(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """All tokens of an image."""
        return self.num_prefix + self.num_patches

    @property
    def all_rows(self) -> Rows:
        """Every token."""
        return Rows(first=0, end=self.num_tokens)

    @property
    def patch_rows(self) -> Rows:
        """The patch tokens."""
        return Rows(first=self.num_prefix, end=self.num_tokens)

    @property
    def kind_rows(self) -> dict[TokenKind, Rows]:
        """The tokens of each kind that the model has, in their order."""
        found: dict[TokenKind, Rows] = {
            "cls": Rows(first=0, end=self.num_read),
            "register": Rows(first=self.num_read, end=self.num_prefix),
            "patch": self.patch_rows,
        }
        return {kind: rows for kind, rows in found.items() if rows.count}

    def num_features(self, rows: Rows) -> int:
        """Features that the classifier takes from a stream: patches are pooled into one token."""
        return self.width * (1 if rows == self.patch_rows else rows.count)

    def name_of(self, rows: Rows) -> str:
        """The token kinds of a range, such as ``cls + patch``."""
        return " + ".join(kind for kind, own in self.kind_rows.items() if rows.covers(own))


@dataclass(frozen=True, kw_only=True)
class TermPlan:
    """Something written earlier that a stream adds."""

    name: str
    """An earlier stream, the embedding, the output of an attention or an MLP."""
    rows: Rows
    """The tokens that it was written for. The stream takes those it needs; missing ones are 0."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """A sum of terms and its LayerNorm, shared by all targets that read the same sources."""

    name: str
    """The name under which later streams add it."""
    rows: Rows
    terms: tuple[TermPlan, ...]
    """What is added; empty if the stream is the same for every image."""
    table_rows: int
    """Rows of the constant that is added: 0 for no constant, 1 for one vector for all tokens."""


@dataclass(frozen=True, kw_only=True)
class ProjectionPlan:
    """One product from normalised streams to queries, keys and values of heads."""

    streams: tuple[int, ...]
    """Numbers of the attention's streams whose tokens it reads, one stream after the other."""
    rows: Rows
    q: tuple[int, ...]
    """Heads whose queries it computes. Columns are ordered q, k, v, and heads as listed."""
    k: tuple[int, ...]
    v: tuple[int, ...]

    @property
    def num_columns(self) -> int:
        """How many queries, keys and values of heads it computes; each has ``head_dim`` columns."""
        return len(self.q) + len(self.k) + len(self.v)


@dataclass(frozen=True, kw_only=True)
class HeadSetPlan:
    """Heads of a block that are computed in one attention call.

    With few queries it is cheaper to compute no keys and values. q' (W_k x) = (W_k' q)' x, so the
    few queries absorb the weight of the keys and meet the normalised tokens x themselves; and
    sum_t a_t (W_v x_t) = W_v (sum_t a_t x_t), so the few mixtures of tokens are multiplied by the
    weight of the values.
    """

    heads: tuple[int, ...]
    rows: Rows
    """The tokens of the queries; keys and values always cover all tokens."""
    constant: tuple[Letter, ...]
    """Inputs that are tables. If both q and k are, the attention pattern itself is the table."""
    queries: tuple[int, ...]
    """If the weights of queries and keys are merged into one product, the stream whose normalised
    tokens it reads: at most one, and only with ``keys``."""
    keys: tuple[int, ...]
    """Streams whose normalised tokens take the place of keys; empty if there are keys."""
    values: tuple[int, ...]
    """Streams whose normalised tokens take the place of values; empty if there are values."""
    merged_values: bool
    """Whether the weights of values and output are merged into one product."""

    @property
    def fixed_pattern(self) -> bool:
        """Whether the attention pattern is the same for every image."""
        return "q" in self.constant and "k" in self.constant

    @property
    def stands_alone(self) -> bool:
        """Whether it is a single head with its own queries, keys and values, none constant."""
        return len(self.heads) == 1 and not (self.constant or self.keys or self.values)


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """One product from some heads of a head set back to the width of the stream."""

    name: str
    head_set: int
    """Number of the head set within the attention."""
    heads: tuple[int, ...]
    rows: Rows
    bias: bool
    """Whether the product has a bias. If not, its only reader adds the product to its sum in one
    operation, and the reader's table, or another product that it reads, holds the bias."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What is left of a block's attention."""

    streams: tuple[StreamPlan, ...]
    projections: tuple[ProjectionPlan, ...]
    head_sets: tuple[HeadSetPlan, ...]
    outputs: tuple[OutputPlan, ...]

    def rows_of(self, streams: Sequence[int]) -> Rows:
        """The tokens of some streams, which follow one another."""
        first, last = self.streams[streams[0]], self.streams[streams[-1]]
        return Rows(first=first.rows.first, end=last.rows.end)


@dataclass(frozen=True, kw_only=True)
class MlpPlan:
    """What is left of a block's MLP for some tokens."""

    name: str
    stream: StreamPlan
    hidden: int
    """Neurons that are kept."""
    bias: bool
    """As for ``OutputPlan``."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What is left of a block."""

    attention: AttentionPlan | None
    mlps: tuple[MlpPlan, ...]
    """One for each range of tokens that has its own neurons."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compact model in integers and names."""

    shape: ViTShape
    embeds: bool
    """Whether the patch embedding is computed."""
    blocks: tuple[BlockPlan, ...]
    readout: tuple[StreamPlan, ...]
    """What the classifier reads, a stream per token kind. Kinds that are the same for every image
    are left out; if all are, there is no classifier, only constant logits."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "Plan":
        """Rebuild a plan from ``to_dict``, also after a trip through JSON, and check all of it.

        Raises:
            ArtefactError: ``content`` is not a plan, or not one that can be computed.
        """
        from vitcut.compact.validity import find_fault  # imports this file

        plan = convert(content, cls, what="the plan is not one", remedy=_REMEDY)
        fault = find_fault(plan)
        if fault is not None:
            raise ArtefactError(f"the plan cannot be computed: {fault}; {_REMEDY}")
        return plan
