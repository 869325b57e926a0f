"""Streams of a compact model: sums of what was written, each with its LayerNorm.

One forward pass keeps what has been written so far in a dictionary from the names of the plan to
tensors of shape [images, rows, width].
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

    def forward(self, written: Written) -> Float[Tensor, "images rows width"]:
        """Add up, remember the sum under this stream's name, and normalise it."""
        total = self.table
        for term in reversed(self.plan.terms):
            value = take_rows(written[term.name], term.rows, self.plan.rows)
            total = value if total is None else value + total
        if total is None:
            raise TypeError(f"{self.plan.name} has neither terms nor a table")
        if not self.plan.terms:
            images = next(iter(written.values())).shape[0]
            return _normalise(total, self.eps).expand(images, self.plan.rows.count, -1)
        written[self.plan.name] = total
        return _normalise(total, self.eps)


def make_table(*sizes: int) -> nn.Parameter:
    """A trainable constant, initialised like a ViT's position embedding."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes), std=0.02))


def take_rows(
    values: Float[Tensor, "images tokens ..."], own: Rows, wanted: Rows
) -> Float[Tensor, "images rows ..."]:
    """The wanted tokens of values that were computed for their own; zeros for all others."""
    before, after = own.first - wanted.first, wanted.end - own.end
    if before < 0 or after < 0:
        values = values[:, max(0, -before) : own.count - max(0, -after)]
    if before > 0 or after > 0:
        return F.pad(values, (0, 0, max(0, before), max(0, after)))
    return values


def _normalise(total: Tensor, eps: float) -> Tensor:
    return F.layer_norm(total, (total.shape[-1],), eps=eps)
