"""Target litert: a program for LiteRT (TensorFlow Lite), as Android and many boards run it."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import litert_torch  # pyright: ignore[reportMissingImports]
import torch
from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

from vitcut.exports.settings import ExportSettings
from vitcut.exports.target import Subject, Written
from vitcut.runtimes.session import in_batches
from vitcut.shapes import Tensor

FILE = "model.tflite"
_USE = f"""from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter("{FILE}")
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
interpreter.invoke()
logits = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])"""


def write(subject: Subject, folder: Path, settings: ExportSettings) -> Written:
    """Write ``model.tflite``, which takes a fixed number of images: one unless told."""
    path, batch = folder / FILE, 1 if settings.batch == "dynamic" else settings.batch
    example = subject.examples[:1].repeat(batch, 1, 1, 1)
    with redirect_stdout(io.StringIO()):  # two lines for each of its steps
        litert_torch.convert(subject.module, (example,)).export(str(path))
    return Written(
        file=path,
        run=in_batches(load(path), batch),
        tools={name: version(name) for name in ("torch", "litert-torch", "ai-edge-litert")},
        needs=("ai-edge-litert",),
        use=_USE,
        details={"batch": batch},
    )


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs the file: as many normalised images as it takes to logits."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: Tensor) -> Tensor:
        interpreter.set_tensor(taken["index"], images.numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(given["index"]))

    return run
