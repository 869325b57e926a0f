"""A pre-norm ViT as plain tensors, one entry per head: what every adapter reads a model into.

LayerScale is folded into the output projections, so heads and MLPs here write what they really add
to the residual stream. Computing with these tensors is left to the intervention floor.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from vitcut.compact.plan import ViTShape
from vitcut.graph import Graph
from vitcut.names import Activation, PatchReadout, TokenKind, Tokens
from vitcut.shapes import Float, Tensor

W = TypeVar("W")


@dataclass(frozen=True, kw_only=True)
class NormWeights:
    """A LayerNorm; of a head's queries or keys the width is head_dim."""

    weight: Float[Tensor, "width"]
    bias: Float[Tensor, "width"]
    eps: float


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Multi-head attention; a missing bias is stored as zeros."""

    q_weight: Float[Tensor, "heads head_dim width"]
    q_bias: Float[Tensor, "heads head_dim"]
    k_weight: Float[Tensor, "heads head_dim width"]
    k_bias: Float[Tensor, "heads head_dim"]
    v_weight: Float[Tensor, "heads head_dim width"]
    v_bias: Float[Tensor, "heads head_dim"]
    out_weight: Float[Tensor, "heads width head_dim"]
    out_bias: Float[Tensor, "width"]
    """Belongs to no head: always kept."""
    scale: float
    """What q . k is multiplied by before the softmax."""
    q_norm: NormWeights | None = None
    """What queries pass before they are scaled: one LayerNorm for all heads."""
    k_norm: NormWeights | None = None
    """The same for keys."""
    rotation: Float[Tensor, "2 #heads tokens head_dim"] | None = None
    """Cosine and sine of rotary positions (RoPE), which turn queries and keys behind their norms:
    x becomes x cos + y sin, where y is x with its halves exchanged and the first one negated."""

    @classmethod
    def split(
        cls,
        qkv: tuple[Tensor, Tensor],
        out: tuple[Tensor, Tensor],
        *,
        num_heads: int,
        scale: float | None = None,
    ) -> "AttentionWeights":
        """Split what libraries keep in one piece into heads.

        Args:
            qkv: Weight [3 x heads x head_dim, width] and bias, first all of q, then k, then v.
            out: Weight [width, heads x head_dim] and bias of the output projection.
            num_heads: Heads.
            scale: None is one over the root of head_dim.
        """
        weight, bias = (item.unflatten(0, (3, num_heads, -1)) for item in qkv)
        out_weight = out[0].unflatten(1, (num_heads, -1)).transpose(0, 1).contiguous()
        return cls(
            q_weight=weight[0],
            q_bias=bias[0],
            k_weight=weight[1],
            k_bias=bias[1],
            v_weight=weight[2],
            v_bias=bias[2],
            out_weight=out_weight,
            out_bias=out[1],
            scale=bias.shape[2] ** -0.5 if scale is None else scale,
        )


@dataclass(frozen=True, kw_only=True)
class MlpWeights:
    """Two linear layers around an activation, or around an activated gate (SwiGLU)."""

    in_weight: Float[Tensor, "hidden width"]
    in_bias: Float[Tensor, "hidden"]
    out_weight: Float[Tensor, "width hidden"]
    out_bias: Float[Tensor, "width"]
    """Belongs to no neuron: always kept."""
    activation: Activation
    gate_weight: Float[Tensor, "hidden width"] | None = None
    """Where there is one, a hidden unit is its activated gate times its ``in`` product."""
    gate_bias: Float[Tensor, "hidden"] | None = None
    norm: NormWeights | None = None
    """What all hidden units together pass before the ``out`` product (sub-norm): a neuron is what
    comes out of it, and its statistics are those of all neurons, cut or not."""

    @property
    def gate(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the gate, where there is one; a missing bias is zero."""
        if self.gate_weight is None:
            return None
        bias = self.gate_bias
        return self.gate_weight, self.in_bias.new_zeros(
            self.in_bias.shape
        ) if bias is None else bias


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """One block: attention and MLP, each behind its LayerNorm."""

    attn_norm: NormWeights
    attn: AttentionWeights
    mlp_norm: NormWeights
    mlp: MlpWeights


@dataclass(frozen=True, kw_only=True)
class ViTWeights:
    """A whole ViT."""

    patch_weight: Float[Tensor, "width channels patch patch"]
    patch_bias: Float[Tensor, "width"]
    prefix: Float[Tensor, "prefix_tokens width"]
    """Tokens that the classifier reads, then registers, with their position embeddings and, where
    there is one, behind the norm of the embedding."""
    positions: Float[Tensor, "patches width"]
    """Position embeddings of the patch tokens."""
    blocks: tuple[BlockWeights, ...]
    norm: NormWeights | None
    """The LayerNorm before the classifier, if there is one."""
    head_weight: Float[Tensor, "classes features"]
    """Of what is read, one after the other: each prefix token, then the mean of the patches."""
    head_bias: Float[Tensor, "classes"]
    num_read: int = 1
    """Prefix tokens that the classifier reads: the class token, a distillation token."""
    patch_readout: PatchReadout = "none"
    patch_norm: NormWeights | None = None
    """What patches pass, with their positions, before the first block (``norm_pre``)."""

    @cached_property
    def shape(self) -> ViTShape:
        """The sizes of this model, whose blocks are alike."""
        first = self.blocks[0]
        return ViTShape(
            image_size=self.image_size,
            channels=self.channels,
            patch_size=self.patch_size,
            num_prefix=self.num_prefix,
            width=self.width,
            num_layers=len(self.blocks),
            num_heads=self.num_heads,
            head_dim=first.attn.q_weight.shape[1],
            hidden=self.num_neurons,
            activation=first.mlp.activation,
            eps=first.attn_norm.eps,
            num_classes=self.num_classes,
            num_read=self.num_read,
            patch_readout=self.patch_readout,
            embed_norm=self.patch_norm is not None,
            final_norm=self.norm is not None,
            head_norm=first.attn.q_norm is not None,
            rotary=first.attn.rotation is not None,
            gated=first.mlp.gate_weight is not None,
            neuron_norm=first.mlp.norm is not None,
        )

    @cached_property
    def graph(self) -> Graph:
        """The sources, targets and edges of this model, over whole tokens."""
        return Graph(num_layers=len(self.blocks), num_heads=self.num_heads)

    @cached_property
    def split_graph(self) -> Graph:
        """The same per token kind."""
        return Graph(
            num_layers=len(self.blocks),
            num_heads=self.num_heads,
            kinds=tuple(self.kind_rows),
            readout=self.readout,
        )

    def graph_of(self, tokens: Tokens) -> Graph:
        """The graph over whole tokens, or per token kind."""
        return self.graph if tokens == "all" else self.split_graph

    @property
    def readout(self) -> tuple[TokenKind, ...]:
        """The token kinds that the classifier reads."""
        return self.shape.readout

    @cached_property
    def kind_rows(self) -> dict[TokenKind, slice]:
        """The tokens of each group that the model has, in their order."""
        return {group: slice(rows.first, rows.end) for group, rows in self.shape.kind_rows.items()}

    def rows_of(self, graph: Graph) -> tuple[slice, ...]:
        """The tokens of each group of a graph of this model; all tokens where it has none."""
        return tuple(self.kind_rows[group] for group in graph.kinds) or (slice(None),)

    @property
    def num_heads(self) -> int:
        """Heads per block."""
        return self.blocks[0].attn.q_weight.shape[0]

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.patch_weight.shape[0]

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.prefix.shape[0]

    @property
    def num_tokens(self) -> int:
        """All tokens of an image."""
        return self.num_prefix + self.positions.shape[0]

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return self.head_weight.shape[0]

    @property
    def num_neurons(self) -> int:
        """Hidden units per MLP, of the first block."""
        return self.blocks[0].mlp.in_weight.shape[0]

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_weight.shape[-1]

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.patch_weight.shape[1]

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return round(self.positions.shape[0] ** 0.5) * self.patch_size

    @property
    def dtype(self) -> torch.dtype:
        """Type of every tensor."""
        return self.patch_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where every tensor lies."""
        return self.patch_weight.device

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "ViTWeights":
        """The same weights in another type or place."""
        return map_tensors(self, lambda tensor: tensor.to(device=device, dtype=dtype))


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 over names, shapes, types and values of tensors, in hex."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def map_tensors(value: W, change: Callable[[Tensor], Tensor]) -> W:
    """``value`` with ``change`` applied to every tensor in its dataclasses and tuples."""
    return _mapped(value, change)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: _mapped(getattr(value, item.name), change) for item in fields(value)}
        return replace(value, **parts)
    return value
