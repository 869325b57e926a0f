"""An ONNX file in fewer bits: float16, or int8 by static calibration, and what that costs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from vitcut.benchmark.bootstrap import bootstrap_interval, paired_interval
from vitcut.benchmark.evaluation import evaluate
from vitcut.benchmark.latency import time_sessions
from vitcut.benchmark.settings import BenchSettings
from vitcut.errors import ModelError
from vitcut.exports.target import Subject
from vitcut.images.load import normalise
from vitcut.names import Precision
from vitcut.runtimes.onnx_runtime import INPUT_NAME, load_session, without_warnings
from vitcut.runtimes.session import in_batches
from vitcut.shapes import Tensor

_BATCHES = (1, 64)
_CALIBRATION_BATCH = 16
_TIMING = BenchSettings(seconds=1.0)
_MOST_LOST = 0.01
"""Of the accuracy; losing more is advised against."""
_ACTIVATIONS = {"Gelu", "Relu", "Mul"}
"""The last operations of activation functions, as they are exported."""


def reduce(
    path: Path, subject: Subject, precision: Precision, *, batch: int | None
) -> dict[str, Any]:
    """Rewrite a float32 file, and compare both where there are images.

    Args:
        path: The file; it is replaced.
        subject: Its examples are those of the calibration.
        precision: float16 or int8.
        batch: Images per call of the file, or None for any number.

    Returns:
        Accuracy on val images and latency beside float32, and ``advice``, which is None if nothing
        speaks against the smaller file; empty without images.
    """
    size, before = path.stat().st_size, load_session(path, batch=1, threads=1)
    model = onnx.load(path)
    stored = {item.key: item.value for item in model.metadata_props}
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        # Images and logits stay float32, so nothing changes for whoever runs the file.
        model = convert_float_to_float16(model, keep_io_types=True)
        OnnxModel(model).topological_sort()
    else:
        model = _quantized(path, model, subject.examples, batch or _CALIBRATION_BATCH)
    onnx.helper.set_model_props(model, stored)
    onnx.save(model, path)
    if subject.images is None or subject.info.preprocessing is None:
        return {}
    sessions = {"float32": before, precision: load_session(path, batch=1, threads=1)}
    report: dict[str, Any] = {
        "bytes": {"float32": size, precision: path.stat().st_size},
        "latency_ms": {},
        "times_faster": {},
    }
    val, preprocessing = subject.images.val, subject.info.preprocessing
    found = {
        name: evaluate(
            session.run if batch is None else in_batches(session.run, batch),
            val,
            subject.images.task,
            preprocessing,
        )
        for name, session in sessions.items()
    }
    lost = found["float32"].accuracy_coarse - found[precision].accuracy_coarse
    report["val_images"] = len(val)
    report["accuracy"] = {name: each.accuracy_coarse for name, each in found.items()}
    report["accuracy_change_interval"] = paired_interval(
        found[precision].correct_coarse, found["float32"].correct_coarse, seed=0
    )
    objections = [f"it loses {100 * lost:.1f} points of accuracy"] if lost > _MOST_LOST else []
    for number in _BATCHES if batch is None else (batch,):
        images = normalise(val.read(np.resize(np.arange(len(val)), number)), preprocessing)
        samples = time_sessions(sessions, images, _TIMING)
        ratios = samples["float32"] / samples[precision]
        report["latency_ms"][str(number)] = {
            name: round(float(np.median(each)), 4) for name, each in samples.items()
        }
        low, high = bootstrap_interval(ratios, np.median, seed=0)
        faster = float(np.median(ratios))
        report["times_faster"][str(number)] = [round(each, 3) for each in (faster, low, high)]
        if faster < 1:
            objections.append(f"it takes {1 / faster:.2f} times as long at batch {number}")
    if precision == "int8":
        report["int8_products"] = count_int8(model)
    report["advice"] = None
    if objections:
        report["advice"] = f"{precision} is not worth it here: {', and '.join(objections)}"
    return report


def count_int8(model: onnx.ModelProto) -> int:
    """How many products of a file have both factors in 8 bits, between pairs of Q and DQ."""
    read = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    products = [node for node in model.graph.node if node.op_type in {"MatMul", "Gemm"}]
    return sum({*node.input[:2]} <= read for node in products)


def _quantized(path: Path, model: onnx.ModelProto, examples: Tensor, batch: int) -> onnx.ModelProto:
    """Products with a matrix of weights in int8, which has a scale per output.

    Ranges of activations are the smallest and largest values on the examples. The second product of
    an MLP stays float32: what it gets from the activation function is small but for a few values up
    to a hundred times as large, for which 256 steps are too coarse, and a linear fill multiplies
    it. So do products of activations with each other, or with one matrix per head, which are no
    faster in int8.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            # The last batch is filled up: images that come twice widen no range.
            filled = torch.arange(-(-len(examples) // batch) * batch) % len(examples)
            self.left = iter(examples[filled].split(batch))

        def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            images = next(self.left, None)
            return None if images is None else {INPUT_NAME: images.numpy()}

    matrices = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    maker = {name: node.op_type for node in model.graph.node for name in node.output}
    products = ["MatMul", "Gemm"]
    kept = [
        node.name
        for node in model.graph.node
        if node.op_type in products
        and (node.input[1] not in matrices or maker.get(node.input[0]) in _ACTIVATIONS)
    ]
    target = path.with_suffix(".int8")
    with without_warnings():
        quantize_static(
            path,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=products,
            nodes_to_exclude=kept,
        )
    made = onnx.load(target)
    target.unlink()
    if not count_int8(made):
        raise ModelError("int8 changed none of the model's products: use precision float32")
    return made
