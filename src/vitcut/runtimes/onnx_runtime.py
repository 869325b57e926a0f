"""ONNX Runtime on the CPU, and the ONNX file that it runs."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import nn
from torch.export import Dim

from vitcut.compact.model import CompactViT, centred
from vitcut.runtimes.session import Session, frozen_copy, require_parity
from vitcut.shapes import Float, Tensor
from vitcut.store import atomic_path

INPUT_NAME = "images"
OUTPUT_NAME = "logits"

_OPSET = 23
"""The first with an Attention operation; a fixed batch size was no faster with it."""
_ERRORS_ONLY = 3


def export_onnx(
    module: nn.Module, path: str | Path, *, example: Float[Tensor, "batch channels y x"]
) -> None:
    """Write a model as one ONNX file that takes any batch size, atomically.

    The file is written only if ONNX Runtime computes the same logits from it as torch. Input
    "images": normalised float32; output "logits".

    Args:
        module: Normalised images to logits; not changed.
        path: The file to write.
        example: Images of the size that the model takes; the parity check runs on them.

    Raises:
        ExactnessError: ONNX Runtime's logits differ from torch's.
    """
    model = frozen_copy(module).cpu()
    exported = centred(model) if isinstance(model, CompactViT) else model
    with atomic_path(path) as temporary:
        torch.onnx.export(
            # Weights are named by their place: none may be called what the input or output is.
            nn.Sequential(exported).eval(),
            # torch.export takes a size of 0 or 1 for a constant: trace with two images.
            (example[:1].repeat(2, 1, 1, 1),),
            temporary,
            dynamo=True,
            dynamic_shapes=({0: Dim("batch")},),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )
        session = load_session(temporary, batch=len(example), threads=1)
        with torch.inference_mode():
            require_parity(session.run(example), model(example), runtime="onnxruntime")


def prepare(module: nn.Module, examples: Sequence[Tensor], *, threads: int) -> tuple[Session, ...]:
    """Export a model once, and load it in ONNX Runtime for each example.

    The parity check runs on the largest example.

    Raises:
        ExactnessError: ONNX Runtime's logits differ from torch's.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(module, path, example=max(examples, key=len))
        return tuple(
            load_session(path, batch=len(example), threads=threads) for example in examples
        )


def load_session(path: str | Path, *, batch: int, threads: int) -> Session:
    """Load an ONNX file that `export_onnx` wrote."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: images.numpy()})
        return torch.from_numpy(logits)

    return Session(runtime="onnxruntime", batch=batch, threads=threads, run=run)
