"""A pre-norm ViT as plain tensors, split into heads: the form every adapter reads a model into.

LayerScale is folded into the output projections, so a head or an MLP writes exactly what it adds
to the residual stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.compact.plan import ViTShape
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.names import Activation, PatchReadout, TokenKind, Tokens
from vitcut.settings import require_one_of
from vitcut.shapes import Float, Tensor

W = TypeVar("W")


@dataclass(frozen=True, kw_only=True)
class NormWeights:
    """A LayerNorm. For the queries or keys of a head, ``width`` is head_dim."""

    weight: Float[Tensor, "width"]
    bias: Float[Tensor, "width"]
    eps: float


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Multi-head attention. A missing bias is stored as zeros."""

    q_weight: Float[Tensor, "heads head_dim width"]
    q_bias: Float[Tensor, "heads head_dim"]
    k_weight: Float[Tensor, "heads head_dim width"]
    k_bias: Float[Tensor, "heads head_dim"]
    v_weight: Float[Tensor, "heads head_dim width"]
    v_bias: Float[Tensor, "heads head_dim"]
    out_weight: Float[Tensor, "heads width head_dim"]
    out_bias: Float[Tensor, "width"]
    """Belongs to no head, so it is always kept."""
    scale: float
    """Factor on q . k before the softmax."""
    q_norm: NormWeights | None = None
    """qk-norm: one LayerNorm, shared by all heads, on queries before they are scaled."""
    k_norm: NormWeights | None = None
    """The same for keys."""
    rotation: Float[Tensor, "2 #heads tokens head_dim"] | None = None
    """Cosine and sine of rotary positions (RoPE), applied to queries and keys after their norms:
    x becomes x cos + y sin, where y is x with its halves swapped and the new first half negated."""

    @classmethod
    def split(
        cls,
        qkv: tuple[Tensor, Tensor],
        out: tuple[Tensor, Tensor],
        *,
        num_heads: int,
        scale: float | None = None,
    ) -> "AttentionWeights":
        """Split fused projections into heads.

        Args:
            qkv: Weight [3 x heads x head_dim, width] and bias: all of q, then all of k, then v.
            out: Weight [width, heads x head_dim] and bias of the output projection.
            num_heads: Number of heads.
            scale: Factor on q . k; None means 1 / sqrt(head_dim).
        """
        # [3 * heads * head_dim, width] -> [3, heads, head_dim, width]; likewise the bias.
        weight, bias = (item.unflatten(0, (3, num_heads, -1)) for item in qkv)
        # [width, heads * head_dim] -> [heads, width, head_dim]: the columns that each head writes.
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
    """Belongs to no neuron, so it is always kept."""
    activation: Activation
    gate_weight: Float[Tensor, "hidden width"] | None = None
    """If present, a hidden unit is its activated gate times its ``in`` product."""
    gate_bias: Float[Tensor, "hidden"] | None = None
    norm: NormWeights | None = None
    """LayerNorm over all hidden units before the ``out`` product (sub-norm). A neuron is what comes
    out of it; its statistics are taken over all neurons, including those that are cut."""

    def __post_init__(self) -> None:
        require_one_of("activation", self.activation, get_args(Activation))

    @property
    def gate(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the gate, if there is one; a missing bias is zeros."""
        if self.gate_weight is None:
            return None
        bias = torch.zeros_like(self.in_bias) if self.gate_bias is None else self.gate_bias
        return self.gate_weight, bias


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """One pre-norm block: attention and MLP, each with the LayerNorm that it reads through."""

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
    """Tokens that the classifier reads, then registers. Their position embeddings are added, and
    ``patch_norm`` is already applied."""
    positions: Float[Tensor, "patches width"]
    """Position embeddings of the patch tokens."""
    blocks: tuple[BlockWeights, ...]
    norm: NormWeights | None
    """LayerNorm before the classifier, if there is one."""
    head_weight: Float[Tensor, "classes features"]
    """Features are what the classifier reads, concatenated: its prefix tokens, then the patches'
    mean."""
    head_bias: Float[Tensor, "classes"]
    num_read: int = 1
    """Number of prefix tokens that the classifier reads: class token, distillation token."""
    patch_readout: PatchReadout = "none"
    patch_norm: NormWeights | None = None
    """LayerNorm on patches plus positions, before the first block (timm's ``norm_pre``)."""
    kept_patches: tuple[int, ...] | None = None
    """The patches that enter the model, out of the image's, in their order; None for all."""
    grid_size: int | None = None
    """Patches along a side of the image; None for what a square of all positions has."""

    def __post_init__(self) -> None:
        require_one_of("patch_readout", self.patch_readout, get_args(PatchReadout))

    @cached_property
    def shape(self) -> ViTShape:
        """The sizes of this model; all blocks have those of the first."""
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
            kept_patches=self.kept_patches,
        )

    def at(self, positions: NDArray[np.bool_] | None) -> "ViTWeights":
        """The same model on some patches of the image: the others never enter it.

        Args:
            positions: True where a patch is kept, shape [patches]; None keeps all.

        Raises:
            CircuitError: The model has another number of patches, or some are gone already.
        """
        if positions is None:
            return self
        if self.kept_patches is not None or positions.shape != (len(self.positions),):
            raise CircuitError(
                f"the circuit is of a model with {len(positions)} patches per image, this one has "
                f"{len(self.positions)}: use the model it was found in"
            )
        kept = torch.from_numpy(np.flatnonzero(positions))
        rows = torch.cat([torch.arange(self.num_prefix), self.num_prefix + kept]).to(self.device)

        def on_rows(block: BlockWeights) -> BlockWeights:
            if block.attn.rotation is None:
                return block
            attn = replace(block.attn, rotation=block.attn.rotation[:, :, rows])
            return replace(block, attn=attn)

        return replace(
            self,
            positions=self.positions[kept.to(self.device)],
            blocks=tuple(map(on_rows, self.blocks)),
            kept_patches=tuple(kept.tolist()),
            grid_size=self.image_size // self.patch_size,
        )

    @cached_property
    def graph(self) -> Graph:
        """Sources, targets and edges over whole tokens."""
        return Graph(num_layers=len(self.blocks), num_heads=self.num_heads)

    @cached_property
    def split_graph(self) -> Graph:
        """Sources, targets and edges per token kind."""
        return Graph(
            num_layers=len(self.blocks),
            num_heads=self.num_heads,
            kinds=tuple(self.kind_rows),
            readout=self.shape.readout,
        )

    def graph_of(self, tokens: Tokens) -> Graph:
        """The graph over whole tokens, or per token kind."""
        return self.graph if tokens == "all" else self.split_graph

    @cached_property
    def kind_rows(self) -> dict[TokenKind, slice]:
        """Rows of each token kind that the model has, in token order."""
        return {kind: slice(rows.first, rows.end) for kind, rows in self.shape.kind_rows.items()}

    def rows_of(self, graph: Graph) -> tuple[slice, ...]:
        """Rows of each token kind of a graph; one slice of all tokens if it is not split."""
        return tuple(self.kind_rows[kind] for kind in graph.kinds) or (slice(None),)

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
        """Prefix and patch tokens of an image."""
        return self.num_prefix + self.positions.shape[0]

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return self.head_weight.shape[0]

    @property
    def num_neurons(self) -> int:
        """Hidden units per MLP."""
        return self.blocks[0].mlp.in_weight.shape[0]

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return self.patch_weight.shape[-1]

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.patch_weight.shape[1]

    @property
    def image_size(self) -> int:
        """Side of an image, in pixels."""
        side = self.grid_size or round(self.positions.shape[0] ** 0.5)
        return side * self.patch_size

    @property
    def dtype(self) -> torch.dtype:
        """Type of every tensor."""
        return self.patch_weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of every tensor."""
        return self.patch_weight.device

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "ViTWeights":
        """The same weights in another type or on another device."""
        return map_tensors(self, lambda tensor: tensor.to(device=device, dtype=dtype))


def map_tensors(value: W, change: Callable[[Tensor], Tensor]) -> W:
    """Apply ``change`` to every tensor in nested dataclasses and tuples."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = change(value)
    elif isinstance(value, tuple):
        changed = tuple(map_tensors(item, change) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
        changed = replace(
            value, **{name: map_tensors(part, change) for name, part in parts.items()}
        )
    return changed
