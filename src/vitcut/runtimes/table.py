"""Which runtimes there are, by name; loads none of them. What a runtime does stands in its file."""

from vitcut.errors import ConfigError
from vitcut.names import RuntimeName

RUNTIME_MODULES: dict[RuntimeName, str] = {
    "torch": "vitcut.runtimes.torch_eager",
    "torch-compile": "vitcut.runtimes.torch_compile",
    "onnxruntime": "vitcut.runtimes.onnx_runtime",
    "openvino": "vitcut.runtimes.open_vino",
}
"""The module of each runtime; it has ``prepare(module, examples, *, threads)``, which
gives one session per example."""


def require_runtime(name: str) -> None:
    """Refuse a runtime that this version cannot run.

    Raises:
        ConfigError: The runtime is not in the table.
    """
    if name not in RUNTIME_MODULES:
        raise ConfigError(f"runtime must be one of {', '.join(RUNTIME_MODULES)}, got {name!r}")
