"""Settings: checks that several stages share, and a hash that names a configuration."""

import json
import math
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from vitcut.errors import ConfigError
from vitcut.extras import require_extra
from vitcut.names import RuntimeName
from vitcut.store import sha256_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def usable_cores() -> int:
    """CPU cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_CORES = usable_cores()
_BOUNDS = {
    "seed": (0, 2**32 - 1, "what numpy takes"),
    "threads": (1, _CORES, "the cores that this process may use"),
    "workers": (0, _CORES, "the cores that this process may use"),
    "image_size": (8, 8192, "pixels per side"),
    "patch_size": (1, 8192, "pixels per side"),
    "max_shift_px": (0, 8192, "pixels"),
    "batch": (1, 2**16, "images that a model gets at once"),
    "batch_size": (1, 2**16, "images that a model gets at once"),
    "width": (1, 2**14, "of the residual stream"),
    "depth": (1, 1000, "blocks"),
    "num_heads": (1, 2**14, "heads per block"),
    "mlp_ratio": (0, 100, "times the width"),
    "port": (0, 2**16 - 1, "0 finds a free one"),
    "pictures": (0, 1000, "of each class at first"),
}
"""Least and most of the counts that settings share, and what the most is."""


def require_positive(name: str, value: float) -> None:
    """Refuse zero, negative numbers, NaN and infinity."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a finite number > 0, got {value}")


def require_at_least(name: str, value: float, least: float) -> None:
    """Refuse numbers below ``least``, and NaN."""
    if not value >= least:
        raise ConfigError(f"{name} must be >= {least}, got {value}")


def require_bounds(name: str, value: float) -> None:
    """Refuse a count that this machine, or a library that it is given to, cannot take."""
    least, most, why = _BOUNDS[name]
    if not least <= value <= most:
        raise ConfigError(f"{name} must be between {least} and {most} ({why}), got {value}")


def require_here(*settings: "DataclassInstance | None") -> None:
    """Refuse more threads or workers than this process may use, and runtimes that are missing.

    Settings themselves may hold them: those of a run may be read on a smaller machine.
    """
    for own in settings:
        if "openvino" in getattr(own, "runtimes", ()):
            require_extra("openvino", what="runtime openvino")
        for name in ("threads", "workers"):
            if (asked := getattr(own, name, None)) is not None:
                require_bounds(name, asked)


def require_fraction(name: str, value: float) -> None:
    """Refuse numbers outside 0 to 1, and NaN."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value}")


def require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse what is not in a closed set of words."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def require_utf8(name: str, path: object) -> None:
    """Refuse a path whose bytes are not UTF-8: safetensors cannot open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} must be a path in UTF-8, got {str(path)!a}: rename it") from None


def require_runtime(name: str) -> None:
    """Refuse a runtime that this version cannot run."""
    require_one_of("runtime", name, get_args(RuntimeName))


def require_memory(what: str, *, needed_gib: float, memory_gib: float) -> None:
    """Refuse work that would take the process beyond the memory that is allowed.

    Args:
        what: The work, for the message.
        needed_gib: What it takes beyond what the process holds now, in GiB.
        memory_gib: The most resident memory that the process may have, in GiB.

    Raises:
        ConfigError: It would take more.
    """
    import psutil

    held_gib = psutil.Process().memory_info().rss / 2**30
    if held_gib + needed_gib > memory_gib:
        # Rounded up, so that it is more than what is allowed; below 1 GiB, two significant digits.
        whole = held_gib + needed_gib
        needed = f"{math.ceil(10 * whole) / 10:,.1f}" if whole >= 1 else f"{whole:.2g}"
        raise ConfigError(
            f"{what} needs about {needed} GiB, {held_gib:.1f} of them for what is loaded already; "
            f"memory-gib allows {memory_gib:g}: use fewer images, or raise memory-gib"
        )


def as_plain(settings: "DataclassInstance") -> dict[str, Any]:
    """A dataclass as JSON values; tuples become lists."""
    return json.loads(json.dumps(asdict(settings)))


def config_hash(*parts: Any) -> str:
    """A short name of a configuration: equal settings, equal hash."""
    return sha256_json(parts)[:16]
