"""``decisions.jsonl``: the decision on every edge, so that a killed search can go on.

The first line names the search. Every stage then has one line per edge and a line that ends it,
with a hash of everything before. A stage without that line was interrupted and is decided again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcut.errors import ArtefactError, ConfigError
from vitcut.store import convert

FORMAT_VERSION = 2


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

    def __post_init__(self) -> None:
        if self.decided_by not in {"fast", "oracle", "dead"}:
            raise ConfigError(f"decided_by is {self.decided_by!r}")


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
        self, path: Path | None, identity: str | None, expected: list[list[tuple[str, str]]]
    ) -> None:
        """Read the complete stages of an earlier process and truncate the file behind them.

        Args:
            path: The file; created when the first stage is appended.
            identity: A hash of everything that decides the search; None reads that of any.
            expected: Source and target names of the edges of every stage, in the search's order.

        Raises:
            ArtefactError: The file logs another search, or is not a decision log.
        """
        self._path = path
        self._header = {"format_version": FORMAT_VERSION, "search": identity}
        self.stages: list[Stage] = []
        self._digest = hashlib.sha256()
        """Of all lines of complete stages, each stage's last line without its hash."""
        if path is None or not path.exists():
            return
        complete = self._read(path)
        if complete == 0:
            path.unlink()
            return
        with path.open("r+b") as stream:
            stream.truncate(complete)
        found = [[(item.source, item.target) for item in stage.decisions] for stage in self.stages]
        if found != expected[: len(found)]:
            raise ArtefactError(
                f"{path} does not hold the stages of this search in their order (did two processes "
                "write it?): delete it"
            )

    @classmethod
    def read_increments(cls, path: Path) -> dict[tuple[str, str], float]:
        """The rise of the mean KL in nats for each tested edge, by source and target name.

        Raises:
            ArtefactError: The file is damaged, or not a decision log.
        """
        log = cls(None, None, [])
        log._read(path)
        decisions = (item for stage in log.stages for item in stage.decisions)
        return {(d.source, d.target): d.increment for d in decisions if d.increment is not None}

    def append(self, stage: Stage) -> None:
        """Write one stage."""
        self.stages.append(stage)
        if self._path is None:
            return
        rows: list[dict[str, Any]] = [dict(vars(item)) for item in stage.decisions]
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            rows.insert(0, self._header)
        end = {"stage_ends": True, **vars(stage)}
        del end["decisions"]
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in [*rows, end])
        self._digest.update(text.encode())
        lines = text.splitlines(keepends=True)
        lines[-1] = json.dumps({**end, "sha256": self._digest.hexdigest()}) + "\n"
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(lines)

    def restart(self) -> None:
        """Forget every stage: the search starts over."""
        self.stages.clear()
        self._digest = hashlib.sha256()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> int:
        """Read the complete stages; returns how many bytes they are."""
        complete, size, decisions, pending = 0, 0, list[Decision](), b""
        not_a_log = f"{path} is not a decision log: delete it, or choose another --out"
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # A kill cut this line short.
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
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
                if self._header["search"] is not None and row != self._header:
                    raise ArtefactError(
                        f"{path} logs another search, with another model, other images or other "
                        "settings: delete it, or choose another --out"
                    )
                complete = size
                self._digest.update(line)
                continue
            what, remedy = f"{path} is damaged", "delete it"
            if "stage_ends" not in row:
                decisions.append(convert(row, Decision, what=what, remedy=remedy))
                pending += line
                continue
            written = row.pop("sha256", None)
            self._digest.update(pending + (json.dumps(row) + "\n").encode())
            if written != self._digest.hexdigest():
                raise ArtefactError(f"{path} was altered: its hashes are not its own; delete it")
            del row["stage_ends"]
            listed = [vars(item) for item in decisions]
            stage = convert({"decisions": listed, **row}, Stage, what=what, remedy=remedy)
            self.stages.append(stage)
            complete, decisions, pending = size, [], b""
        return complete
