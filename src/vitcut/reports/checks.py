"""What there is on this machine: versions, CPU, memory, devices, and which extras are usable."""

import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any

import psutil
from rich.table import Table

from vitcut.exports.target import EXTRA_OF
from vitcut.extras import missing_of
from vitcut.progress import Terminal
from vitcut.runtime import describe_machine

if TYPE_CHECKING:
    from vitcut.compiler.calibrate import Calibration

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+).*?(?:extra == ['\"](?P<extra>[\w-]+)['\"])?$")


@dataclass(frozen=True, kw_only=True)
class Checks:
    """A machine, as far as it matters to vitcut."""

    machine: dict[str, Any]
    """As `runtime.describe_machine` gives it."""
    memory_gib: tuple[float, float]
    """All, and what is free."""
    devices: tuple[str, ...]
    """Where torch can compute."""
    packages: dict[str, str | None]
    """The version of each package that vitcut or an extra needs; None if it is missing."""
    usable: dict[str, str | None]
    """Targets, runtimes and extras; what to install for those that are not usable, else None."""
    calibration: "Calibration | None" = None
    """What operations cost here; None unless it was measured."""


def check_machine(calibration: "Calibration | None" = None) -> Checks:
    """Look at the machine and at what is installed; only a calibration takes time."""
    import torch

    packages: dict[str, str | None] = {}
    lacking: dict[str, list[str]] = {}
    for line in requires("vitcut") or []:
        found = _REQUIREMENT.match(line)
        if found is None or found["name"] == "vitcut":
            continue
        try:
            packages[found["name"]] = version(found["name"])
        except PackageNotFoundError:
            packages[found["name"]] = None
        if found["extra"] is not None:
            missing = lacking.setdefault(found["extra"], [])
            missing += [] if packages[found["name"]] else [found["name"]]
    usable: dict[str, str | None] = {}
    for target, extra in EXTRA_OF.items():
        missing = [] if extra is None else missing_of(extra)
        usable[f"export --to {target}"] = _install(str(extra)) if missing else None
    compiler = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)
    usable["torch-compile"] = None if compiler else "a C++ compiler, such as g++"
    for extra, missing in sorted(lacking.items()):
        usable[f"extra {extra}"] = _install(extra) if missing else None
    memory = psutil.virtual_memory()
    gpus = [
        f"cuda:{number} {torch.cuda.get_device_name(number)}"
        for number in range(torch.cuda.device_count())
    ]
    return Checks(
        machine=describe_machine(),
        memory_gib=(round(memory.total / 2**30, 1), round(memory.available / 2**30, 1)),
        devices=("cpu", *gpus),
        packages=packages,
        usable=usable,
        calibration=calibration,
    )


def show_checks(found: Checks) -> None:
    """Print what there is on this machine, and how well latencies are predicted on it."""
    console, machine = Terminal(soft_wrap=True), found.machine
    own = machine["versions"]["vitcut"]
    console.print(f"vitcut {own}, Python {machine['python']}, {machine['system']}")
    console.print(
        f"CPU: {machine['cpu']}, {' '.join(machine['cpu_flags'])}; {machine['usable_cores']} of "
        f"{machine['cores']} cores allowed, load {machine['load_1min']}"
    )
    total, free = found.memory_gib
    console.print(f"memory: {total} GiB, {free} free")
    console.print(f"devices: {', '.join(found.devices)}")
    there = [f"{name} {number}" for name, number in sorted(found.packages.items()) if number]
    console.print(f"packages: {', '.join(there)}")
    table = Table()
    table.add_column("for")
    table.add_column("state")
    for name, needed in found.usable.items():
        table.add_row(name, "ready" if needed is None else f"needs {needed}")
    Terminal().print_table(table)
    if found.calibration is not None:
        fitted = found.calibration
        console.print(
            f"{fitted.models} compact models at batch 1 and 64, ONNX Runtime, one thread: latency "
            f"predicted within {fitted.error_after:.0%} (median of models not fitted to), by the "
            f"shipped costs within {fitted.error_before:.0%}"
        )


def _install(extra: str) -> str:
    return f"pip install 'vitcut[{extra}]'"
