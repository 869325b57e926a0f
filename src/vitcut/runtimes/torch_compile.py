"""Torch with torch.compile (inductor): needs a C++ compiler, and seconds to compile."""

from collections.abc import Sequence

import torch
from torch import nn

from vitcut.runtimes.session import Session, frozen_copy, require_parity, torch_threads
from vitcut.shapes import Float, Tensor


def prepare(module: nn.Module, examples: Sequence[Tensor], *, threads: int) -> tuple[Session, ...]:
    """Compile a model for the batch size of each example, and run it until it is compiled.

    Raises:
        ExactnessError: The compiled model's logits differ from eager torch's.
    """
    model = frozen_copy(module)
    return tuple(_compile(model, example, threads) for example in examples)


def _compile(
    model: nn.Module, example: Float[Tensor, "batch channels y x"], threads: int
) -> Session:
    compiled = torch.compile(model, dynamic=False)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return compiled(images)

    # Inductor writes the thread count into the code it generates, so compile under the right one.
    with torch_threads(threads), torch.inference_mode():
        require_parity(run(example), model(example), runtime="torch-compile")
    return Session(runtime="torch-compile", batch=len(example), threads=threads, run=run)
