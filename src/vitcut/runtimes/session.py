"""A session: a model made ready in one runtime, checked against torch, and run."""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name

import torch
from torch import nn

from vitcut.errors import ConfigError, ExactnessError
from vitcut.extras import refusal
from vitcut.names import RuntimeName
from vitcut.settings import require_bounds, require_runtime
from vitcut.shapes import Float, Tensor

RUNTIMES: dict[RuntimeName, str] = {
    "torch": "vitcut.runtimes.torch_runtimes:prepare_eager",
    "torch-compile": "vitcut.runtimes.torch_runtimes:prepare_compiled",
    "onnxruntime": "vitcut.runtimes.onnx_runtime:prepare",
    "openvino": "vitcut.runtimes.open_vino:prepare",
}
"""Where each runtime is: a function of (module, examples, *, threads) that gives one session per
example. Imported only when a runtime is used, as its package may be missing."""

_TOLERANCE = 1e-4
"""In float32, relative to max(1, max |logit|)."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Runs one model at one batch size.

    Torch's thread count belongs to the process: call `run` inside `torch_threads(threads)`.
    """

    runtime: RuntimeName
    batch: int
    """Images per call."""
    threads: int
    run: Callable[[Tensor], Tensor]
    """Normalised images, float32, shape [batch, channels, height, width], to logits, shape
    [batch, classes]; both on `device`."""
    device: str = "cpu"
    dtype: str = "float32"


def prepare_sessions(
    name: RuntimeName, module: nn.Module, examples: Sequence[Tensor], *, threads: int
) -> tuple[Session, ...]:
    """Make a model ready in a runtime, once for each batch size.

    The module is neither changed nor kept.

    Args:
        name: The runtime.
        module: Normalised images to logits.
        examples: Normalised images, each of shape [batch, channels, height, width] with the batch
            size that will be run. The parity check runs on them, so use real images.
        threads: CPU threads.

    Returns:
        One session per example.

    Raises:
        ConfigError: The runtime is unknown, its package is not installed, threads < 1, or there is
            no example.
        ExactnessError: The runtime's logits differ from torch's.
    """
    require_runtime(name)
    require_bounds("threads", threads)
    if not examples:
        raise ConfigError(f"runtime {name!r} needs at least one example batch, got none")
    try:
        prepare = resolve_name(RUNTIMES[name])
    except ModuleNotFoundError as error:
        raise refusal(error) or error from None
    return prepare(module, examples, threads=threads)


@contextmanager
def torch_threads(threads: int) -> Generator[None]:
    """Set torch's thread count for a block, then restore the old one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode; later training of the module does not reach it."""
    return copy.deepcopy(module).eval().requires_grad_(requires_grad=False)


def in_batches(run: Callable[[Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """Let what takes exactly ``batch`` images take any number; the last call is filled up."""

    def each(images: Tensor) -> Tensor:
        missing = -len(images) % batch
        filled = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
        return torch.cat([run(part.contiguous()) for part in filled.split(batch)])[: len(images)]

    return each


def device_of(module: nn.Module) -> torch.device:
    """Where a model computes: where its first parameter is."""
    return next((each.device for each in module.parameters()), torch.device("cpu"))


def require_parity(
    got: Float[Tensor, "..."],
    expected: Float[Tensor, "batch classes"],
    *,
    runtime: str,
) -> None:
    """Refuse logits that differ from torch's by more than float32 rounding; NaN is never equal.

    Raises:
        ExactnessError: The greatest difference exceeds 1e-4 x max(1, max |logit|).
    """
    if got.shape != expected.shape:
        raise ExactnessError(
            f"{runtime} gave logits of shape {list(got.shape)}, torch {list(expected.shape)}: "
            "the conversion is wrong, use runtime torch"
        )
    difference = (got - expected).abs().max().item()
    allowed = _TOLERANCE * max(1.0, expected.abs().max().item())
    # "not <=" and not ">": a difference of NaN must not pass.
    if not difference <= allowed:
        raise ExactnessError(
            f"{runtime} differs from torch by {difference:.2g} in a logit, expected at most "
            f"{allowed:.2g}: check the weights for NaN, or use runtime torch"
        )
