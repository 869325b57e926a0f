"""What is left of a block's attention: projections, head sets and outputs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.compact.layers import (
    Product,
    Stream,
    Written,
    by_head,
    by_image,
    flatten,
    make_table,
    rotate,
    take_rows,
    write,
)
from vitcut.compact.plan import AttentionPlan, HeadSetPlan, OutputPlan, ViTShape
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Tensor


class HeadSet(nn.Module):
    """Heads that share one attention call; inputs that are the same for every image are tables."""

    def __init__(self, plan: HeadSetPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        heads, queries, width = len(plan.heads), plan.rows.count, shape.width
        sizes: dict[str, tuple[int, ...]] = {
            "q": (1, heads, queries, shape.head_dim),
            "k": (1, heads, shape.num_tokens, shape.head_dim),
            "v": (1, heads, shape.num_tokens, shape.head_dim),
        }
        if plan.keys:
            # Queries that have absorbed the keys, W_k' q, meet tokens of the stream's width.
            sizes["q"] = (heads * queries, width)
        chosen: list[str] = [letter for letter in LETTERS if letter in plan.constant]
        if plan.fixed_pattern:
            sizes["pattern"] = (1, heads, queries, shape.num_tokens)
            chosen = ["pattern", *({"v"} & set(chosen))]
        self.tables = nn.ParameterDict({name: make_table(*sizes[name]) for name in chosen})
        # Norms and rotations are folded into constant queries and keys.
        self.norms = nn.ModuleDict()
        self.rotates = shape.rotary
        for letter, rows in (("q", queries), ("k", shape.num_tokens)):
            if letter not in plan.constant and shape.head_norm:
                self.norms[letter] = nn.LayerNorm(shape.head_dim, shape.eps)
            if letter not in plan.constant and shape.rotary:
                # Cosines and sines of no rotation, until weights are loaded.
                angles = (heads, rows, shape.head_dim)
                still = torch.stack([torch.ones(angles), torch.zeros(angles)])
                self.register_buffer(f"{letter}_rotation", still)
        self.queries = self.key_weight = self.value_weight = None
        if plan.queries:
            self.queries = nn.Linear(width, heads * width)
        elif plan.keys and "q" not in plan.constant:
            self.key_weight = make_table(heads, shape.head_dim, width)
        if plan.values and not plan.merged_values:
            self.value_weight = make_table(heads, width, shape.head_dim)

    def forward(
        self, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Float[Tensor, "images *heads_rows outputs"]:
        """Attend.

        Args:
            q: Scaled queries, shape [images, heads, rows, head_dim]; or, for merged weights, the
                normalised tokens of the queries, shape [images * rows, width]. None if constant.
            k: Keys, shape [images, heads, tokens, head_dim], or the normalised tokens in their
                place, shape [images, tokens, width]. None if constant.
            v: Values, likewise. A head that stands alone has no dimension for heads.

        Returns:
            What each head has mixed, shape [images, heads, rows, head_dim]: values, or tokens of
            the stream's width if the output has absorbed the values. A single row of mixed tokens
            has no dimension of its own, nor has a head that stands alone.
        """
        plan, rows = self.plan, self.plan.rows
        if not (plan.keys or plan.values or plan.fixed_pattern):
            return _attend(self._input("q", q), self._input("k", k), self._input("v", v))
        if plan.fixed_pattern:
            pattern = self.tables["pattern"]
        elif k is None or not plan.keys:
            scores = self._input("q", q) @ self._input("k", k).transpose(-1, -2)
            pattern = scores.softmax(-1)
        else:
            # All heads meet the same tokens, so they are rows of one matrix per image:
            # [images, heads * rows, width] @ [images, width, tokens].
            if q is None:
                scores = F.linear(k, self.tables["q"]).transpose(1, 2)
            else:
                if self.queries is not None:
                    q = by_head(self.queries(q), rows, len(plan.heads))
                if rows.count == 1:
                    q = q.flatten(1, 2)
                if self.key_weight is not None:
                    q = _each_head(q, self.key_weight)
                scores = q.flatten(1, -2) @ k.transpose(1, 2)
            pattern = scores.softmax(-1)
            if not plan.values:
                pattern = pattern.unflatten(1, (-1, rows.count))
        if v is None or not plan.values:
            return pattern @ self._input("v", v)
        # [images, heads * rows, tokens] @ [images, tokens, width]: first mixed, then multiplied.
        mixed = pattern.flatten(1, -2) @ v
        if rows.count > 1:
            mixed = mixed.unflatten(1, (-1, rows.count))
        return mixed if self.value_weight is None else _each_head(mixed, self.value_weight)

    def _input(
        self, letter: Letter, computed: Tensor | None
    ) -> Float[Tensor, "#images *heads_rows head_dim"]:
        """A table, or what was computed behind its norm and rotation."""
        if computed is None:
            return self.tables[letter]
        values = self.norms[letter](computed) if letter in self.norms else computed
        if not self.rotates or letter == "v":
            return values
        return rotate(values, *self.get_buffer(f"{letter}_rotation").unbind(0))


class HeadOutput(nn.Module):
    """What some heads of a head set add to the stream, with the block's output bias if any."""

    places: Tensor

    def __init__(self, plan: OutputPlan, head_set: HeadSetPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.head_set = head_set
        inputs = shape.width if head_set.merged_values else shape.head_dim
        self.product = nn.Linear(len(plan.heads) * inputs, shape.width, bias=plan.bias)
        places = [head_set.heads.index(head) for head in plan.heads]
        self.first, self.end = places[0], places[-1] + 1
        self.has_gaps = len(places) < self.end - self.first
        if self.has_gaps:
            # Not on "meta", where models are built to be filled: these numbers are not stored.
            self.register_buffer("places", torch.tensor(places, device="cpu"), persistent=False)

    def forward(self, mixed: Float[Tensor, "images *heads_queries inputs"]) -> Tensor | Product:
        """Choose rows and heads, and multiply."""
        own, wanted = self.head_set.rows, self.plan.rows
        if self.head_set.stands_alone:
            return write(flatten(take_rows(mixed, own, wanted)), self.product, bias=self.plan.bias)
        if wanted != own:
            mixed = mixed[:, :, wanted.first - own.first : wanted.end - own.first]
        if self.has_gaps:
            mixed = mixed.index_select(1, self.places)
        elif self.end - self.first < mixed.shape[1]:
            mixed = mixed[:, self.first : self.end]
        # To [images * rows, heads * inputs], moving elements only if rows and heads are many.
        if wanted.count == 1:
            flat = mixed.flatten(1)
        elif len(self.plan.heads) == 1:
            flat = mixed.flatten(0, 2)
        else:
            flat = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        return write(flat, self.product, bias=self.plan.bias)


class CompactAttention(nn.Module):
    """What is left of a block's attention: streams, projections, head sets, outputs."""

    def __init__(self, plan: AttentionPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.routes = Routes(plan, shape.head_dim)
        self.streams = nn.ModuleList(Stream(item, shape) for item in plan.streams)
        self.projections = nn.ModuleList(
            nn.Linear(shape.width, item.num_columns * shape.head_dim) for item in plan.projections
        )
        self.head_sets = nn.ModuleList(HeadSet(item, shape) for item in plan.head_sets)
        self.outputs = nn.ModuleList(
            HeadOutput(item, plan.head_sets[item.head_set], shape) for item in plan.outputs
        )
        read = [streams for item in plan.head_sets for streams in (item.keys, item.values)]
        read += [item.streams for item in plan.projections if len(item.streams) > 1]
        self.joined = [streams for streams in dict.fromkeys(read) if streams]
        """Streams whose tokens are put one after the other, image by image."""
        self.read_by_image = frozenset(one for streams in self.joined for one in streams)

    def forward(self, written: Written) -> None:
        """Read the streams, attend, and write the outputs."""
        normed = [
            stream(written, per_image=number in self.read_by_image)
            for number, stream in enumerate(self.streams)
        ]
        tokens = {streams: self._join(normed, streams) for streams in self.joined}
        columns: list[Tensor] = []
        for plan, product in zip(self.plan.projections, self.projections, strict=True):
            (first, *others) = plan.streams
            inputs = tokens[plan.streams] if others else normed[first]
            inputs = take_rows(inputs, self.plan.rows_of(plan.streams), plan.rows)
            columns.append(product(flatten(inputs)))
        pieces = self.routes.cut(columns)
        mixed: list[Tensor] = []
        for number, (plan, head_set) in enumerate(
            zip(self.plan.head_sets, self.head_sets, strict=True)
        ):
            q, k, v = (self.routes.find(pieces, number, letter) for letter in LETTERS)
            if plan.queries:
                own = self.plan.rows_of(plan.queries)
                q = flatten(take_rows(normed[plan.queries[0]], own, plan.rows))
            mixed.append(head_set(q, tokens.get(plan.keys, k), tokens.get(plan.values, v)))
        for plan, output in zip(self.plan.outputs, self.outputs, strict=True):
            written[plan.name] = output(mixed[plan.head_set])

    def _join(
        self, normed: list[Tensor], streams: tuple[int, ...]
    ) -> Float[Tensor, "images rows width"]:
        """The normalised tokens of some streams, one stream after the other."""
        plans = [self.plan.streams[number] for number in streams]
        found = [
            by_image(normed[number], plan.rows) for number, plan in zip(streams, plans, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        # Streams without terms have the tokens of one image, which all images share.
        images = next(one.shape[0] for one, plan in zip(found, plans, strict=True) if plan.terms)
        return torch.cat(
            [
                one if plan.terms else one.expand(images, -1, -1)
                for one, plan in zip(found, plans, strict=True)
            ],
            dim=1,
        )


class Piece(NamedTuple):
    """Neighbours among the queries, keys and values of heads that a projection computes."""

    projection: int
    first: int
    end: int


class Routes:
    """From the columns that projections compute to the queries, keys and values of head sets.

    A projection computes columns for several head sets, and the heads of a set may be in several
    projections. All ways are found once, as a forward pass should only cut and join tensors.
    """

    def __init__(self, plan: AttentionPlan, head_dim: int) -> None:
        self._plan = plan
        self._head_dim = head_dim
        self._pieces: list[dict[Letter, list[Piece]]] = [
            {letter: self._route(head_set, letter) for letter in LETTERS}
            for head_set in plan.head_sets
        ]
        used = {piece for ways in self._pieces for pieces in ways.values() for piece in pieces}
        self._cuts = [
            sorted(piece for piece in used if piece.projection == number)
            for number in range(len(plan.projections))
        ]
        """Per projection the pieces that it is cut into."""
        self._in_heads = {
            piece.projection
            for head_set, ways in zip(plan.head_sets, self._pieces, strict=True)
            for pieces in ways.values()
            for piece in pieces
            if not head_set.stands_alone
        }
        """Projections that need a dimension for heads: those of heads that stand alone do not."""

    def cut(self, columns: Sequence[Tensor]) -> dict[Piece, Tensor]:
        """Cut what the projections computed, each of shape [tokens, columns], into pieces."""
        found: dict[Piece, Tensor] = {}
        for number, (product, pieces) in enumerate(zip(columns, self._cuts, strict=True)):
            plan = self._plan.projections[number]
            if number in self._in_heads:
                # [images, heads, rows, head_dim], cut along heads.
                whole, dim, size = by_head(product, plan.rows, plan.num_columns), 1, 1
            else:
                # [images, rows, heads * head_dim], cut along columns.
                whole, dim, size = by_image(product, plan.rows), 2, self._head_dim
            sizes = [size * (piece.end - piece.first) for piece in pieces]
            if pieces[0].first == 0 and all(a.end == b.first for a, b in pairwise(pieces)):
                # Neighbours without overlap, so they are all that there is: one split.
                parts = whole.split(sizes, dim=dim) if len(sizes) > 1 else (whole,)
            else:
                parts = tuple(
                    whole.narrow(dim, size * piece.first, length)
                    for piece, length in zip(pieces, sizes, strict=True)
                )
            found |= dict(zip(pieces, parts, strict=True))
        return found

    def find(
        self, pieces: Mapping[Piece, Tensor], head_set: int, letter: Letter
    ) -> Float[Tensor, "images *heads rows head_dim"] | None:
        """The queries, keys or values of a head set; None if no projection computes them.

        A head that stands alone has no dimension for heads.
        """
        plan = self._plan.head_sets[head_set]
        parts: list[Tensor] = []
        for piece in self._pieces[head_set][letter]:
            part, own = pieces[piece], self._plan.projections[piece.projection].rows
            if letter == "q" and own != plan.rows:
                part = part.narrow(-2, plan.rows.first - own.first, plan.rows.count)
            parts.append(part)
        if not parts:
            return None
        whole = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return whole.squeeze(1) if plan.stands_alone and whole.ndim == 4 else whole

    def _route(self, head_set: HeadSetPlan, letter: Letter) -> list[Piece]:
        """The pieces that a head set's letter is joined from, in the order of its heads."""
        direct = {"q": head_set.queries, "k": head_set.keys, "v": head_set.values}[letter]
        if letter in head_set.constant or direct:
            return []
        found: list[Piece] = []
        for head in head_set.heads:
            # Of several projections that compute it, the one of the fewest rows.
            owners: list[tuple[int, int, int]] = []
            for number, item in enumerate(self._plan.projections):
                inputs = [(name, one) for name in LETTERS for one in getattr(item, name)]
                if (letter, head) in inputs and item.rows.covers(head_set.rows):
                    owners.append((item.rows.count, number, inputs.index((letter, head))))
            if not owners:
                raise KeyError(f"no projection computes {letter} of head {head}")
            _, number, place = min(owners)
            if found and found[-1].projection == number and found[-1].end == place:
                found[-1] = found[-1]._replace(end=place + 1)
            else:
                found.append(Piece(projection=number, first=place, end=place + 1))
        return found


def _each_head(
    values: Float[Tensor, "images heads *rows inputs"],
    weight: Float[Tensor, "heads inputs outputs"],
) -> Float[Tensor, "images heads *rows outputs"]:
    """A product of its own for each head, of all rows of all images."""
    # [heads, images * rows, inputs]: as many products as heads, not as images times heads.
    product = values.transpose(0, 1).flatten(1, -2) @ weight
    if values.ndim == 4:
        product = product.unflatten(1, (-1, values.shape[2]))
    return product.transpose(0, 1)


def _attend(
    q: Float[Tensor, "#images *heads rows head_dim"],
    k: Float[Tensor, "#images *heads tokens head_dim"],
    v: Float[Tensor, "#images *heads tokens head_dim"],
) -> Float[Tensor, "images *heads rows head_dim"]:
    # ONNX Runtime's fused operator is no faster at one image, and 5 % slower at 64.
    # Torch's fused one is 3 to 5 times slower in training in bfloat16 on the CPU.
    slow = q.device.type == "cpu" and torch.bfloat16 in {q.dtype, k.dtype, v.dtype}
    if slow or torch.onnx.is_in_onnx_export():
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)
