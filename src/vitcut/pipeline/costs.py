"""The costs that plans are chosen by on this machine: calibrated here, or those that are shipped.

Measuring them is left to ``checks``.
"""

import math
from functools import cache
from pathlib import Path
from typing import get_args

from vitcut.compiler.cost import CostModel, Unit
from vitcut.errors import ArtefactError
from vitcut.progress import say
from vitcut.runtime import describe_machine
from vitcut.store import cache_dir, read_json, write_json

_VERSION = 1


def costs_path() -> Path:
    """Where ``vitcut checks`` keeps what it measured."""
    return cache_dir() / "costs.json"


def cost_model(batch: int) -> CostModel:
    """The cost model of this machine for a batch size.

    Raises:
        ArtefactError: The calibration's file is damaged, or of a newer version.
    """
    path = costs_path()
    if not path.exists():
        return CostModel(batch=batch)
    content = read_json(path, kind="calibration", newest_version=_VERSION)
    if content.get("machine") != _machine():
        _say_foreign(path)
        return CostModel(batch=batch)
    nanoseconds = content.get("nanoseconds", {})
    numbers = [value for value in nanoseconds.values() if isinstance(value, float | int)]
    sound = set(nanoseconds) == set(get_args(Unit)) and len(numbers) == len(nanoseconds)
    if not sound or not all(0 < value < math.inf for value in numbers):
        raise ArtefactError(f"{path} is no calibration: delete it, or run `vitcut checks`")
    return CostModel(nanoseconds=nanoseconds, batch=batch, origin="calibrated")


def save_costs(costs: CostModel) -> None:
    """Keep costs that were measured here."""
    content = {"machine": _machine(), "nanoseconds": costs.nanoseconds}
    write_json(costs_path(), {"format_version": _VERSION, **content})


def _machine() -> dict[str, str]:
    """What costs depend on; those of another machine or version are not used."""
    machine = describe_machine()
    return {
        "cpu": f"{machine['cpu']}, {' '.join(machine['cpu_flags'])}",
        "onnxruntime": str(machine["versions"]["onnxruntime"]),
    }


@cache
def _say_foreign(path: Path) -> None:
    """Once per process."""
    say(f"{path} was measured on another machine or version: run `vitcut checks` for new costs")
