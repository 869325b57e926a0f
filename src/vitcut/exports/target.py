"""What a target gets and gives back, and where each target is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitcut.compact.info import ModelInfo
from vitcut.extras import Extra
from vitcut.images.load import Images
from vitcut.names import TargetName
from vitcut.shapes import Float, Tensor, UInt8


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is exported."""

    module: nn.Module
    """Normalised images to logits: a frozen copy on the CPU, in evaluation mode."""
    info: ModelInfo
    """Preprocessing, classes and groups; all of them are there."""
    examples: Float[Tensor, "images channels y x"]
    """Two normalised images or more."""
    pixels: UInt8[Tensor, "images y x channels"]
    """The same images as they were before they were normalised."""
    images: Images | None = None
    """Where they come from; None if they are random."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """What a target has made."""

    file: Path
    """The file that a runtime opens, inside the folder."""
    run: Callable[[Tensor], Tensor] | None
    """Normalised images to logits, computed by the target's runtime from the file on disk; None for
    a file that gives no logits, which has ``parity``."""
    tools: dict[str, str]
    """Versions of the packages that made and ran it, by name."""
    needs: tuple[str, ...]
    """What to install where the file is used, besides numpy and pillow."""
    use: str
    """For the README: Python lines that make the array ``logits`` from the array ``images``, with
    the file beside the script; or a whole Markdown section, if it begins with a code fence."""
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    """More for export.json, such as the opset."""
    parity: dict[str, Any] | None = None
    """What it has compared itself."""
    exact: bool = True
    """Whether its logits must equal torch's up to the rounding of float32."""


TARGETS: dict[TargetName, str] = {
    "onnx": "vitcut.exports.onnx_file",
    "openvino": "vitcut.exports.openvino_file",
    "pt2": "vitcut.exports.pt2_file",
    "executorch": "vitcut.exports.executorch_file",
    "litert": "vitcut.exports.litert_file",
    "transformers-js": "vitcut.exports.transformers_js",
}
"""The module of each target. Its ``write(subject, folder, settings)`` fills a folder and gives a
`Written`."""

EXTRA_OF: dict[TargetName, Extra | None] = {
    "onnx": "onnx",
    "openvino": "openvino",
    "pt2": None,
    "executorch": "executorch",
    "litert": "litert",
    "transformers-js": "onnx",
}
"""What installs the packages that a target needs besides torch."""
