"""The path to a budget: what the model came to after every round, as files and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vitcut.errors import ArtefactError
from vitcut.store import read_json, write_json

PATH_FILE, PATH_FOLDER, STEP_FILE = "path.json", "path", "step.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PathStep:
    """The model after one round of a selection; measured on the val images."""

    name: str
    circuit: str
    """Path of the circuit, relative to the run directory."""
    macs: int
    macs_fraction: float
    """Of the dense model's."""
    accuracy_coarse: float
    kl: float
    """Mean KL(dense || cut) on the task distribution, in nats."""
    heads_kept: int
    neurons_kept_fraction: float
    latency_fraction: float | None
    """Of the dense model's, in the runtime and at the batch size of a latency budget."""

    def save(self, path: Path) -> None:
        """Write it atomically: a latency is measured once, and decides what comes next."""
        write_json(path, {"format_version": _FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "PathStep":
        """Read what `save` wrote.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        content = read_json(path, kind="step", newest_version=_FORMAT_VERSION)
        del content["format_version"]
        return _step_from(content, path)


def save_path(steps: Sequence[PathStep], path: Path) -> None:
    """Write what every round came to; the file's presence says that the search is done."""
    write_json(path, {"format_version": _FORMAT_VERSION, "steps": [asdict(step) for step in steps]})


def load_path(path: Path) -> tuple[PathStep, ...]:
    """Read what `save_path` wrote.

    Raises:
        ArtefactError: The file is missing, damaged, or of a newer version.
    """
    content = read_json(path, kind="path", newest_version=_FORMAT_VERSION)
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise ArtefactError(f"{path} is damaged: it has no steps; delete it and run again")
    return tuple(_step_from(item, path) for item in steps)


def print_path(steps: Sequence[PathStep]) -> None:
    """One line per round, for a terminal."""
    timed = any(step.latency_fraction is not None for step in steps)
    table = Table(title="the path, on val images")
    table.add_column("point")
    headers = ("MACs", *(("latency",) if timed else ()), "coarse", "KL", "heads", "neurons")
    for header in headers:
        table.add_column(header, justify="right")
    for step in steps:
        latency = "-" if step.latency_fraction is None else f"{step.latency_fraction:.1%}"
        table.add_row(
            step.name,
            f"{step.macs_fraction:.1%}",
            *((latency,) if timed else ()),
            f"{step.accuracy_coarse:.1%}",
            f"{step.kl:z.4f}",
            str(step.heads_kept),
            f"{step.neurons_kept_fraction:.1%}",
        )
    table.caption = "MACs and latency as parts of the dense model's" if timed else None
    Console().print(table)


def _step_from(content: Any, path: Path) -> PathStep:
    try:
        return PathStep(**content)
    except TypeError as error:
        raise ArtefactError(f"{path} is damaged: {error}; delete it and run again") from None
