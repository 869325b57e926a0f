"""Settings of exports. Loads no torch."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from vitcut.errors import ConfigError
from vitcut.names import Precision, TargetName
from vitcut.settings import require_bounds, require_one_of

OLDEST_OPSET, NEWEST_OPSET = 18, 23
_USUAL_OPSET = 20


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is written, and how."""

    to: tuple[TargetName, ...] = ("onnx",)
    """Targets: onnx, openvino, pt2, executorch, litert, transformers-js."""
    opset: int = _USUAL_OPSET
    """Version of ONNX's operations, 18 to 23. ONNX Runtime 1.17 reads 20; 23 needs 1.23."""
    batch: int | Literal["dynamic"] = "dynamic"
    """Images per call: a number, or dynamic for any."""
    with_preprocessing: bool = False
    """The ONNX file takes one uint8 picture of any size and gives the probabilities of the groups:
    scaling and normalising are part of it."""
    precision: Precision = "float32"
    """Of the ONNX file: float32, float16, or int8, which needs images."""

    def __post_init__(self) -> None:
        known = get_args(TargetName)
        if not self.to or len(set(self.to)) < len(self.to):
            listed = ", ".join(self.to) or "none"
            raise ConfigError(f"to must be one or more different targets, got {listed}")
        for name in self.to:
            if name not in known:
                near = get_close_matches(str(name), known, n=1, cutoff=0.5)
                meant = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(
                    f"to: no target {name!r}: {meant}expected one of {', '.join(known)}"
                )
        if not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            raise ConfigError(
                f"opset must be between {OLDEST_OPSET} and {NEWEST_OPSET}, got {self.opset}"
            )
        if self.batch != "dynamic":
            require_bounds("batch", self.batch)
        require_one_of("precision", self.precision, get_args(Precision))
        if self.with_preprocessing and self.precision != "float32":
            raise ConfigError(
                f"precision {self.precision} is for files that take normalised images, got it with "
                "with-preprocessing: leave one of them out"
            )
        if self.with_preprocessing and self.batch not in {"dynamic", 1}:
            raise ConfigError(
                "a file with preprocessing takes one picture of any size, got batch "
                f"{self.batch}: leave batch or with-preprocessing out"
            )
        if self.opset != _USUAL_OPSET and not {"onnx", "transformers-js"} & {*self.to}:
            raise ConfigError(
                f"opset is for onnx and transformers-js, got opset {self.opset} with "
                f"{', '.join(self.to)}: leave it out"
            )
        if self.batch != "dynamic" and "transformers-js" in self.to:
            raise ConfigError(
                f"a file for transformers-js takes any number of images, got batch {self.batch}: "
                "export it by itself without batch"
            )
        only_onnx = [name for name in self.to if name != "onnx"]
        for name, value, plain in (
            ("with-preprocessing", self.with_preprocessing, False),
            ("precision", self.precision, "float32"),
        ):
            if value != plain and only_onnx:
                raise ConfigError(
                    f"{name} is for onnx, got {name} {str(value).lower()} with "
                    f"{', '.join(only_onnx)}: export those by themselves without it"
                )
