"""Torch with torch.compile (inductor): needs a C++ compiler, and seconds to compile."""

from collections.abc import Callable, Sequence

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
    # fullgraph: a part that torch cannot compile is an error here, and never run eagerly unsaid.
    compiled = torch.compile(_own_function(model), dynamic=False, fullgraph=True)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return compiled(images)

    # Inductor writes the thread count into the code it generates, so compile under the right one.
    with torch_threads(threads), torch.inference_mode():
        require_parity(run(example), model(example), runtime="torch-compile")
    return Session(runtime="torch-compile", batch=len(example), threads=threads, run=run)


def _own_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function whose code no other session shares.

    Torch counts compilations by code object and runs eagerly after the eighth; models of one class
    share the code of ``forward``.
    """

    def run(images: Tensor) -> Tensor:
        return model(images)

    run.__code__ = run.__code__.replace()
    return run
