"""OpenVINO on the CPU in float32: a model traced by torch, compiled for each batch size."""

import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from vitcut.runtimes.session import Session, frozen_copy, require_parity
from vitcut.shapes import Float, Tensor

_TELEMETRY = "openvino_telemetry"


@contextmanager
def _without_telemetry() -> Generator[None]:
    """Import OpenVINO as if its telemetry package were missing; else it reports every import."""
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before


with _without_telemetry():
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

_FUSED_FROM = 17
"""Images per call. With 8 or fewer, OpenVINO 2026 ends the process when it fuses a compact model's
MLPs over class tokens, so its snippets are off up to 16 (decision 0009)."""


def prepare(module: nn.Module, examples: Sequence[Tensor], *, threads: int) -> tuple[Session, ...]:
    """Convert a model once, and compile it for the batch size of each example.

    A fixed batch size is faster than a dynamic one at 1 and at 64 images (decision 0009).

    Raises:
        ExactnessError: OpenVINO's logits differ from torch's on an example.
    """
    model = frozen_copy(module).cpu()
    converted = convert(model, examples[0])
    sessions: list[Session] = []
    for example in examples:
        fixed = converted.clone()
        fixed.reshape(list(example.shape))
        run = compile_model(fixed, threads=threads, fused=len(example) >= _FUSED_FROM)
        with torch.inference_mode():
            require_parity(run(example), model(example), runtime="openvino")
        sessions.append(Session(runtime="openvino", batch=len(example), threads=threads, run=run))
    return tuple(sessions)


def convert(model: nn.Module, example: Float[Tensor, "batch channels y x"]) -> openvino.Model:
    """OpenVINO's form of a frozen module on the CPU, of no fixed shape."""
    # `openvino.convert_model` does the same, and sends usage data.
    with warnings.catch_warnings():
        # Tracing is deprecated, and warns of sizes read as numbers: parity is checked instead.
        warnings.simplefilter("ignore")
        # Traced with two images, so that no size of 1 is taken for a constant.
        decoder = TorchScriptPythonDecoder(
            model, example_input=example[:1].repeat(2, 1, 1, 1), shared_memory=False
        )
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def compile_model(
    model: openvino.Model, *, threads: int, fused: bool
) -> Callable[[Tensor], Tensor]:
    """A function that runs a model on the CPU.

    Args:
        model: Images to logits.
        threads: CPU threads.
        fused: Whether OpenVINO may use its snippets; see `_FUSED_FROM`.
    """
    settings: dict[str, str | int | bool] = {
        # Otherwise OpenVINO computes in bfloat16 where the CPU can.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    if not fused:
        settings["SNIPPETS_MODE"] = "DISABLE"
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return partial(_run, compiled.create_infer_request())


def _run(request: openvino.InferRequest, images: Tensor) -> Tensor:
    # The logits are copied out of the request, which the next call overwrites.
    results = request.infer([images.numpy()], share_inputs=True, share_outputs=False)
    return torch.from_numpy(results[0])
