"""Target onnx: one file for ONNX Runtime, with its preprocessing in it or without."""

import io
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image

from vitcut.compact.info import NOTE
from vitcut.errors import ExactnessError
from vitcut.exports.pictures import PictureModel
from vitcut.exports.settings import ExportSettings
from vitcut.exports.target import Subject, Written
from vitcut.images.decoding import decode
from vitcut.images.load import normalise
from vitcut.runtimes.onnx_runtime import (
    INPUT_NAME,
    OUTPUT_NAME,
    export_onnx,
    load_session,
    write_graph,
)
from vitcut.runtimes.session import in_batches
from vitcut.shapes import Tensor
from vitcut.store import UNSEALED, seal_file

FILE = "model.onnx"
PICTURES_NAME, PROBABILITIES_NAME = "pictures", "probabilities"
_FARTHEST = 0.05
"""Between probabilities from the file and from Pillow: much more than rounding makes."""

_USE = f"""import onnxruntime

session = onnxruntime.InferenceSession("{FILE}", providers=["CPUExecutionProvider"])
(logits,) = session.run(["{OUTPUT_NAME}"], {{"{INPUT_NAME}": images}})"""
_USE_PICTURES = f"""    pip install numpy pillow onnxruntime

```python
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

picture = Image.open("picture.jpg")
picture = np.asarray(TURNED.convert("RGB"))[None]
session = onnxruntime.InferenceSession("{FILE}", providers=["CPUExecutionProvider"])
(probabilities,) = session.run(["{PROBABILITIES_NAME}"], {{"{PICTURES_NAME}": picture}})

about = json.load(open("export.json", encoding="utf-8"))
names = about["group_names"] or about["class_names"]
for at in probabilities[0].argsort()[::-1][:3]:
    print(f"{{probabilities[0][at]:.1%}} {{names[at]}}")
```
"""


def write(subject: Subject, folder: Path, settings: ExportSettings) -> Written:
    """Write ``model.onnx``, with what a user of it must know in its metadata.

    Raises:
        ExactnessError: ONNX Runtime computes something else than torch.
    """
    path, batch = folder / FILE, None if settings.batch == "dynamic" else settings.batch
    whole = settings.with_preprocessing
    noted = {NOTE: subject.info.note(with_preprocessing=whole, sha256=UNSEALED)}
    parity: dict[str, Any] | None = None
    use, report = _USE, dict[str, Any]()
    if whole:
        parity, batch = write_pictures(subject, path, settings, noted), 1
        taken = subject.info.preprocessing
        turned = taken is not None and taken.framing.orientation == "apply"
        use = _USE_PICTURES.replace(
            "TURNED", "ImageOps.exif_transpose(picture)" if turned else "picture"
        ).replace(", ImageOps" if not turned else "\0", "")
        run = None
    else:
        export_onnx(
            subject.module,
            path,
            example=subject.examples,
            opset=settings.opset,
            batch=batch,
            metadata=noted,
        )
        if settings.precision != "float32":
            from vitcut.exports.precision import reduce

            report = reduce(path, subject, settings.precision, batch=batch)
        run = load_run(path, batch)
    onnx.checker.check_model(path)
    seal_file(path)
    return Written(
        file=path,
        run=run,
        parity=parity,
        exact=settings.precision == "float32",
        tools={name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        needs=("onnxruntime",),
        use=use,
        details={
            "batch": batch or "dynamic",
            "opset": settings.opset,
            "ir_version": onnx.load(path).ir_version,
            "with_preprocessing": whole,
            **({"beside_float32": report} if report else {}),
        },
    )


def load_run(path: Path, batch: int | None) -> Callable[[Tensor], Tensor]:
    """Normalised images to logits, by ONNX Runtime on one thread."""
    run = load_session(path, batch=batch or 1, threads=1).run
    return run if batch is None else in_batches(run, batch)


def write_pictures(
    subject: Subject, path: Path, settings: ExportSettings, noted: dict[str, str]
) -> dict[str, Any]:
    """Write a file that takes pictures as bytes, and compare it with Pillow's preprocessing.

    Raises:
        ExactnessError: Its probabilities are not those of Pillow's preprocessing and torch.
    """
    model = PictureModel(subject.module, subject.info).eval()
    write_graph(
        model,
        path,
        # Two lengths that differ, or they would be taken for one.
        example=torch.zeros(1, 70, 90, 3, dtype=torch.uint8),
        names=(PICTURES_NAME, PROBABILITIES_NAME),
        dynamic={1: "height", 2: "width"},
        opset=settings.opset,
        metadata=noted,
    )
    run = load_pictures_run(path)
    return compare_pictures(lambda picture: run(picture[None]), model, subject)


def load_pictures_run(path: Path) -> Callable[[NDArray[Any]], Tensor]:
    """What an ONNX file of one input and one output computes of it, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    return lambda pictures: torch.from_numpy(session.run(None, {taken.name: pictures})[0])


def compare_pictures(
    run: Callable[[NDArray[np.uint8]], Tensor], model: PictureModel, subject: Subject
) -> dict[str, Any]:
    """How far probabilities of pictures are from those with Pillow's preprocessing.

    Args:
        run: A picture, height x width x 3, to probabilities, shape [1, groups], by the file.
        model: What the file was written from.
        subject: What was exported; its pixels are made into pictures of several shapes.

    Raises:
        ExactnessError: They are too far.
    """
    taken = model.preprocessing
    shown = _pictures(subject.pixels.numpy())
    farthest, farthest_pixel, equal = 0.0, 0.0, 0
    with torch.inference_mode():
        for picture in shown:
            own = torch.from_numpy(picture[None])
            got = run(picture)
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            seen = decode(file.getvalue(), taken.image_size, taken.framing).pixels
            difference = model.scaled(own)[0].permute(1, 2, 0) - torch.from_numpy(seen.copy())
            expected = subject.module(normalise(seen[None], taken)).softmax(-1)
            expected = expected if model.groups is None else expected @ model.groups
            farthest_pixel = max(farthest_pixel, float(difference.abs().max()))
            farthest = max(farthest, float((got - expected).abs().max()))
            equal += int(got.argmax() == expected.argmax())
    if not farthest <= _FARTHEST:
        raise ExactnessError(
            f"probabilities of the file differ from those with Pillow's preprocessing by up to "
            f"{farthest:.2g}, expected at most {_FARTHEST}: export without with-preprocessing"
        )
    return {
        "of": "probabilities, against Pillow's preprocessing and torch",
        "images": len(shown),
        "max_abs_diff": farthest,
        "max_pixel_diff": farthest_pixel,
        "labels_equal": equal,
    }


def _pictures(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Pictures of several shapes, made of square ones: alone, side by side, and in a column."""
    most = 4
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, -1)
    wide = [np.concatenate([one, other], 1) for one, other in pairwise(pixels)]
    tall = [np.concatenate([one, other], 0) for one, other in pairwise(pixels)]
    return [*pixels[:most], *wide[:most], *tall[:most]]
