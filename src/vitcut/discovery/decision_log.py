"""``decisions.jsonl``: the decision on every edge, so that a killed search can go on.

The first line names the search. Every stage then has one line per edge and a line that ends it. A
stage without that line was interrupted and is decided again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcut.errors import ArtefactError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision on one edge."""

    source: str
    target: str
    cut: bool
    increment: float | None
    """Rise of the mean KL in nats; None for an untested edge into a dead target."""
    kl: float
    """Mean KL of the circuit after this decision, in nats."""
    decided_by: str
    """``fast``, ``oracle`` or ``dead``."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The decisions on the edges into all targets of one block and role, and their cost."""

    decisions: tuple[Decision, ...]
    precision: str
    """Precision of the fast path: ``float32`` or ``float64``."""
    node_evaluations: int
    """Sources recomputed."""
    oracle_calls: int
    """Full masked forwards over all pairs."""


class DecisionLog:
    """The log of one search; without a path the stages are kept in memory alone."""

    def __init__(
        self, path: Path | None, identity: str, expected: list[list[tuple[str, str]]]
    ) -> None:
        """Read the complete stages of an earlier process and truncate the file behind them.

        Args:
            path: The file; created when the first stage is appended.
            identity: A hash of everything that decides the search.
            expected: Source and target names of the edges of every stage, in the search's order.

        Raises:
            ArtefactError: The file logs another search, or is not a decision log.
        """
        self._path = path
        self._header = {"format_version": FORMAT_VERSION, "search": identity}
        self.stages: list[Stage] = []
        if path is None or not path.exists():
            return
        self._read(path)
        found = [[(item.source, item.target) for item in stage.decisions] for stage in self.stages]
        if found != expected[: len(found)]:
            raise ArtefactError(
                f"{path} does not hold the stages of this search in their order (did two processes "
                "write it?): delete it"
            )

    def append(self, stage: Stage) -> None:
        """Write one stage."""
        self.stages.append(stage)
        if self._path is None:
            return
        rows: list[dict[str, Any]] = [dict(vars(item)) for item in stage.decisions]
        rows.append({"stage_ends": True, **vars(stage)})
        del rows[-1]["decisions"]
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            rows.insert(0, self._header)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def restart(self) -> None:
        """Forget every stage: the search starts over."""
        self.stages.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        complete, size, decisions = 0, 0, list[Decision]()
        not_a_log = f"{path} is not a decision log: delete it, or choose another --out"
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # A kill cut this line short.
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ArtefactError(not_a_log)
            size += len(line)
            if complete == 0:
                version = row.get("format_version")
                if not isinstance(version, int):
                    raise ArtefactError(not_a_log)
                if version > FORMAT_VERSION:
                    raise ArtefactError(
                        f"{path} has format_version {version}, this vitcut reads up to "
                        f"{FORMAT_VERSION}: upgrade vitcut"
                    )
                if row != self._header:
                    raise ArtefactError(
                        f"{path} logs another search, with another model, other images or other "
                        "settings: delete it, or choose another --out"
                    )
                complete = size
                continue
            try:
                if "stage_ends" in row:
                    del row["stage_ends"]
                    self.stages.append(Stage(decisions=tuple(decisions), **row))
                    complete, decisions = size, []
                else:
                    decisions.append(Decision(**row))
            except TypeError as error:
                raise ArtefactError(f"{path} is damaged ({error}): delete it") from None
        if complete == 0:
            path.unlink()
            return
        with path.open("r+b") as stream:
            stream.truncate(complete)
