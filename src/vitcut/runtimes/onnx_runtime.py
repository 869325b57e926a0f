"""ONNX Runtime on the CPU, and the ONNX file that it runs."""

import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.export import Dim

from vitcut.compact.model import CompactViT, centred
from vitcut.runtimes.session import Session, frozen_copy, in_batches, require_parity
from vitcut.shapes import Float, Tensor
from vitcut.store import atomic_path

INPUT_NAME = "images"
OUTPUT_NAME = "logits"

TIMED_OPSET = 23
"""The first with an Attention operation; a fixed batch size was no faster with it."""
_NORMED_OPSET = 23
"""The first with RMSNormalization, which `centred` is for."""
_IR_VERSION = 9
"""Of files with operations that ONNX Runtime 1.17 has: it reads no newer ones."""
_READ_BY_1_17 = 20
_ERRORS_ONLY = 3


def export_onnx(
    module: nn.Module,
    path: str | Path,
    *,
    example: Float[Tensor, "batch channels y x"],
    opset: int = TIMED_OPSET,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as one ONNX file, atomically.

    The file is written only if ONNX Runtime computes the same logits from it as torch. Input
    "images": normalised float32; output "logits".

    Args:
        module: Normalised images to logits; not changed.
        path: The file to write.
        example: Images of the size that the model takes; the parity check runs on them.
        opset: Version of ONNX's operations. With 20 or older ones, ONNX Runtime 1.17 reads the
            file.
        batch: Images per call; None for any number.
        metadata: Texts to store in the file, by name.

    Raises:
        ExactnessError: ONNX Runtime's logits differ from torch's.
    """
    model = frozen_copy(module).cpu()
    normed = isinstance(model, CompactViT) and opset >= _NORMED_OPSET
    with atomic_path(path) as temporary:
        write_graph(
            centred(model) if normed and isinstance(model, CompactViT) else model,
            temporary,
            # torch.export takes a size of 0 or 1 for a constant: trace with two images.
            example=example[:1].repeat(batch or 2, 1, 1, 1),
            names=(INPUT_NAME, OUTPUT_NAME),
            dynamic={0: "batch"} if batch is None else {},
            opset=opset,
            metadata=metadata or {},
        )
        session = load_session(temporary, batch=batch or len(example), threads=1)
        run = session.run if batch is None else in_batches(session.run, batch)
        with torch.inference_mode():
            require_parity(run(example), model(example), runtime="onnxruntime")


def write_graph(
    module: nn.Module,
    path: Path,
    *,
    example: Tensor,
    names: tuple[str, ...],
    dynamic: Mapping[int, str],
    opset: int,
    metadata: Mapping[str, str],
) -> None:
    """Write what a module computes of one tensor as an ONNX file; nothing is checked.

    Args:
        module: A frozen module in evaluation mode.
        path: The file to write.
        example: The module's input.
        names: Of the input and the outputs.
        dynamic: The dimensions of the input that may have any size, with their names.
        opset: Version of ONNX's operations.
        metadata: Texts to store in the file, by name.
    """
    with without_warnings():
        torch.onnx.export(
            # Weights are named by their place: none may be called what the input or output is.
            nn.Sequential(module).eval(),
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=({at: Dim(name) for at, name in dynamic.items()},) if dynamic else None,
            input_names=names[:1],
            output_names=names[1:],
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    if opset <= _READ_BY_1_17:
        model.ir_version = _IR_VERSION
        _add_biases(model.graph)
    # Shapes of inner values, which runtimes infer, and where in torch's code each node comes from.
    del model.graph.value_info[:]
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
    for each in model.graph.initializer:
        del each.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


def _add_biases(graph: onnx.GraphProto) -> None:
    """Give LayerNormalizations without a bias one of zeros.

    ONNX Runtime 1.17 looks for an attention behind each, and ends the process where it reads the
    bias of one that has none.
    """
    scales = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "LayerNormalization" and len(node.input) == 2:
            scale = onnx.numpy_helper.to_array(scales[node.input[1]])
            name = f"no_bias_{len(scale)}"
            if name not in scales:
                zeros = onnx.numpy_helper.from_array(np.zeros_like(scale), name)
                graph.initializer.append(zeros)
                scales[name] = zeros
            node.input.append(name)


@contextmanager
def without_warnings() -> Generator[None]:
    """Without what ONNX's tools log of each operation that they leave as it is."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


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
