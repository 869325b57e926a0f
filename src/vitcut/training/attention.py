"""Attention in plain products while training on a CPU: there torch's fused operator is slower."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vitcut.shapes import Tensor
from vitcut.training.settings import TrainSettings


def fast_attention(config: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a model trains fastest; the function it computes is the same.

    On a CPU in bfloat16 torch's fused operator is the slower one. A compact model avoids it by
    itself; this is for timm's models: the teacher, and the dense model that gets the same repair.
    """
    plain = device.type == "cpu" and config.precision == "bfloat16" and not config.compile
    return _PlainAttention() if plain else nullcontext()


class _PlainAttention(TorchFunctionMode):
    """Replaces ``scaled_dot_product_attention`` wherever a model calls it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention or not _is_plain(args, given):
            return func(*args, **given)
        return _attend(*args, scale=given.get("scale"))


def _is_plain(args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Whether a call has neither mask nor dropout nor anything else but a scale."""
    return len(args) == 3 and not any(value for name, value in given.items() if name != "scale")


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    return torch.softmax((q * factor) @ k.transpose(-2, -1), dim=-1) @ v
