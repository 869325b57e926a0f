"""What the modules of a compact model share: streams, the layout of tokens, activations, rotation.

All tokens of all images lie flat, [images * rows, width]: a product of two matrices and what is
added to it are one operation in every runtime, those of a batch of matrices are two or three. A
dimension for images is opened only where a row needs its position, and columns fall into heads all
at once: with one image every reshape and transposition counts.

One forward pass keeps what has been written so far in a dictionary, by the names of the plan.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vitcut.compact.plan import Rows, StreamPlan, ViTShape
from vitcut.names import Activation
from vitcut.shapes import Float, Tensor

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}
"""The activations of an MLP by name; the masked model uses them, too."""


def rotate(
    values: Float[Tensor, "*rows head_dim"],
    cosine: Float[Tensor, "*#rows head_dim"],
    sine: Float[Tensor, "*#rows head_dim"],
) -> Float[Tensor, "*rows head_dim"]:
    """Rotate each pair of features, one from either half, by the angle of its position.

    Source:
        Su et al. 2021, arXiv:2104.09864, equation 34; pairs are neighbours there.
    """
    one, other = values.chunk(2, dim=-1)
    return values * cosine + torch.cat([-other, one], dim=-1) * sine


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product without a bias, left to its only reader, which computes it onto its own sum."""

    inputs: Float[Tensor, "tokens inputs"]
    weight: Float[Tensor, "width inputs"]


Written = dict[str, Tensor | Product]


class PatchEmbedding(nn.Conv2d):
    """The patches of an image, each multiplied by one weight; of all patches or of some."""

    chosen: Tensor | None

    def __init__(self, shape: ViTShape) -> None:
        super().__init__(
            shape.channels, shape.width, shape.patch_size, shape.patch_size, bias=False
        )
        self.grid_size = shape.grid_size
        kept = shape.kept_patches
        # From numpy, so not on "meta", where models are built to be filled: it is not stored.
        chosen = None if kept is None else torch.from_numpy(np.array(kept))
        self.register_buffer("chosen", chosen, persistent=False)

    def forward(
        self,
        input: Float[Tensor, "images channels y x"],  # noqa: A002 - as the base class has it
    ) -> Float[Tensor, "images patches width"]:
        """Embed: all patches by a convolution, some by choosing them first."""
        if self.chosen is None:
            return super().forward(input).flatten(2).transpose(1, 2)
        # [images channels grid side grid side] to [images grid grid channels side side]
        grid = (self.grid_size, -1)
        cells = input.unflatten(3, grid).unflatten(2, grid).permute(0, 2, 4, 1, 3, 5)
        patches = cells.flatten(3).flatten(1, 2).index_select(1, self.chosen)
        return F.linear(patches, self.weight.flatten(1))


class Stream(nn.Module):
    """A sum of earlier writers and a constant, then LayerNorm without an affine part."""

    def __init__(
        self, plan: StreamPlan, shape: ViTShape, *, pooled: bool = False, normalised: bool = True
    ) -> None:
        """``pooled``: take the mean over the tokens first; ``normalised``: apply the LayerNorm."""
        super().__init__()
        self.plan = plan
        self.pooled = pooled
        self.normalised = normalised
        self.eps = shape.eps
        self.centred = False
        """Whether the mean over the width is known to be 0 (see ``model.centred``)."""
        # Constants are parameters, not buffers: fine-tuning trains them like any bias.
        self.table = make_table(plan.table_rows, shape.width) if plan.table_rows else None

    def forward(
        self, written: Written, *, per_image: bool = False
    ) -> Float[Tensor, "*tokens width"]:
        """Add up, write the sum under this stream's name, and normalise it.

        Args:
            written: What was written so far.
            per_image: Whether the reader prefers [images, rows, width] where that is at hand.

        Returns:
            The normalised tokens of all images. A stream without terms is the same for all of them:
            it returns the tokens of one, and is not written, as readers fold it into their tables.
        """
        rows, total = self.plan.rows, None
        for term in self.plan.terms:
            value = written[term.name]
            if isinstance(value, Product):
                # Under autocast addmm would round the sum itself to bfloat16.
                if total is not None and not self.training:
                    total = torch.addmm(total, value.inputs, value.weight.t())
                    continue
                value = F.linear(value.inputs, value.weight)
            else:
                value = flatten(take_rows(value, term.rows, rows))
            total = value if total is None else total + value
        if total is None:
            if self.table is None:
                raise TypeError(f"{self.plan.name} has neither terms nor a table")
            return self._normalise(self.table).expand(rows.count, -1)
        if self.table is not None:
            # One vector for all tokens is added to flat tokens; a row per token is not.
            one = self.plan.table_rows == 1
            total = (total if one else by_image(total, rows)) + self.table
        if self.pooled:
            return self._normalise(by_image(total, rows).mean(1))
        written[self.plan.name] = flatten(total)
        return self._normalise(total if per_image else flatten(total))

    def _normalise(self, total: Tensor) -> Tensor:
        if not self.normalised:
            return total
        if self.centred and torch.onnx.is_in_onnx_export():
            # Of what has mean 0 the mean square is the variance, so that eps enters alike: this
            # is LayerNorm, as the one ONNX operation that does not look for the mean.
            return torch.onnx.ops.symbolic(
                "RMSNormalization",
                (total, total.new_ones(total.shape[-1])),
                {"axis": -1, "epsilon": self.eps},
                dtype=total.dtype,
                shape=total.shape,
                version=23,
            )
        return F.layer_norm(total, (total.shape[-1],), eps=self.eps)


def make_table(*sizes: int) -> nn.Parameter:
    """A trainable constant, initialised like a ViT's position embedding."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes), std=0.02))


def write(
    inputs: Float[Tensor, "tokens inputs"], product: nn.Module, *, bias: bool
) -> Tensor | Product:
    """What a product writes; a plain one without a bias is left to its only reader."""
    # A module that replaces it (a quantised or low-rank product) or watches it must be called.
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
    """The columns of heads, with dimensions of their own for images and heads."""
    if rows.count == 1:
        return values.view(-1, heads, 1, values.shape[1] // heads)
    return values.view(-1, rows.count, heads, values.shape[1] // heads).transpose(1, 2)


def flatten(values: Float[Tensor, "*tokens width"]) -> Float[Tensor, "all_tokens width"]:
    """The tokens of all images, one after the other."""
    return values if values.ndim == 2 else values.flatten(0, 1)


def take_rows(
    values: Float[Tensor, "*tokens width"], own: Rows, wanted: Rows
) -> Float[Tensor, "*wanted_tokens width"]:
    """The wanted tokens of values that exist for ``own`` tokens; zeros for all others."""
    if own == wanted:
        return values
    values = by_image(values, own)
    if wanted.count == 1 and own.covers(wanted):
        return values[:, wanted.first - own.first]
    before, after = own.first - wanted.first, wanted.end - own.end
    if before < 0 or after < 0:
        values = values[:, max(0, -before) : own.count - max(0, -after)]
    if before > 0 or after > 0:
        return F.pad(values, (0, 0, max(0, before), max(0, after)))
    return values
