"""vitcut's public names, loaded when they are first used: importing vitcut loads no torch.

What the names do is left to their files.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitcut.circuit import Circuit
    from vitcut.compact.model import CompactViT
    from vitcut.errors import VitcutError
    from vitcut.model.adapters import register_adapter
    from vitcut.pipeline.api import cut, discover, evaluate, finetune, load_images, load_model
    from vitcut.task import Task, load_task

    __version__: str

__all__ = [
    "Circuit",
    "CompactViT",
    "Task",
    "VitcutError",
    "__version__",
    "cut",
    "discover",
    "evaluate",
    "finetune",
    "load_images",
    "load_model",
    "load_task",
    "register_adapter",
]

_HOMES = {
    "Circuit": "vitcut.circuit",
    "CompactViT": "vitcut.compact.model",
    "Task": "vitcut.task",
    "VitcutError": "vitcut.errors",
    "cut": "vitcut.pipeline.api",
    "discover": "vitcut.pipeline.api",
    "evaluate": "vitcut.pipeline.api",
    "finetune": "vitcut.pipeline.api",
    "load_images": "vitcut.pipeline.api",
    "load_model": "vitcut.pipeline.api",
    "load_task": "vitcut.task",
    "register_adapter": "vitcut.model.adapters",
}
"""The module that each public name lives in."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("vitcut")
    if name not in _HOMES:
        raise AttributeError(f"module 'vitcut' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
