"""The activations of an MLP, by name; the masked and the compact model share them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vitcut.names import Activation
from vitcut.shapes import Tensor

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}
