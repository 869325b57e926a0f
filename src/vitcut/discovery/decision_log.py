"""``decisions.jsonl``: what became of every edge, stage by stage, so that a killed search goes on.

A first line names the search; then every stage has a line per edge and a line that ends it. A
stage without that line was cut short and is decided again. Deciding is left to ``acdc``.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcut.errors import ArtefactError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of one edge."""

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
    """The decisions on the edges into all targets of one block and kind, and what they took."""

    decisions: tuple[Decision, ...]
    precision: str
    """Of the fast path: ``float32`` or ``float64``."""
    node_evaluations: int
    """Sources recomputed."""
    oracle_calls: int
    """Full masked forwards over all pairs."""


class DecisionLog:
    """The log of one search; without a path it forgets everything."""

    def __init__(self, path: Path | None, identity: str) -> None:
        """Read the whole stages of an earlier process and cut off what follows them.

        Args:
            path: The file; made when the first stage is appended.
            identity: A hash of everything that decides the search.

        Raises:
            ArtefactError: The file logs another search, or is no decision log.
        """
        self._path = path
        self._header = {"format_version": FORMAT_VERSION, "search": identity}
        self.stages: list[Stage] = []
        if path is not None and path.exists():
            self._read(path)

    def require_edges(self, expected: Iterable[list[tuple[str, str]]]) -> None:
        """Refuse a log whose stages are not the first of the search, each of them once.

        Args:
            expected: Source and target names of every stage, in the order of the search.

        Raises:
            ArtefactError: They differ; two processes wrote the log, or it was altered.
        """
        stages = list(expected)
        found = [[(item.source, item.target) for item in stage.decisions] for stage in self.stages]
        if found != stages[: len(found)]:
            raise ArtefactError(
                f"{self._path} does not hold the stages of this search in their order (did two "
                "processes write it?): delete it"
            )

    def append(self, stage: Stage) -> None:
        """Write one stage."""
        self.stages.append(stage)
        if self._path is None:
            return
        end = {
            "stage_ends": True,
            "precision": stage.precision,
            "node_evaluations": stage.node_evaluations,
            "oracle_calls": stage.oracle_calls,
        }
        rows: list[dict[str, Any]] = [*(vars(item) for item in stage.decisions), end]
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            rows.insert(0, self._header)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def restart(self) -> None:
        """Forget every stage: the search begins again."""
        self.stages.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        whole, pending, size = 0, list[Decision](), 0
        for number, line in enumerate(_whole_lines(path)):
            size += len(line)
            row = _parse(line, path)
            if number == 0:
                self._check_header(row, path)
                whole = size
            elif "stage_ends" in row:
                self.stages.append(_stage(row, pending, path))
                whole, pending = size, []
            else:
                pending.append(_decision(row, path))
        if whole == 0:
            path.unlink()
            return
        with path.open("r+b") as stream:
            stream.truncate(whole)

    def _check_header(self, row: dict[str, Any], path: Path) -> None:
        version = row.get("format_version")
        if not isinstance(version, int):
            raise ArtefactError(f"{path} is not a decision log: delete it, or choose another --out")
        if version > FORMAT_VERSION:
            raise ArtefactError(
                f"{path} has format_version {version}, this vitcut reads up to {FORMAT_VERSION}: "
                "upgrade vitcut"
            )
        if row != self._header:
            raise ArtefactError(
                f"{path} logs another search: its model, images or settings differ from these; "
                "delete it, or choose another --out"
            )


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Lines up to the first one that a kill cut short."""
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        yield line


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        row = None
    if not isinstance(row, dict):
        raise ArtefactError(f"{path} is not a decision log: delete it, or choose another --out")
    return row


def _decision(row: dict[str, Any], path: Path) -> Decision:
    try:
        return Decision(**row)
    except TypeError as error:
        raise ArtefactError(f"{path} is damaged ({error}): delete it") from None


def _stage(row: dict[str, Any], decisions: list[Decision], path: Path) -> Stage:
    try:
        return Stage(
            decisions=tuple(decisions),
            precision=row["precision"],
            node_evaluations=row["node_evaluations"],
            oracle_calls=row["oracle_calls"],
        )
    except KeyError as error:
        raise ArtefactError(f"{path} is damaged (no {error}): delete it") from None
