"""Streams and attention of a compact model; the model around them is left to ``model.py``.

One forward pass keeps what has been written so far in a dictionary from the names of the plan to
tensors of shape [images, rows, width].
"""

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.compact.plan import (
    AttentionPlan,
    HeadGroupPlan,
    OutputPlan,
    Rows,
    StreamPlan,
    ViTShape,
)
from vitcut.names import LETTERS
from vitcut.shapes import Float, Tensor

Written = dict[str, Tensor]


class Stream(nn.Module):
    """A sum of earlier writers and a constant, then LayerNorm without affine part."""

    def __init__(self, plan: StreamPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.eps = shape.eps
        # Constants are parameters, not buffers: fine-tuning trains them like any bias.
        self.table = make_table(plan.table_rows, shape.width) if plan.table_rows else None

    def forward(self, written: Written) -> Float[Tensor, "images rows width"]:
        """Add up, remember the sum under this stream's name, and normalise it."""
        total, *others = (take_rows(written[term], self.plan.rows) for term in self.plan.terms)
        for other in others:
            total = total + other
        if self.table is not None:
            total = total + self.table
        written[self.plan.name] = total
        return F.layer_norm(total, (total.shape[-1],), eps=self.eps)


class HeadGroup(nn.Module):
    """Heads that share one attention call; inputs that depend on no image are tables."""

    def __init__(self, plan: HeadGroupPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.head_dim = shape.head_dim
        heads, queries = len(plan.heads), shape.num_rows(plan.rows)
        rows = {"q": queries, "k": shape.num_tokens, "v": shape.num_tokens}
        letters = ("v",) if plan.fixed_pattern else LETTERS
        self.tables = nn.ParameterDict(
            {
                letter: make_table(1, heads, rows[letter], shape.head_dim)
                for letter in letters
                if letter in plan.constant
            }
        )
        if plan.fixed_pattern:
            self.tables["pattern"] = make_table(1, heads, queries, shape.num_tokens)

    def forward(
        self, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Float[Tensor, "images rows heads head_dim"]:
        """Attend; q is already scaled, and what is a table here is None."""
        values = self.tables["v"] if v is None else self._by_head(v)
        if self.plan.fixed_pattern:
            return (self.tables["pattern"] @ values).transpose(1, 2)
        queries = self.tables["q"] if q is None else self._by_head(q)
        keys = self.tables["k"] if k is None else self._by_head(k)
        return _attend(queries, keys, values).transpose(1, 2)

    def _by_head(self, flat: Float[Tensor, "images rows columns"]) -> Tensor:
        return flat.view(-1, flat.shape[1], len(self.plan.heads), self.head_dim).transpose(1, 2)


class HeadOutput(nn.Module):
    """What some heads of a group add to the stream, the block's output bias included."""

    places: Tensor

    def __init__(self, plan: OutputPlan, group: HeadGroupPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.product = nn.Linear(len(plan.heads) * shape.head_dim, shape.width)
        places = [group.heads.index(head) for head in plan.heads]
        self.first, self.end = places[0], places[-1] + 1
        self.has_gaps = len(places) < self.end - self.first
        if self.has_gaps:
            # Named device: a model that is built on "meta" and filled later needs the numbers.
            self.register_buffer("places", torch.tensor(places, device="cpu"), persistent=False)

    def forward(
        self, z: Float[Tensor, "images queries heads head_dim"]
    ) -> Float[Tensor, "images rows width"]:
        """Choose rows and heads, and multiply."""
        z = take_rows(z, self.plan.rows)
        if self.has_gaps:
            z = z.index_select(2, self.places)
        elif self.end - self.first < z.shape[2]:
            z = z[:, :, self.first : self.end]
        return self.product(z.reshape(-1, z.shape[1], self.product.in_features))


class CompactAttention(nn.Module):
    """What is left of a block's attention: streams, projections, head groups, outputs."""

    def __init__(self, plan: AttentionPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.streams = nn.ModuleList(Stream(item, shape) for item in plan.streams)
        self.projections = nn.ModuleList(
            nn.Linear(shape.width, item.num_columns * shape.head_dim) for item in plan.projections
        )
        self.groups = nn.ModuleList(HeadGroup(item, shape) for item in plan.groups)
        self.outputs = nn.ModuleList(
            HeadOutput(item, plan.groups[item.group], shape) for item in plan.outputs
        )
        self.sizes, self.pieces = _route(plan, shape.head_dim)

    def forward(self, written: Written) -> None:
        """Read the streams, attend, and write the outputs."""
        normed = [stream(written) for stream in self.streams]
        parts: list[tuple[Tensor, ...]] = []
        for plan, product, sizes in zip(
            self.plan.projections, self.projections, self.sizes, strict=True
        ):
            columns = product(take_rows(normed[plan.stream], plan.rows))
            parts.append(columns.split(sizes, dim=-1) if len(sizes) > 1 else (columns,))
        mixed = [
            group(*(_join([parts[i][j] for i, j in pieces]) for pieces in by_letter))
            for group, by_letter in zip(self.groups, self.pieces, strict=True)
        ]
        for plan, output in zip(self.plan.outputs, self.outputs, strict=True):
            written[plan.name] = output(mixed[plan.group])


def make_table(*sizes: int) -> nn.Parameter:
    """A trainable constant, initialised like a ViT's position embedding."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes), std=0.02))


def take_rows(
    values: Float[Tensor, "images tokens ..."], rows: Rows
) -> Float[Tensor, "images rows ..."]:
    """The class token's row where only it is needed."""
    return values[:, :1] if rows == "readout" and values.shape[1] > 1 else values


def _attend(
    q: Float[Tensor, "#images heads rows head_dim"],
    k: Float[Tensor, "#images heads tokens head_dim"],
    v: Float[Tensor, "#images heads tokens head_dim"],
) -> Float[Tensor, "images heads rows head_dim"]:
    # ONNX Runtime's fused operator is no faster at one image, and 5 % slower at 64.
    if torch.onnx.is_in_onnx_export():
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def _join(pieces: list[Tensor]) -> Tensor | None:
    if not pieces:
        return None
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]


Pieces = list[tuple[int, int]]
"""Projection and number of the part of its columns."""


def _route(plan: AttentionPlan, head_dim: int) -> tuple[list[list[int]], list[tuple[Pieces, ...]]]:
    """Where each group finds its q, k and v.

    Returns:
        The sizes of the parts that each projection's columns are split into, and per group and
        letter the parts to be joined, in the order of its heads.
    """
    owner = {
        (letter, head): number
        for number, projection in enumerate(plan.projections)
        for letter in LETTERS
        for head in getattr(projection, letter)
    }
    sizes: list[list[int]] = [[] for _ in plan.projections]
    by_letter: dict[str, list[Pieces]] = {letter: [] for letter in LETTERS}
    for letter in LETTERS:
        for group in plan.groups:
            pieces: Pieces = []
            for head in group.heads if letter not in group.constant else ():
                number = owner[letter, head]
                if not pieces or pieces[-1][0] != number:
                    pieces.append((number, len(sizes[number])))
                    sizes[number].append(0)
                sizes[number][-1] += head_dim
            by_letter[letter].append(pieces)
    return sizes, list(zip(*by_letter.values(), strict=True))
