"""Results as tables, for terminals and for Markdown."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from vitcut.names import RuntimeName
from vitcut.results import Comparison, Point, Results

_ABSENT = "-"
_PREFERRED: RuntimeName = "onnxruntime"
_CLASS_ONLY = "class-only"
"""The uncut model, compiled: it has the speed-up that class-token readout gives away for free."""
_PART = "part"
"""The granularity of circuits that cut heads and neurons."""
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

    A speed-up is given with its 95 % interval; one in brackets is not shown to differ from 1. A
    column that says nothing about any point is left out.

    Args:
        results: What was measured.
        runtime: Whose latencies are shown; by default onnxruntime if it was measured, else the
            first runtime that was.
    """
    points = results.all_points()
    latencies = [item for point in points for item in point.latency]
    if runtime is None:
        measured: list[RuntimeName] = [item.runtime for item in latencies]
        runtime = _PREFERRED if _PREFERRED in measured or not measured else measured[0]

    columns = {"point": [point.name for point in points]}
    if any(point.tau is not None for point in points):
        columns["tau"] = [_ABSENT if point.tau is None else f"{point.tau:g}" for point in points]
    edges = [_edges_cut(point) for point in points]
    if not set(edges) <= {_ABSENT, _percent(0.0)}:
        columns["edges cut"] = edges
    columns["heads kept"] = [
        _ABSENT
        if point.heads_total is None or point.heads_kept is None
        else f"{point.heads_kept} of {point.heads_total}"
        for point in points
    ]
    if any(point.granularity == _PART for point in points):
        columns["neurons kept"] = [_percent(point.neurons_kept_fraction) for point in points]
    columns["coarse accuracy"] = [_percent(point.accuracy_coarse) for point in points]
    columns["KL"] = [_ABSENT if point.kl is None else f"{point.kl:z.3f}" for point in points]
    columns["MACs"] = [
        _ABSENT if point.macs is None else f"{point.macs / 1e6:.2f} M" for point in points
    ]

    def speedups(batch: int, against: str) -> list[str]:
        return [
            _speedup(results.find_comparison(p.name, runtime=runtime, batch=batch, against=against))
            for p in points
        ]

    for batch in sorted({item.batch for item in latencies if item.runtime == runtime}):
        found = [point.find_latency(runtime=runtime, batch=batch) for point in points]
        columns[f"{runtime} ms, batch {batch}"] = [
            _ABSENT if item is None else f"{item.median_ms:.2f}" for item in found
        ]
        columns[f"speed-up, batch {batch}"] = speedups(batch, "dense")
    fairer = [c for c in results.comparisons if (c.against, c.runtime) == (_CLASS_ONLY, runtime)]
    if fairer:
        # Of the largest batch only: a table has to fit into a terminal.
        largest = max(c.batch for c in fairer)
        columns[f"against {_CLASS_ONLY}, batch {largest}"] = speedups(largest, _CLASS_ONLY)
    return PointTable(headers=tuple(columns), rows=tuple(zip(*columns.values(), strict=True)))


def _percent(fraction: float | None) -> str:
    return _ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def _edges_cut(point: Point) -> str:
    # Only for circuits over edges: where parts are cut, edges merely follow.
    if point.edges_total is None or point.edges_kept is None or point.granularity == _PART:
        return _ABSENT
    return _percent(1 - point.edges_kept / point.edges_total)


def _speedup(comparison: Comparison | None) -> str:
    if comparison is None:
        return _ABSENT
    text = f"{comparison.ratio:.2f}x ({comparison.low:.2f}-{comparison.high:.2f})"
    return text if comparison.differs else f"[{text}]"


def to_markdown(table: PointTable) -> str:
    """A Markdown table: the first column left-aligned, the numbers right-aligned."""
    lines = [
        table.headers,
        ("---", *["---:"] * (len(table.headers) - 1)),
        *(tuple(cell.replace("|", r"\|") for cell in row) for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def print_table(table: PointTable, *, title: str | None = None) -> None:
    """Write a table to standard output, in several parts if it is too wide."""
    console = Console(markup=False, highlight=False)
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
    """Split a table into narrower ones that each start with the points' names.

    Args:
        table: The whole table.
        width: Characters per line that no part exceeds, unless one column alone does.
    """
    first, *others = (size + _FRAME for size in _widths(table))
    columns, used = [0], first + 1
    for number, size in enumerate(others, start=1):
        if used + size > width and len(columns) > 1:
            yield _columns_of(table, columns)
            columns, used = [0], first + 1
        columns.append(number)
        used += size
    yield _columns_of(table, columns)


def _columns_of(table: PointTable, columns: list[int]) -> PointTable:
    headers, *rows = (
        tuple(row[number] for number in columns) for row in (table.headers, *table.rows)
    )
    return PointTable(headers=headers, rows=tuple(rows))


def _widths(table: PointTable) -> list[int]:
    """Of each column: its longest cell, or the longest word of its header."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.headers)
    return [
        max(len(text) for text in (*header.split(), *cells))
        for header, cells in zip(table.headers, columns, strict=True)
    ]
