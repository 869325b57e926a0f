"""A model whose classifier answers fewer classes, or in another order; the given one stays."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from vitcut.errors import UnsupportedModelError
from vitcut.vits.weights import ViTWeights


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
    head = weights.head_weight
    # DINOv2's reads more than the tokens that were read of it.
    found = [
        layer
        for layer in fewer.modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features == len(head)
        and torch.equal(layer.weight[:, : head.shape[1]], head)
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} for some of its classes: {len(found)} of its "
            "layers are the classifier that was read, expected one nn.Linear; name every class in "
            "the label file, or give it a 'rest'"
        )
    _take(found[0], list(rows))
    if isinstance(getattr(fewer, "num_classes", None), int):
        said: Any = fewer
        said.num_classes = len(rows)
    return fewer


def _take(layer: nn.Linear, rows: list[int]) -> None:
    learns = layer.weight.requires_grad
    bias: Any = layer.bias
    layer.weight = nn.Parameter(layer.weight.detach()[rows].clone(), requires_grad=learns)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=learns)
    layer.out_features = len(rows)
