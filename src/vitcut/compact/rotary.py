"""Rotary positions, as the masked and the compact model apply them."""

import torch

from vitcut.shapes import Float, Tensor


def rotate(
    values: Float[Tensor, "*rows head_dim"],
    cosine: Float[Tensor, "*#rows head_dim"],
    sine: Float[Tensor, "*#rows head_dim"],
) -> Float[Tensor, "*rows head_dim"]:
    """Turn each pair of features, of which one lies in either half, by an angle.

    Source:
        Su et al. 2021, arXiv:2104.09864, equation 34; pairs are neighbours there.
    """
    one, other = values.chunk(2, dim=-1)
    return values * cosine + torch.cat([-other, one], dim=-1) * sine
