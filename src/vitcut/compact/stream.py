"""Streams of a compact model: sums of what was written, each with its LayerNorm.

One forward pass keeps what has been written so far in a dictionary from the names of the plan to
values of shape [images * rows, width]: a product of two matrices, with what is added to it, is one
operation in every runtime; that of a batch of matrices is two or three.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.compact.plan import Rows, StreamPlan, ViTShape
from vitcut.shapes import Float, Tensor


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product that is yet to be computed: its only reader computes it onto its own sum."""

    inputs: Float[Tensor, "tokens inputs"]
    weight: Float[Tensor, "width inputs"]

    def alone(self) -> Float[Tensor, "tokens width"]:
        """The product."""
        return F.linear(self.inputs, self.weight)

    def onto(self, total: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """A sum plus the product, in one operation."""
        return torch.addmm(total, self.inputs, self.weight.t())


Written = dict[str, Tensor | Product]


class Stream(nn.Module):
    """A sum of earlier writers and a constant, then LayerNorm without affine part."""

    def __init__(
        self, plan: StreamPlan, shape: ViTShape, *, pooled: bool = False, normalised: bool = True
    ) -> None:
        """Build it.

        Args:
            plan: What is added.
            shape: Sizes.
            pooled: Whether the mean over the tokens is taken of the sum.
            normalised: Whether there is a LayerNorm.
        """
        super().__init__()
        self.plan = plan
        self.pooled = pooled
        self.normalised = normalised
        self.eps = shape.eps
        self.centred = False
        """Whether the mean over the width is known to be 0: see ``deployment.py``."""
        # Constants are parameters, not buffers: fine-tuning trains them like any bias.
        self.table = make_table(plan.table_rows, shape.width) if plan.table_rows else None

    def forward(
        self, written: Written, *, per_image: bool = False
    ) -> Float[Tensor, "*tokens width"]:
        """Add up, remember the sum under this stream's name, and normalise it.

        Args:
            written: What was written so far.
            per_image: Whether the reader wants a dimension for images, where there is one at hand.

        Returns:
            The normalised tokens of all images; where nothing is added to the constant, those of
            any one image.
        """
        if self.plan.terms:
            total = self._sum(written)
            if self.pooled:
                return self._normalise(by_image(total, self.plan.rows).mean(1))
            written[self.plan.name] = flatten(total)
            return self._normalise(total if per_image else flatten(total))
        if self.table is None:
            raise TypeError(f"{self.plan.name} has neither terms nor a table")
        return self._normalise(self.table).expand(self.plan.rows.count, -1)

    def _sum(self, written: Written) -> Tensor:
        total = None
        for term in self.plan.terms:
            value = written[term.name]
            if not isinstance(value, Product):
                value = flatten(take_rows(value, term.rows, self.plan.rows))
                total = value if total is None else total + value
            elif total is None:
                total = value.alone()
            else:
                # Under autocast addmm would round the sum itself to bfloat16.
                total = total + value.alone() if self.training else value.onto(total)
        if total is None:
            raise TypeError(f"{self.plan.name} has no terms")
        if self.table is None:
            return total
        if self.plan.table_rows == 1:
            return total + self.table
        return by_image(total, self.plan.rows) + self.table

    def _normalise(self, total: Tensor) -> Tensor:
        if not self.normalised:
            return total
        if self.centred and torch.onnx.is_in_onnx_export():
            return rms_norm(total, self.eps)
        return F.layer_norm(total, (total.shape[-1],), eps=self.eps)


def make_table(*sizes: int) -> nn.Parameter:
    """A trainable constant, initialised like a ViT's position embedding."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes), std=0.02))


def write(
    inputs: Float[Tensor, "tokens inputs"], product: nn.Module, *, bias: bool
) -> Tensor | Product:
    """What a product writes; a plain one without a bias is left to its only reader."""
    # What replaces it (a quantised or low-rank product) or watches it is called as a module.
    if bias or type(product) is not nn.Linear or product._forward_hooks:  # pyright: ignore[reportPrivateUsage]
        return product(inputs)
    return Product(inputs=inputs, weight=product.weight)


def by_image(
    values: Float[Tensor, "*tokens width"], rows: Rows
) -> Float[Tensor, "images rows width"]:
    """Tokens with a dimension of their own for images."""
    return values if values.ndim == 3 else values.unflatten(0, (-1, rows.count))


def by_head(
    values: Float[Tensor, "tokens columns"], rows: Rows, heads: int
) -> Float[Tensor, "images heads rows head_dim"]:
    """Columns of heads, one after the other, with dimensions of their own for images and heads."""
    if rows.count == 1:
        return values.view(-1, heads, 1, values.shape[1] // heads)
    return values.view(-1, rows.count, heads, values.shape[1] // heads).transpose(1, 2)


def flatten(values: Float[Tensor, "*tokens width"]) -> Float[Tensor, "all_tokens width"]:
    """The tokens of all images, one after the other."""
    return values if values.ndim == 2 else values.flatten(0, 1)


def take_rows(
    values: Float[Tensor, "*tokens width"], own: Rows, wanted: Rows
) -> Float[Tensor, "*wanted_tokens width"]:
    """The wanted tokens of values that were computed for their own; zeros for all others."""
    if own == wanted:
        return values
    values = by_image(values, own)
    if wanted.count == 1 and own.first <= wanted.first < own.end:
        return values[:, wanted.first - own.first]
    before, after = own.first - wanted.first, wanted.end - own.end
    if before < 0 or after < 0:
        values = values[:, max(0, -before) : own.count - max(0, -after)]
    if before > 0 or after > 0:
        return F.pad(values, (0, 0, max(0, before), max(0, after)))
    return values


def rms_norm(total: Float[Tensor, "tokens width"], eps: float) -> Float[Tensor, "tokens width"]:
    """LayerNorm of what has mean 0, as the one ONNX operation that does not look for the mean."""
    return torch.onnx.ops.symbolic(
        "RMSNormalization",
        (total, total.new_ones(total.shape[-1])),
        {"axis": -1, "epsilon": eps},
        dtype=total.dtype,
        shape=total.shape,
        version=23,
    )
