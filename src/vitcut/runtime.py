"""The machine: device, seeds, threads, and a description to go with measured numbers."""

import os
import platform
import random
import re
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vitcut.errors import ConfigError
from vitcut.settings import require_bounds, usable_cores

if TYPE_CHECKING:
    import torch

_REPORTED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "asimd")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
_REPORTED_PACKAGES = ("vitcut", "torch", "timm", "onnxruntime", "onnx", "openvino", "numpy")


def choose_device(name: str) -> "torch.device":
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that exists here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device, found = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        here = ", ".join(["cpu", *(f"cuda:{number}" for number in range(found))])
        raise ConfigError(f"device {name!r} is not here: torch {torch.__version__} sees {here}")
    if device.type == "cuda":
        # cuDNN would round the patches to TF32: a compact model equals its masked one to 1e-4.
        torch.backends.cudnn.allow_tf32 = False
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, numpy's global generator (timm's Mixup draws from it) and torch."""
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def choose_precision(device: "torch.device") -> tuple[Literal["float32", "bfloat16"], str]:
    """The precision in which this machine trains fastest, and why.

    A CPU without instructions for bfloat16 computes in it, but at a fraction of its float32 speed.
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", f"{name} computes in it"
        return "float32", f"{name} has no bfloat16"
    found = sorted(_BFLOAT16_FLAGS & _cpu_flags(_read_cpu()))
    if found:
        return "bfloat16", f"this CPU has {found[0]}"
    return "float32", f"this CPU has none of {', '.join(sorted(_BFLOAT16_FLAGS))}"


def usable_threads() -> int:
    """Threads to compute with: one per usable core, or fewer where OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(usable_cores(), int(asked)) if asked.isdecimal() and int(asked) else usable_cores()


def set_threads(threads: int | None) -> None:
    """Limit torch to ``threads`` CPU threads; None leaves torch's own choice."""
    if threads is None:
        return
    import torch

    require_bounds("threads", threads)
    torch.set_num_threads(threads)


def describe_machine() -> dict[str, Any]:
    """What a measured number depends on: CPU, flags, cores, load, GPU, versions, the day."""
    import torch

    cpu = _read_cpu()
    flags = _cpu_flags(cpu)
    versions: dict[str, str | None] = dict.fromkeys(_REPORTED_PACKAGES)
    for name in versions:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": [flag for flag in _REPORTED_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _read_cpu() -> dict[str, str]:
    """What Linux says of the CPU; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    # One block of lines per core: the first speaks for all.
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    rows = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in rows}


def _cpu_flags(cpu: dict[str, str]) -> set[str]:
    """Instruction sets; x86 calls them flags, ARM Features."""
    return set(cpu.get("flags", cpu.get("Features", "")).split())
