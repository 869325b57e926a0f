"""The plan of a compact model: which streams, products and rows there are. Knows no tensors.

Making a plan is left to the compiler, building a model from it to ``model.py``, counting its cost
to ``macs.py``.
"""

from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from vitcut.errors import ArtefactError
from vitcut.names import Activation, Letter, PatchReadout, TokenKind

EMBED = "embed"
"""What the patch embedding is called among the terms of a stream."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A range of tokens."""

    first: int
    end: int

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return self.end - self.first


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
    """Whether the queries and keys of a head do, before they meet (qk-norm)."""
    rotary: bool = False
    """Whether they are turned by their token's position (RoPE)."""
    gated: bool = False
    """Whether a neuron is multiplied by an activated gate (SwiGLU)."""
    neuron_norm: bool = False
    """Whether a LayerNorm over all neurons stands before an MLP's second layer (sub-norm)."""

    @property
    def readout(self) -> tuple[TokenKind, ...]:
        """The token kinds that the classifier reads."""
        prefix: tuple[TokenKind, ...] = ("cls",) if self.num_read else ()
        return prefix if self.patch_readout == "none" else (*prefix, "patch")

    @property
    def needs_keys(self) -> bool:
        """Whether keys are more than a product, so that queries cannot meet tokens directly."""
        return self.head_norm or self.rotary

    def num_computed(self, neurons: int) -> int:
        """Neurons that an MLP computes where so many are read: under a norm over them, all."""
        return self.hidden if self.neuron_norm and neurons else neurons

    @property
    def num_patches(self) -> int:
        """Patch tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

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
        """The tokens of each head_set that there is, in their order."""
        found: dict[TokenKind, Rows] = {
            "cls": Rows(first=0, end=self.num_read),
            "register": Rows(first=self.num_read, end=self.num_prefix),
            "patch": self.patch_rows,
        }
        return {head_set: rows for head_set, rows in found.items() if rows.count}

    def num_features(self, rows: Rows) -> int:
        """Numbers that the classifier takes of one of its streams: patches count as one token."""
        return self.width * (1 if rows == self.patch_rows else rows.count)

    def name_of(self, rows: Rows) -> str:
        """The token kinds of a range, in words."""
        inside = [
            head_set
            for head_set, own in self.kind_rows.items()
            if own.first >= rows.first and own.end <= rows.end
        ]
        return " + ".join(inside)


@dataclass(frozen=True, kw_only=True)
class TermPlan:
    """Something written earlier that a stream adds."""

    name: str
    """An earlier stream, the embedding, the output of an attention or an MLP."""
    rows: Rows
    """The tokens that it was written for. The stream takes its own; those that lack count as 0."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """One sum of terms and its LayerNorm, for the targets that read the same."""

    name: str
    """What later streams call it when they build on it."""
    rows: Rows
    terms: tuple[TermPlan, ...]
    """What is added; nothing where the stream is the same for every image."""
    table_rows: int
    """Rows of the constant that is added: 0 for none, 1 for the same vector at every token."""


@dataclass(frozen=True, kw_only=True)
class ProjectionPlan:
    """One product from normalised streams to queries, keys and values of heads."""

    streams: tuple[int, ...]
    """Numbers of the streams within the attention, whose tokens are put one after the other."""
    rows: Rows
    q: tuple[int, ...]
    """Heads whose queries it computes; columns are ordered q, k, v, heads as listed."""
    k: tuple[int, ...]
    v: tuple[int, ...]

    @property
    def num_columns(self) -> int:
        """How many head inputs it computes."""
        return len(self.q) + len(self.k) + len(self.v)


@dataclass(frozen=True, kw_only=True)
class HeadSetPlan:
    """Heads of a block that go through one attention call."""

    heads: tuple[int, ...]
    rows: Rows
    """Of the queries; keys and values always cover all tokens."""
    constant: tuple[Letter, ...]
    """Inputs that are tables. Where q and k both are, the attention pattern is the table."""
    queries: tuple[int, ...]
    """The stream whose normalised tokens ask directly, where the weights of queries and keys are
    merged into one product: at most one, and only with ``keys``."""
    keys: tuple[int, ...]
    """Streams whose normalised tokens the queries meet directly, with no product to keys: the
    weight of the keys is applied to the few queries instead. Empty where there are keys."""
    values: tuple[int, ...]
    """Streams whose normalised tokens are mixed directly: the weight of the values is applied to
    the few mixtures. Empty where there are values."""
    merged_values: bool
    """Whether the weights of values and output are merged into one product."""

    @property
    def fixed_pattern(self) -> bool:
        """Whether the attention pattern is the same for every image."""
        return "q" in self.constant and "k" in self.constant

    @property
    def stands_alone(self) -> bool:
        """Whether it is one head that computes queries, keys and values, and mixes these."""
        return len(self.heads) == 1 and not (self.constant or self.keys or self.values)


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """One product from some heads of a head_set back to the width of the stream."""

    name: str
    head_set: int
    """Number of the head set within the attention."""
    heads: tuple[int, ...]
    rows: Rows
    bias: bool
    """Whether it has one; if not, its only reader adds the product to its sum in one operation, and
    the reader's table or another of its products holds the bias."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What is left of a block's attention."""

    streams: tuple[StreamPlan, ...]
    projections: tuple[ProjectionPlan, ...]
    head_sets: tuple[HeadSetPlan, ...]
    outputs: tuple[OutputPlan, ...]


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
    """One for each range of tokens that keeps neurons of its own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compact model in integers and names."""

    shape: ViTShape
    embeds: bool
    """Whether the patch embedding is computed."""
    blocks: tuple[BlockPlan, ...]
    readout: tuple[StreamPlan, ...]
    """What the classifier reads, a stream per token kind; head_sets that do not depend on the image
    are left out, and with all of them the classifier."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "Plan":
        """Rebuild a plan from ``to_dict``, also after a trip through JSON.

        Raises:
            ArtefactError: ``content`` is no plan.
        """
        return _decode(cls, content, "plan")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """``value``, made of JSON's types, as an instance of the annotated ``kind``."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        member = get_args(kind)[0]
        return tuple(_decode(member, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is UnionType and value is None:
        return None
    if origin is UnionType:
        (kind,) = (member for member in get_args(kind) if member is not NoneType)
        return _decode(kind, value, where)
    if value in get_args(kind) if origin is Literal else type(value) is kind:
        return value
    raise ArtefactError(f"{where} must be {kind}, got {value!r}: save the model again")


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    names = {item.name for item in fields(kind)}
    # Kinds of models that were added later have their defaults in plans of before.
    needed = {item.name for item in fields(kind) if item.default is MISSING}
    if not isinstance(value, dict) or not needed <= set(value) <= names:
        got = ", ".join(sorted(value)) if isinstance(value, dict) else repr(value)
        raise ArtefactError(
            f"{where} must have the keys {', '.join(sorted(names))}, got {got}: "
            "save the model again"
        )
    hints = get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in value})
