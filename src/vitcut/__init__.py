"""vitcut's public names, loaded when they are first used: importing vitcut loads no torch."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitcut.api import (
        bench,
        checks,
        cut,
        discover,
        evaluate,
        finetune,
        info,
    )
    from vitcut.benchmark.settings import BenchSettings
    from vitcut.circuit import Circuit
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.settings import CutSettings
    from vitcut.delivery import export
    from vitcut.discovery.settings import DiscoverSettings
    from vitcut.errors import VitcutError
    from vitcut.exports.settings import ExportSettings
    from vitcut.inputs import load_images, load_model
    from vitcut.model.adapters import register_adapter
    from vitcut.model.settings import VitSettings
    from vitcut.prediction import predict
    from vitcut.preparation import label, prepare, suggest
    from vitcut.recipes import RunSettings, demo, run, train
    from vitcut.selection.settings import Budget
    from vitcut.task import Task, load_task
    from vitcut.training.settings import FinetuneSettings, TrainSettings, TransferSettings
    from vitcut.viewing import report, show

    __version__: str

_HOMES = {
    "BenchSettings": "benchmark.settings",
    "Budget": "selection.settings",
    "Circuit": "circuit",
    "CompactViT": "compact.model",
    "CutSettings": "compiler.settings",
    "DiscoverSettings": "discovery.settings",
    "ExportSettings": "exports.settings",
    "FinetuneSettings": "training.settings",
    "RunSettings": "recipes",
    "Task": "task",
    "TrainSettings": "training.settings",
    "TransferSettings": "training.settings",
    "VitSettings": "model.settings",
    "VitcutError": "errors",
    "bench": "api",
    "checks": "api",
    "cut": "api",
    "demo": "recipes",
    "discover": "api",
    "evaluate": "api",
    "export": "delivery",
    "finetune": "api",
    "info": "api",
    "label": "preparation",
    "load_images": "inputs",
    "load_model": "inputs",
    "load_task": "task",
    "predict": "prediction",
    "prepare": "preparation",
    "register_adapter": "model.adapters",
    "report": "viewing",
    "run": "recipes",
    "show": "viewing",
    "suggest": "preparation",
    "train": "recipes",
}
"""The module that each public name lives in."""

__all__ = [
    "BenchSettings",
    "Budget",
    "Circuit",
    "CompactViT",
    "CutSettings",
    "DiscoverSettings",
    "ExportSettings",
    "FinetuneSettings",
    "RunSettings",
    "Task",
    "TrainSettings",
    "TransferSettings",
    "VitSettings",
    "VitcutError",
    "__version__",
    "bench",
    "checks",
    "cut",
    "demo",
    "discover",
    "evaluate",
    "export",
    "finetune",
    "info",
    "label",
    "load_images",
    "load_model",
    "load_task",
    "predict",
    "prepare",
    "register_adapter",
    "report",
    "run",
    "show",
    "suggest",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("vitcut")
    if name not in _HOMES:
        raise AttributeError(f"module 'vitcut' has no attribute {name!r}")
    return getattr(import_module(f"vitcut.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
