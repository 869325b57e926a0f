"""Results as tables, for terminals and for Markdown."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.table import Table

from vitcut.errors import plain_markdown, printable
from vitcut.names import RuntimeName
from vitcut.progress import Terminal
from vitcut.results import CLASS_ONLY, DENSE, DENSE_REPAIRED, Point, Results

if TYPE_CHECKING:
    from vitcut.selection.steps import PathStep

_ABSENT = "-"
_PREFERRED: RuntimeName = "onnxruntime"
_PART = "part"
"""The granularity of circuits that cut heads and neurons."""
NO_LOSS = 0.01
"""A loss of coarse accuracy below which a cut counts as lossless: one point."""
_FRAME = 3
"""Characters around each cell: a line and two spaces."""
_FILE_WIDTH = 320
"""Characters per line where there is no terminal to fit into."""


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """Text cells, one row per point."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def point_table(results: Results, *, runtime: RuntimeName | None = None) -> PointTable:
    """The points of a run, the dense model first, with every latency measured in one runtime.

    A speed-up is given with its 95 % interval; one in brackets is not shown to differ from 1.
    A column that says nothing of any point is left out.

    Args:
        results: What was measured.
        runtime: Whose latencies are shown; None takes onnxruntime if it was measured, else the
            first that was.
    """
    points = results.all_points()
    measured = [item for point in points for item in point.latency]
    if runtime is None:
        runtimes: list[RuntimeName] = [item.runtime for item in measured]
        runtime = _PREFERRED if _PREFERRED in runtimes or not runtimes else runtimes[0]

    def edges_cut(point: Point) -> str:
        # Where parts are cut, edges only follow.
        if point.edges_total is None or point.edges_kept is None or point.granularity == _PART:
            return _ABSENT
        return _percent(1 - point.edges_kept / point.edges_total)

    def milliseconds(point: Point, batch: int) -> str:
        latency = point.find_latency(runtime=runtime, batch=batch)
        return _ABSENT if latency is None else f"{latency.median_ms:.2f}"

    def speed_up(point: Point, batch: int, against: str) -> str:
        found = results.find_comparison(point.name, runtime=runtime, batch=batch, against=against)
        if found is None:
            return _ABSENT
        text = f"{found.ratio:.2f}x ({found.low:.2f}-{found.high:.2f})"
        return text if found.differs else f"[{text}]"

    columns: dict[str, Callable[[Point], str]] = {"point": lambda point: point.name}
    if any(point.tau is not None for point in points):
        columns["tau"] = lambda point: _ABSENT if point.tau is None else f"{point.tau:g}"
    if any(edges_cut(point) not in {_ABSENT, _percent(0.0)} for point in points):
        columns["edges cut"] = edges_cut
    columns["heads kept"] = lambda point: (
        _ABSENT
        if point.heads_total is None or point.heads_kept is None
        else f"{point.heads_kept} of {point.heads_total}"
    )
    if any(point.granularity == _PART for point in points):
        columns["neurons kept"] = lambda point: _percent(point.neurons_kept_fraction)
    if any(point.positions_kept_fraction not in {None, 1.0} for point in points):
        columns["positions kept"] = lambda point: _percent(point.positions_kept_fraction)
    columns |= {
        "coarse accuracy": lambda point: _percent(point.accuracy_coarse),
        "KL": lambda point: _ABSENT if point.kl is None else f"{point.kl:z.3f}",
        "MACs": lambda point: _ABSENT if point.macs is None else f"{point.macs / 1e6:.2f} M",
    }
    for batch in sorted({item.batch for item in measured if item.runtime == runtime}):
        columns[f"{runtime} ms, batch {batch}"] = partial(milliseconds, batch=batch)
        columns[f"speed-up, batch {batch}"] = partial(speed_up, batch=batch, against=DENSE)
    fairer = [c for c in results.comparisons if (c.against, c.runtime) == (CLASS_ONLY, runtime)]
    if fairer:
        # Of the largest batch only: a table has to fit into a terminal.
        batch = max(c.batch for c in fairer)
        column = partial(speed_up, batch=batch, against=CLASS_ONLY)
        columns[f"against {CLASS_ONLY}, batch {batch}"] = column
    rows = tuple(tuple(cell(point) for cell in columns.values()) for point in points)
    return PointTable(headers=tuple(columns), rows=rows)


def headline(results: Results, point: Point) -> str:
    """How much smaller and faster a point is than the dense model, and what it costs; one sentence.

    The speed is the one at the largest batch size, in onnxruntime if it was measured there.
    """
    parts: list[str] = []
    dense = results.dense
    if dense is not None and dense.macs and point.macs is not None:
        parts.append(f"{100 * point.macs / dense.macs:.0f} % of the MACs")
    found = [c for c in results.comparisons if (c.point, c.against) == (point.name, DENSE)]
    fastest = max(found, key=lambda c: (c.runtime == _PREFERRED, c.batch), default=None)
    if fastest is not None:
        times = f"{fastest.ratio:.1f}x as fast" if fastest.differs else "no faster for certain"
        parts.append(f"{times} ({fastest.runtime}, batch {fastest.batch})")
    if dense is not None and point.accuracy_coarse is not None:
        change = 100 * (point.accuracy_coarse - (dense.accuracy_coarse or 0.0))
        text = f"{change:+.1f} points of coarse accuracy"
        if point.change_low is not None and point.change_high is not None:
            text += f" ({100 * point.change_low:+.1f} to {100 * point.change_high:+.1f})"
        parts.append(text)
    return f"{point.name}: {', '.join(parts)}"


def recommend(results: Results) -> Point | None:
    """The smallest cut that loses at most one point for certain, else the most accurate one."""
    others = {CLASS_ONLY, DENSE_REPAIRED}
    cuts = [point for point in results.points if point.name not in others and point.macs]
    if not cuts:
        return None
    safe = [p for p in cuts if p.change_low is not None and p.change_low >= -NO_LOSS]
    if safe:
        # A repair leaves the MACs as they are.
        return min(safe, key=lambda p: (p.macs or 0, -(p.accuracy_coarse or 0.0)))
    return max(cuts, key=lambda p: p.accuracy_coarse or 0.0)


def verdict(points: "Iterable[Point | PathStep]") -> str | None:
    """The name of the best trade: the smallest whose accuracy is within its interval of dense.

    If there is none, the most accurate.

    Args:
        points: Cuts, or steps on the way to a budget.
    """
    found = sorted(points, key=lambda one: (one.macs or 0, -(one.accuracy_coarse or 0.0)))
    within = [one for one in found if one.change_high is not None and one.change_high >= 0]
    best = max(found, key=lambda one: one.accuracy_coarse or 0.0, default=None)
    return within[0].name if within else None if best is None else best.name


def to_markdown(table: PointTable) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [
        table.headers,
        ("---", *["---:"] * (len(table.headers) - 1)),
        *(tuple(map(plain_markdown, row)) for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def print_table(table: PointTable, *, title: str | None = None) -> None:
    """Write a table to standard output; in parts below each other where it is too wide."""
    console = Terminal()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for part in split_table(table, console.width):
        drawn = Table(title=title)
        for position, (header, width) in enumerate(zip(part.headers, _widths(part), strict=True)):
            drawn.add_column(header, justify="right" if position else "left", width=width)
        for row in part.rows:
            drawn.add_row(*row)
        console.print(drawn)


def split_table(table: PointTable, width: int) -> Iterator[PointTable]:
    """A table as narrower ones, each of which starts with the points' names.

    Args:
        table: The whole one.
        width: Characters per line that no part exceeds, unless one column alone does.
    """

    def part_of(columns: list[int]) -> PointTable:
        headers, *rows = (
            tuple(row[number] for number in columns) for row in (table.headers, *table.rows)
        )
        return PointTable(headers=headers, rows=tuple(rows))

    first, *others = (size + _FRAME for size in _widths(table))
    columns, used = [0], first + 1
    for number, size in enumerate(others, start=1):
        if used + size > width and len(columns) > 1:
            yield part_of(columns)
            columns, used = [0], first + 1
        columns.append(number)
        used += size
    yield part_of(columns)


def _widths(table: PointTable) -> list[int]:
    """Of each column: that of its longest cell, or of the longest word of its header."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.headers)
    return [
        max(len(printable(text)) for text in (*header.split(), *cells))
        for header, cells in zip(table.headers, columns, strict=True)
    ]


def _percent(fraction: float | None) -> str:
    return _ABSENT if fraction is None else f"{100 * fraction:.1f} %"
