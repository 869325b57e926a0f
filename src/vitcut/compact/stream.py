"""Streams of a compact model: sums of what was written, each with its LayerNorm.

One forward pass keeps what has been written so far in a dictionary from the names of the plan to
tensors of shape [images, rows, width], or [images, width] for a single row: a product of matrices
is one operation in every runtime, that of a batch of rows with its bias often two.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.compact.plan import Rows, StreamPlan, ViTShape
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

    def forward(self, written: Written) -> Float[Tensor, "images *rows width"]:
        """Add up, remember the sum under this stream's name, and normalise it."""
        total = self.table
        for term in reversed(self.plan.terms):
            value = take_rows(written[term.name], term.rows, self.plan.rows)
            total = value if total is None else value + total
        if total is None:
            raise TypeError(f"{self.plan.name} has neither terms nor a table")
        if not self.plan.terms:
            images, rows = next(iter(written.values())).shape[0], self.plan.rows.count
            shape = (images, -1) if rows == 1 else (images, rows, -1)
            return _normalise(total, self.eps).expand(*shape)
        written[self.plan.name] = total
        return _normalise(total, self.eps)


def make_table(*sizes: int) -> nn.Parameter:
    """A trainable constant, initialised like a ViT's position embedding."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes), std=0.02))


def take_rows(
    values: Float[Tensor, "images ..."], own: Rows, wanted: Rows
) -> Float[Tensor, "images ..."]:
    """The wanted tokens of values that were computed for their own; zeros for all others.

    A single row has no dimension of its own.
    """
    if own == wanted:
        return values
    if wanted.count == 1:
        return values[:, wanted.first - own.first]
    values = with_rows(values, own)
    before, after = own.first - wanted.first, wanted.end - own.end
    if before < 0 or after < 0:
        values = values[:, max(0, -before) : own.count - max(0, -after)]
    if before > 0 or after > 0:
        return F.pad(values, (0, 0, max(0, before), max(0, after)))
    return values


def with_rows(values: Float[Tensor, "images ..."], own: Rows) -> Float[Tensor, "images rows ..."]:
    """Values with a dimension for rows, also where there is one."""
    return values.unsqueeze(1) if own.count == 1 else values


def _normalise(total: Tensor, eps: float) -> Tensor:
    return F.layer_norm(total, (total.shape[-1],), eps=eps)
