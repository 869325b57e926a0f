"""The packages that only some commands need, by the extra of vitcut that installs them."""

from importlib.util import find_spec
from typing import Literal

from vitcut.errors import ConfigError

Extra = Literal["cut", "train", "onnx", "openvino", "executorch", "litert", "hf", "heif", "figures"]

EXTRAS: dict[Extra, tuple[str, ...]] = {
    "onnx": ("onnxruntime", "onnx", "onnxscript"),
    "cut": ("timm", "torchvision", "pyarrow", "onnxruntime", "onnx", "onnxscript"),
    "train": ("accelerate",),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "litert": ("litert_torch",),
    "hf": ("transformers",),
    "heif": ("pillow_heif",),
    "figures": ("matplotlib",),
}
"""The modules of each extra; ``train`` and ``cut`` are installed together."""


def missing_of(extra: Extra) -> list[str]:
    """The modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def require_extra(*extras: Extra, what: str) -> None:
    """Refuse work whose packages are not installed, before anything is computed.

    Args:
        *extras: What is needed.
        what: The work, for the message.

    Raises:
        ConfigError: A package is not installed.
    """
    for extra in extras:
        if missing := missing_of(extra):
            raise ConfigError(
                f"{what} needs {', '.join(missing)}, which vitcut alone does not install: "
                f'pip install "vitcut[{",".join(extras)}]"'
            )


def refusal(error: ModuleNotFoundError) -> ConfigError | None:
    """What to say of an import that failed, if an extra would have installed it."""
    module = (error.name or "").partition(".")[0]
    # pyarrow comes with `cut` alone; onnxruntime with less.
    extra = next((extra for extra, names in EXTRAS.items() if module in names), None)
    if extra is None:
        return None
    return ConfigError(
        f'this needs {module}, which is not installed: pip install "vitcut[{extra}]"'
    )
