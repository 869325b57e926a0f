"""The steps of a search: what each round left, as files and as a table.

Files of a run: ``path/NAME/circuit.json`` and ``path/NAME/step.json`` for each round, and
``path.json`` once the search is complete.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vitcut import store
from vitcut.errors import ArtefactError
from vitcut.progress import Terminal
from vitcut.results import require_inside
from vitcut.runs import CIRCUIT_FILE
from vitcut.settings import require_at_least, require_fraction, require_one_of, require_positive

_FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PathStep:
    """The model after one round of a selection, measured on val images."""

    name: str
    circuit: str
    """Path of the circuit, relative to the run directory."""
    macs: int
    macs_fraction: float
    """MACs as a fraction of the dense model's."""
    accuracy_coarse: float
    kl: float
    """Mean KL(dense || cut) on the task distribution, in nats."""
    heads_kept: int
    neurons_kept_fraction: float
    positions_kept_fraction: float = 1.0
    change_low: float | None = None
    """Lower end of the 95 % paired interval of the change in coarse accuracy, a fraction of 1."""
    change_high: float | None = None
    """Upper end of the same interval."""
    latency_fraction: float | None
    """Latency as a fraction of the dense model's, in the runtime and at the batch size of a latency
    budget; None where it is not measured."""

    def __post_init__(self) -> None:
        require_one_of("circuit", self.circuit, (f"path/{self.name}/{CIRCUIT_FILE}",))
        require_inside("circuit", self.circuit)
        for name in ("accuracy_coarse", "neurons_kept_fraction", "positions_kept_fraction"):
            require_fraction(name, getattr(self, name))
        for name in ("macs", "macs_fraction", "heads_kept"):
            require_at_least(name, getattr(self, name), 0)
        if self.latency_fraction is not None:
            require_positive("latency_fraction", self.latency_fraction)
        for change in (self.change_low, self.change_high):
            require_fraction("change", abs(change or 0.0))

    def save(self, path: Path) -> None:
        """Write the step atomically: its latency is measured once, and decides the next round."""
        store.save(path, self, version=_FORMAT_VERSION)

    @classmethod
    def load(cls, path: Path) -> "PathStep":
        """Read a step.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        return store.load(path, cls, kind="step", version=_FORMAT_VERSION)


@dataclass(frozen=True, kw_only=True)
class SearchPath:
    """The steps of a search that is complete, from the first round to the last."""

    steps: tuple[PathStep, ...]
    answers: tuple[str, ...] = ()
    """Names of the steps that meet the budget, one per target; the last step if there are none."""

    def __post_init__(self) -> None:
        if not self.steps:
            raise ArtefactError("it has no steps")
        names = [step.name for step in self.steps]
        for answer in self.answers:
            require_one_of("answers", answer, tuple(names))

    def save(self, path: Path) -> None:
        """Write ``path.json`` atomically."""
        store.save(path, self, version=_FORMAT_VERSION)

    @classmethod
    def load(cls, path: Path) -> "SearchPath":
        """Read ``path.json``.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        return store.load(path, cls, kind="path", version=_FORMAT_VERSION)


def print_path(steps: Sequence[PathStep]) -> None:
    """Print a table with one line per round."""
    timed = any(step.latency_fraction is not None for step in steps)
    table = Table(title="the path, on val images")
    table.add_column("point")
    headers = ("MACs", *(("latency",) if timed else ()), "coarse", "change", "KL", "heads")
    moved = any(step.positions_kept_fraction < 1 for step in steps)
    for header in (*headers, "neurons", *(["positions"] if moved else [])):
        table.add_column(header, justify="right")
    for step in steps:
        latency = "-" if step.latency_fraction is None else f"{step.latency_fraction:.1%}"
        table.add_row(
            step.name,
            f"{step.macs_fraction:.1%}",
            *((latency,) if timed else ()),
            f"{step.accuracy_coarse:.1%}",
            "-"
            if step.change_low is None or step.change_high is None
            else f"{100 * step.change_low:+.1f} to {100 * step.change_high:+.1f}",
            f"{step.kl:z.4f}",
            str(step.heads_kept),
            f"{step.neurons_kept_fraction:.1%}",
            *([f"{step.positions_kept_fraction:.1%}"] if moved else []),
        )
    timing = "MACs and latency as parts of the dense model's; " if timed else ""
    table.caption = f"{timing}change: of coarse accuracy, in points, 95 % paired interval"
    Terminal().print_table(table)
