"""Target transformers-js: a folder that Transformers.js classifies pictures with in a browser."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitcut.compact.info import NOTE, ModelInfo
from vitcut.exports.onnx_file import compare_pictures, load_pictures_run
from vitcut.exports.pictures import PictureModel
from vitcut.exports.settings import ExportSettings
from vitcut.exports.target import Subject, Written
from vitcut.runtimes.onnx_runtime import OUTPUT_NAME, write_graph
from vitcut.shapes import Float, Tensor
from vitcut.store import write_json

FILE = "onnx/model.onnx"
INPUT_NAME = "pixel_values"
_LEAST = 1e-30
"""Probabilities below are taken for this, whose logarithm is a number."""

_USE = """```html
<!doctype html>
<script type="module">
  // Copies of the package's files, from: npm install --ignore-scripts @huggingface/transformers
  import { env, pipeline } from "/node_modules/@huggingface/transformers/dist/transformers.min.js";
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "/";
  env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
  const classify = await pipeline("image-classification", "transformers-js");
  document.body.append(JSON.stringify(await classify("/picture.jpg")));
</script>
```

Save this as `index.html` beside this folder, which must be called `transformers-js`, with a
`picture.jpg`, and open it from a server (`python -m http.server --bind 127.0.0.1`), since browsers
load no modules from files.

The answers are groups: `logits` are the logarithms of their probabilities. `pixel_values` are the
bytes of a picture of any size, from 0 to 255. Browsers scale pictures in their own way, so
cropping, scaling and normalising are part of the file, and `preprocessor_config.json` turns them
off. Browsers turn pictures as their EXIF entry says.
"""


class PixelLogits(nn.Module):
    """A picture model with the input and output that transformers' libraries expect."""

    def __init__(self, model: PictureModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "images 3 y x"]) -> Float[Tensor, "images groups"]:
        """Logarithms of the groups' probabilities: a softmax gives these."""
        return self.model(pixels.permute(0, 2, 3, 1)).clamp(min=_LEAST).log()


def write(subject: Subject, folder: Path, settings: ExportSettings) -> Written:
    """Write the model, and the two files of settings that transformers' libraries read.

    A canvas, with which Transformers.js scales pictures, does not smooth as Pillow does: of 200
    pictures of cats and dogs, a model of vit_tiny's size gave 4 another label after it. So the
    file takes pictures as they are.

    Raises:
        ExactnessError: Its probabilities are not those of Pillow's preprocessing and torch.
    """
    path = folder / FILE
    path.parent.mkdir()
    # ONNX Runtime's build for browsers has no casts to float64.
    model = PictureModel(subject.module, subject.info, places=torch.float32).eval()
    write_graph(
        PixelLogits(model).eval(),
        path,
        # Lengths that differ, or they would be taken for one.
        example=torch.zeros(2, 3, 70, 90),
        names=(INPUT_NAME, OUTPUT_NAME),
        dynamic={0: "batch", 2: "height", 3: "width"},
        opset=settings.opset,
        metadata={NOTE: subject.info.note(with_preprocessing=True)},
    )
    write_json(folder / "config.json", config(subject.info, model.preprocessing.image_size))
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR)
    run = load_pictures_run(path)

    def probabilities(picture: NDArray[np.uint8]) -> Tensor:
        return run(picture.transpose(2, 0, 1)[None].astype(np.float32)).exp()

    return Written(
        file=path,
        run=None,
        parity=compare_pictures(probabilities, model, subject),
        tools={name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        needs=(),
        use=_USE,
        details={"batch": "dynamic", "opset": settings.opset},
    )


def config(info: ModelInfo, image_size: int) -> dict[str, Any]:
    """``config.json`` of a ViT of transformers whose labels are the groups."""
    names = info.group_names if info.group_of_class else info.class_names
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": image_size,
        "num_channels": 3,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        # Without it, Transformers.js looks for a file in int8.
        "transformers.js_config": {"dtype": "fp32", "device": "wasm"},
    }


_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": True,
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False),
}
"""Bytes as they are; transformers' libraries would do it all unless told otherwise."""
