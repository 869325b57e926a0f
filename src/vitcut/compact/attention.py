"""What is left of an attention: projections, head sets, outputs.

The streams that it reads stand in ``stream.py``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.compact.plan import (
    AttentionPlan,
    HeadSetPlan,
    OutputPlan,
    Rows,
    ViTShape,
)
from vitcut.compact.rotary import rotate
from vitcut.compact.routes import Routes
from vitcut.compact.stream import (
    Product,
    Stream,
    Written,
    by_head,
    by_image,
    flatten,
    make_table,
    take_rows,
    write,
)
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Tensor


class HeadSet(nn.Module):
    """Heads that share one attention call; inputs that depend on no image are tables."""

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
            sizes["q"] = (heads * queries, width)
        chosen: list[str] = [letter for letter in LETTERS if letter in plan.constant]
        if plan.fixed_pattern:
            sizes["pattern"] = (1, heads, queries, shape.num_tokens)
            chosen = ["pattern", *({"v"} & set(chosen))]
        self.tables = nn.ParameterDict({name: make_table(*sizes[name]) for name in chosen})
        self._place_queries_and_keys(shape)
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
            q: Scaled queries, shape [images, heads, rows, head_dim], or normalised tokens that
                ask, shape [images * rows, width]; None where queries are a table.
            k: Keys, shape [images, heads, tokens, head_dim], or the normalised tokens that stand
                in for them, shape [images, tokens, width]; None where they are a table.
            v: Values, likewise. A head that stands alone has no dimension of its own.

        Returns:
            What each head has mixed: values, or tokens where its output takes those. A single row
            of mixed tokens has no dimension of its own, nor has a head that stands alone.
        """
        if self.plan.stands_alone and q is not None and k is not None and v is not None:
            return _attend(self._placed("q", q), self._placed("k", k), v)
        if not (self.plan.keys or self.plan.values or self.plan.fixed_pattern):
            return _attend(self._own("q", q), self._own("k", k), self._own("v", v))
        pattern = self._pattern(q, k)
        if v is None or not self.plan.values:
            return pattern @ self._own("v", v)
        mixed = pattern.flatten(1, -2) @ v
        if self.plan.rows.count > 1:
            mixed = mixed.unflatten(1, (-1, self.plan.rows.count))
        return mixed if self.value_weight is None else _each_head(mixed, self.value_weight)

    def _pattern(self, q: Tensor | None, k: Tensor | None) -> Tensor:
        """What each query of each head takes from each token.

        Returns:
            Shape [images or 1, heads, rows, keys]; [images, heads * rows, keys] where queries meet
            the tokens and so do what they take.
        """
        if self.plan.fixed_pattern:
            return self.tables["pattern"]
        if k is None or not self.plan.keys:
            return (self._own("q", q) @ self._own("k", k).transpose(-1, -2)).softmax(-1)
        if q is None:
            scores = F.linear(k, self.tables["q"]).transpose(1, 2)
        else:
            scores = self._meeting(q) @ k.transpose(1, 2)
        if self.plan.values:
            return scores.softmax(-1)
        return scores.softmax(-1).unflatten(1, (-1, self.plan.rows.count))

    def _meeting(self, q: Tensor) -> Float[Tensor, "images heads_rows width"]:
        """Queries that meet normalised tokens: the weight of the keys is applied to them."""
        if self.queries is not None:
            q = by_head(self.queries(q), self.plan.rows, len(self.plan.heads))
        if self.plan.rows.count == 1:
            q = q.flatten(1, 2)
        if self.key_weight is not None:
            q = _each_head(q, self.key_weight)
        return q.flatten(1, -2)

    def _own(
        self, letter: Letter, computed: Tensor | None
    ) -> Float[Tensor, "#images heads rows head_dim"]:
        return self.tables[letter] if computed is None else self._placed(letter, computed)

    def _place_queries_and_keys(self, shape: ViTShape) -> None:
        """Make what queries and keys that are computed pass before they meet."""
        rows = {"q": self.plan.rows.count, "k": shape.num_tokens}
        computed = [letter for letter in rows if letter not in self.plan.constant]
        self.norms = nn.ModuleDict()
        self.rotates = shape.rotary
        for letter in computed:
            if shape.head_norm:
                self.norms[letter] = nn.LayerNorm(shape.head_dim, shape.eps)
            if shape.rotary:
                sizes = (len(self.plan.heads), rows[letter], shape.head_dim)
                still = torch.stack([torch.ones(sizes), torch.zeros(sizes)])
                self.register_buffer(f"{letter}_rotation", still)

    def _placed(
        self, letter: Letter, values: Float[Tensor, "images *heads_rows head_dim"]
    ) -> Float[Tensor, "images *heads_rows head_dim"]:
        if letter in self.norms:
            values = self.norms[letter](values)
        if self.rotates and letter != "v":
            values = rotate(values, *self.get_buffer(f"{letter}_rotation").unbind(0))
        return values


class HeadOutput(nn.Module):
    """What some heads of a head_set add to the stream, the block's output bias included."""

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
            # Named device: a model that is built on "meta" and filled later needs the numbers.
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

    def forward(self, written: Written) -> None:
        """Read the streams, attend, and write the outputs."""
        normed = [
            stream(written, per_image=number in self.routes.read_by_image)
            for number, stream in enumerate(self.streams)
        ]
        tokens = {streams: self._tokens(normed, streams) for streams in self.routes.read_together}
        columns: list[Tensor] = []
        for plan, product in zip(self.plan.projections, self.projections, strict=True):
            (first, *others) = plan.streams
            inputs = tokens[plan.streams] if others else normed[first]
            inputs = take_rows(inputs, self._rows(plan.streams), plan.rows)
            columns.append(product(flatten(inputs)))
        parts = self.routes.cut(columns)
        mixed: list[Tensor] = []
        for number, (plan, head_set) in enumerate(
            zip(self.plan.head_sets, self.head_sets, strict=True)
        ):
            q, k, v = (parts.of(number, letter) for letter in LETTERS)
            if plan.queries:
                own = self._rows(plan.queries)
                q = flatten(take_rows(normed[plan.queries[0]], own, plan.rows))
            mixed.append(head_set(q, tokens.get(plan.keys, k), tokens.get(plan.values, v)))
        for plan, output in zip(self.plan.outputs, self.outputs, strict=True):
            written[plan.name] = output(mixed[plan.head_set])

    def _rows(self, streams: tuple[int, ...]) -> Rows:
        own = [self.plan.streams[number].rows for number in streams]
        return Rows(first=own[0].first, end=own[-1].end)

    def _tokens(
        self, normed: list[Tensor], streams: tuple[int, ...]
    ) -> Float[Tensor, "images rows width"]:
        """The normalised tokens of some streams, one after the other."""
        found = [by_image(normed[one], self.plan.streams[one].rows) for one in streams]
        if len(found) == 1:
            return found[0]
        varying = [one for one, number in zip(found, streams, strict=True) if self._varies(number)]
        images = varying[0].shape[0]
        return torch.cat(
            [
                one if self._varies(number) else one.expand(images, -1, -1)
                for one, number in zip(found, streams, strict=True)
            ],
            dim=1,
        )

    def _varies(self, stream: int) -> bool:
        return bool(self.plan.streams[stream].terms)


def _each_head(
    values: Float[Tensor, "images heads *rows inputs"],
    weight: Float[Tensor, "heads inputs outputs"],
) -> Float[Tensor, "images heads *rows outputs"]:
    """A product of its own for each head, of all rows of all images."""
    by_head = values.transpose(0, 1).flatten(1, -2) @ weight
    if values.ndim == 4:
        by_head = by_head.unflatten(1, (-1, values.shape[2]))
    return by_head.transpose(0, 1)


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
