"""What is left of an attention: projections, head groups, outputs.

The streams that it reads stand in ``stream.py``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.compact.plan import (
    AttentionPlan,
    HeadGroupPlan,
    OutputPlan,
    ProjectionPlan,
    Rows,
    ViTShape,
)
from vitcut.compact.routes import Routes
from vitcut.compact.stream import Stream, Written, make_table, take_rows, with_rows
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Tensor


class HeadGroup(nn.Module):
    """Heads that share one attention call; inputs that depend on no image are tables."""

    def __init__(self, plan: HeadGroupPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.head_dim = shape.head_dim
        heads, queries, width = len(plan.heads), plan.rows.count, shape.width
        sizes: dict[str, tuple[int, ...]] = {
            "q": (1, heads, queries, shape.head_dim),
            "k": (1, heads, shape.num_tokens, shape.head_dim),
            "v": (1, heads, shape.num_tokens, shape.head_dim),
        }
        if plan.keys:
            sizes["q"] = (queries * heads, width)
        chosen: list[str] = [letter for letter in LETTERS if letter in plan.constant]
        if plan.fixed_pattern:
            sizes["pattern"] = (1, heads, queries, shape.num_tokens)
            chosen = ["pattern", *({"v"} & set(chosen))]
        self.tables = nn.ParameterDict({name: make_table(*sizes[name]) for name in chosen})
        self.key_weight = self.value_weight = None
        if plan.keys and "q" not in plan.constant:
            self.key_weight = make_table(heads, shape.head_dim, width)
        if plan.values:
            self.value_weight = make_table(heads, width, shape.head_dim)

    def forward(
        self, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Float[Tensor, "images *rows heads head_dim"]:
        """Attend.

        Args:
            q: Scaled queries; None where they are a table.
            k: Keys, or the normalised tokens that stand in for them.
            v: Values, or the normalised tokens.
        """
        if self.plan.keys or self.plan.values or self.plan.fixed_pattern:
            return self._mix(self._pattern(q, k), v)
        return self._rows_first(
            _attend(self._queries(q), self._by_head("k", k), self._by_head("v", v))
        )

    def _pattern(self, q: Tensor | None, k: Tensor | None) -> Float[Tensor, "#images mixed keys"]:
        """What each query of each head takes from each token, the heads of a row together."""
        if self.plan.fixed_pattern:
            return self.tables["pattern"].transpose(1, 2).flatten(1, 2)
        if k is not None and self.plan.keys:
            if q is None:
                return F.linear(k, self.tables["q"]).transpose(1, 2).softmax(-1)
            queries = self._each_head(q, self.key_weight)
            if self.plan.rows.count > 1:
                queries = queries.reshape(-1, self.plan.rows.count * queries.shape[1], k.shape[2])
            return (queries @ k.transpose(1, 2)).softmax(-1)
        keys = self._by_head("k", k)
        pattern = (self._queries(q) @ keys.transpose(-1, -2)).softmax(-1)
        return pattern.transpose(1, 2).flatten(1, 2)

    def _mix(self, pattern: Tensor, v: Tensor | None) -> Tensor:
        heads = len(self.plan.heads)
        if v is not None and self.plan.values:
            z = self._each_head(pattern @ v, self.value_weight)
            return z if self.plan.rows.count == 1 else z.unflatten(0, (-1, self.plan.rows.count))
        by_head = pattern.unflatten(1, (-1, heads)).transpose(1, 2)
        return self._rows_first(by_head @ self._by_head("v", v))

    def _each_head(
        self, flat: Float[Tensor, "images ..."], weight: Tensor | None
    ) -> Float[Tensor, "all_rows heads outputs"]:
        """A product of its own for each head, of all rows of all images."""
        if weight is None:
            raise TypeError("this head group has no product per head")
        by_head = flat.reshape(-1, weight.shape[0], weight.shape[1]).transpose(0, 1)
        return (by_head @ weight).transpose(0, 1)

    def _queries(self, flat: Tensor | None) -> Float[Tensor, "#images heads rows head_dim"]:
        if flat is None:
            return self.tables["q"]
        if self.plan.rows.count > 1:
            return self._by_head("q", flat)
        return flat.view(-1, len(self.plan.heads), 1, self.head_dim)

    def _by_head(
        self, letter: Letter, flat: Float[Tensor, "images rows columns"] | None
    ) -> Float[Tensor, "#images heads rows head_dim"]:
        if flat is None:
            return self.tables[letter]
        return flat.view(-1, flat.shape[1], len(self.plan.heads), self.head_dim).transpose(1, 2)

    def _rows_first(
        self, z: Float[Tensor, "images heads rows head_dim"]
    ) -> Float[Tensor, "images *rows heads head_dim"]:
        return z.squeeze(2) if self.plan.rows.count == 1 else z.transpose(1, 2)


class HeadOutput(nn.Module):
    """What some heads of a group add to the stream, the block's output bias included."""

    places: Tensor

    def __init__(self, plan: OutputPlan, group: HeadGroupPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.own_rows = group.rows
        inputs = len(plan.heads) * shape.head_dim
        self.product = nn.Linear(inputs, shape.width, bias=plan.bias)
        places = [group.heads.index(head) for head in plan.heads]
        self.first, self.end = places[0], places[-1] + 1
        self.has_gaps = len(places) < self.end - self.first
        if self.has_gaps:
            # Named device: a model that is built on "meta" and filled later needs the numbers.
            self.register_buffer("places", torch.tensor(places, device="cpu"), persistent=False)

    def forward(
        self, z: Float[Tensor, "images *queries heads head_dim"]
    ) -> Float[Tensor, "images *rows width"]:
        """Choose rows and heads, and multiply."""
        z = take_rows(z, self.own_rows, self.plan.rows)
        if self.has_gaps:
            z = z.index_select(-2, self.places)
        elif self.end - self.first < z.shape[-2]:
            z = z[..., self.first : self.end, :]
        return self.product(z.flatten(-2))


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
        self.routes = Routes(plan, shape.head_dim)

    def forward(self, written: Written) -> None:
        """Read the streams, attend, and write the outputs."""
        normed = [stream(written) for stream in self.streams]
        tokens = {
            streams: self._tokens([normed[number] for number in streams], streams)
            for streams in self.routes.inputs
        }
        columns = [
            product(self._rows_of(tokens[plan.streams], plan))
            for plan, product in zip(self.plan.projections, self.projections, strict=True)
        ]
        parts = self.routes.cut(columns)
        mixed: list[Tensor] = []
        for plan, group, by_letter in zip(
            self.plan.groups, self.groups, self.routes.pieces, strict=True
        ):
            q, k, v = (
                _join([parts[piece] for piece in pieces]) if pieces else None
                for pieces in by_letter
            )
            mixed.append(group(q, tokens.get(plan.keys, k), tokens.get(plan.values, v)))
        for plan, output in zip(self.plan.outputs, self.outputs, strict=True):
            written[plan.name] = output(mixed[plan.group])

    def _tokens(self, normed: list[Tensor], streams: tuple[int, ...]) -> Tensor:
        """The normalised tokens of some streams, one after the other."""
        if len(normed) == 1:
            return normed[0]
        rows = [self.plan.streams[number].rows for number in streams]
        return torch.cat([with_rows(*item) for item in zip(normed, rows, strict=True)], dim=1)

    def _rows_of(self, tokens: Tensor, plan: ProjectionPlan) -> Tensor:
        streams = [self.plan.streams[number].rows for number in plan.streams]
        return take_rows(tokens, Rows(first=streams[0].first, end=streams[-1].end), plan.rows)


def _attend(
    q: Float[Tensor, "#images heads rows head_dim"],
    k: Float[Tensor, "#images heads tokens head_dim"],
    v: Float[Tensor, "#images heads tokens head_dim"],
) -> Float[Tensor, "images heads rows head_dim"]:
    # ONNX Runtime's fused operator is no faster at one image, and 5 % slower at 64.
    # Torch's fused one is 3 to 5 times slower in training in bfloat16 on the CPU.
    slow = q.device.type == "cpu" and torch.bfloat16 in {q.dtype, k.dtype, v.dtype}
    if slow or torch.onnx.is_in_onnx_export():
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def _join(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]
