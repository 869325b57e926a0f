"""Torch where the model is: eager, which all other runtimes are checked against, and compiled."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from vitcut.runtimes.session import (
    Session,
    device_of,
    frozen_copy,
    require_parity,
    torch_threads,
)
from vitcut.shapes import Tensor


def prepare_eager(
    module: nn.Module, examples: Sequence[Tensor], *, threads: int
) -> tuple[Session, ...]:
    """Make a model ready in eager torch, in evaluation mode and without gradients."""
    model = frozen_copy(module)
    device = device_of(model)
    run = _on_device(model, device)
    return tuple(
        Session(runtime="torch", batch=len(example), threads=threads, run=run, device=str(device))
        for example in examples
    )


def prepare_compiled(
    module: nn.Module, examples: Sequence[Tensor], *, threads: int
) -> tuple[Session, ...]:
    """Compile a model for the batch size of each example, and run it until it is compiled.

    Inductor needs a C++ compiler, and seconds for each batch size.

    Raises:
        ExactnessError: The compiled model's logits differ from eager torch's.
    """
    model = frozen_copy(module)
    device = device_of(model)
    sessions: list[Session] = []
    for example in (each.to(device) for each in examples):
        # fullgraph: what torch cannot compile is an error, and never silently run eagerly.
        compiled = torch.compile(_own_function(model), dynamic=False, fullgraph=True)
        run = _on_device(compiled, device)
        # Inductor writes the thread count into the code it generates: compile under the right one.
        with torch_threads(threads), torch.inference_mode():
            require_parity(run(example), model(example), runtime="torch-compile")
        sessions.append(
            Session(
                runtime="torch-compile",
                batch=len(example),
                threads=threads,
                run=run,
                device=str(device),
            )
        )
    return tuple(sessions)


def _on_device(
    call: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Run without gradients; a call has ended when its logits are there."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = call(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return logits

    return run


def _own_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function whose code no other session shares.

    Torch counts compilations by code object and runs eagerly after the eighth; models of one class
    share the code of ``forward``.
    """

    def run(images: Tensor) -> Tensor:
        return model(images)

    run.__code__ = run.__code__.replace()
    return run
