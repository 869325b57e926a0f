"""A model whose classifier answers fewer classes, or in another order; the given one stays."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from vitcut.errors import UnsupportedModelError
from vitcut.model.adapters import read_weights
from vitcut.model.weights import ViTWeights


def keep_rows(model: nn.Module, weights: ViTWeights, rows: Sequence[int]) -> nn.Module:
    """A copy of a model that gives some of its logits alone, in the order of ``rows``.

    Args:
        model: Of any library, or of your own.
        weights: What was read of it.
        rows: Positions of the logits that stay.

    Raises:
        UnsupportedModelError: The classifier is no linear layer with the rows that were read.
    """
    fewer = deepcopy(model)
    linear = [layer for layer in fewer.modules() if isinstance(layer, nn.Linear)]
    found = [layer for layer in linear if _is_read(layer, weights)]
    for layer in found:
        _take(layer, list(rows))
    if not found or not _has_rows(read_weights(fewer), weights, rows):
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} for some of its classes: {len(found)} of its "
            "layers seem to be the classifier that was read, expected nn.Linear alone; name every "
            "class in the label file, or give it a 'rest'"
        )
    if isinstance(getattr(fewer, "num_classes", None), int):
        said: Any = fewer
        said.num_classes = len(rows)
    return fewer


def _has_rows(fewer: ViTWeights, weights: ViTWeights, rows: Sequence[int]) -> bool:
    own, read = (fewer.head_weight, fewer.head_bias), (weights.head_weight, weights.head_bias)
    return all(torch.equal(one, other[rows]) for one, other in zip(own, read, strict=True))


def _is_read(layer: nn.Linear, weights: ViTWeights) -> bool:
    """Whether a layer is the classifier, or one of those whose mean is what was read."""
    head, width = weights.head_weight, weights.width
    if layer.out_features != len(head):
        return False
    own = layer.weight.detach()[:, :width]
    return any(
        torch.equal(own * share, read) for read in head.split(width, dim=1) for share in (1, 0.5)
    )


def _take(layer: nn.Linear, rows: list[int]) -> None:
    learns = layer.weight.requires_grad
    bias: Any = layer.bias
    layer.weight = nn.Parameter(layer.weight.detach()[rows].clone(), requires_grad=learns)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=learns)
    layer.out_features = len(rows)
