"""Torch without compilation: what every other runtime is checked against."""

from collections.abc import Sequence

import torch
from torch import nn

from vitcut.runtimes.session import Session, frozen_copy
from vitcut.shapes import Tensor


def prepare(module: nn.Module, examples: Sequence[Tensor], *, threads: int) -> tuple[Session, ...]:
    """Make a model ready in eager torch, in evaluation mode and without gradients."""
    model = frozen_copy(module)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images)

    return tuple(
        Session(runtime="torch", batch=len(example), threads=threads, run=run)
        for example in examples
    )
