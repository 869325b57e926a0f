"""Reading what other libraries wrote: their errors in one line, and weights that do not fit."""

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vitcut.errors import ModelError, one_line, shortage

LOAD_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, ImportError, SafetensorError,
)  # fmt: skip
"""What libraries raise for damaged files, and for settings or weights that do not fit. The Hub's
errors are OSErrors."""
_SHOWN = 3
"""How many names a message lists."""


@contextmanager
def told_as(problem: str) -> Generator[None]:
    """Turn a library's error into a `ModelError` of one line: the problem, and the reason."""
    try:
        yield
    except LOAD_ERRORS as error:
        if shortage(error):
            raise
        raise ModelError(f"{problem}: {one_line(error)}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings by name.

    Raises:
        ModelError: The file cannot be read, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, expected settings by name")
    return config


def listed(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def told_misfits(
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]],
) -> str:
    """How many weights do not fit a model, and the first few of each kind; empty if all do.

    Args:
        missing: Names that only the model has.
        unexpected: Names that only the weights have.
        mismatched: Name, shape in the weights and shape in the model, where those differ.
    """
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": (
            f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in mismatched
        ),
    }
    # The classifier first, then what is nested least: of a whole model, those tell most.
    found = {
        kind: sorted(
            names,
            key=lambda name: (not name.startswith(("head", "classifier")), name.count("."), name),
        )
        for kind, names in kinds.items()
    }
    return "; ".join(
        f"{len(names)} {kind} ({listed(names)})" for kind, names in found.items() if names
    )
