"""Results as tables, for terminals and for Markdown; measuring is left to the other files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from vitcut.names import RuntimeName
from vitcut.results import Point, Results

_ABSENT = "-"
_PREFERRED: RuntimeName = "onnxruntime"
_CLASS_ONLY = "class-only"
"""The uncut model, compiled: it gains what class-token readout gives away for free."""
_PART = "part"
"""The granularity of circuits that cut heads and neurons."""
_FRAME = 3
"""Characters around each cell: a line and two spaces."""
_FILE_WIDTH = 320
"""Characters per line where there is no terminal to fit into."""

_Column = tuple[str, Callable[[Point], str]]
"""A header, and what to write below it for a point."""


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """Text cells, one row per point."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def point_table(results: Results, *, runtime: RuntimeName | None = None) -> PointTable:
    """The points of a run, the dense model first, with every latency measured in one runtime.

    A speed-up is given with its 95 % interval; one in brackets is not shown to differ from 1.

    Args:
        results: What was measured.
        runtime: Whose latencies are shown; unless given, onnxruntime if it was measured, else the
            first that was.
    """
    columns = [
        *_description_columns(results),
        *_latency_columns(results, runtime or _main_runtime(results)),
    ]
    rows = tuple(tuple(cell(point) for _, cell in columns) for point in results.all_points())
    return PointTable(headers=tuple(header for header, _ in columns), rows=rows)


def to_markdown(table: PointTable) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [
        table.headers,
        ("---", *["---:"] * (len(table.headers) - 1)),
        *(tuple(cell.replace("|", r"\|") for cell in row) for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def print_table(table: PointTable, *, title: str | None = None) -> None:
    """Write a table to standard output; in parts below each other where it is too wide."""
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
    """A table as narrower ones, each of which starts with the points' names.

    Args:
        table: The whole one.
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
    """Of each column: that of its longest cell, or of the longest word of its header."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.headers)
    return [
        max(len(text) for text in (*header.split(), *cells))
        for header, cells in zip(table.headers, columns, strict=True)
    ]


def _main_runtime(results: Results) -> RuntimeName:
    measured: list[RuntimeName] = [
        item.runtime for point in results.all_points() for item in point.latency
    ]
    return _PREFERRED if _PREFERRED in measured or not measured else measured[0]


def _latency_columns(results: Results, runtime: RuntimeName) -> list[_Column]:
    latencies = [item for point in results.all_points() for item in point.latency]
    batches = sorted({item.batch for item in latencies if item.runtime == runtime})
    speedup = partial(_speedup, results=results, runtime=runtime)
    columns: list[_Column] = []
    for batch in batches:
        milliseconds = partial(_milliseconds, runtime=runtime, batch=batch)
        columns.append((f"{runtime} ms, batch {batch}", milliseconds))
        columns.append((f"speed-up, batch {batch}", partial(speedup, batch=batch, against="dense")))
    fairer = [c for c in results.comparisons if (c.against, c.runtime) == (_CLASS_ONLY, runtime)]
    if fairer:
        # Of the largest batch only: a table has to fit into a terminal.
        largest = max(c.batch for c in fairer)
        column = partial(speedup, batch=largest, against=_CLASS_ONLY)
        columns.append((f"against {_CLASS_ONLY}, batch {largest}", column))
    return columns


def _description_columns(results: Results) -> list[_Column]:
    """What points are and how good; a column that says nothing of any of them is left out."""
    points = results.all_points()
    searched = any(point.tau is not None for point in points)
    edges = any(_edges_cut(point) not in {_ABSENT, _percent(0.0)} for point in points)
    parts = any(point.granularity == _PART for point in points)
    columns: list[tuple[str, Callable[[Point], str], bool]] = [
        ("point", lambda point: point.name, True),
        ("tau", lambda point: _ABSENT if point.tau is None else f"{point.tau:g}", searched),
        ("edges cut", _edges_cut, edges),
        ("heads kept", _heads_kept, True),
        ("neurons kept", lambda point: _percent(point.neurons_kept_fraction), parts),
        ("coarse accuracy", lambda point: _percent(point.accuracy_coarse), True),
        ("KL", lambda point: _ABSENT if point.kl is None else f"{point.kl:z.3f}", True),
        ("MACs", _macs, True),
    ]
    return [(header, cell) for header, cell, wanted in columns if wanted]


def _edges_cut(point: Point) -> str:
    """Of circuits over edges: where parts are cut, edges only follow."""
    if point.edges_total is None or point.edges_kept is None or point.granularity == _PART:
        return _ABSENT
    return _percent(1 - point.edges_kept / point.edges_total)


def _heads_kept(point: Point) -> str:
    if point.heads_total is None or point.heads_kept is None:
        return _ABSENT
    return f"{point.heads_kept} of {point.heads_total}"


def _macs(point: Point) -> str:
    return _ABSENT if point.macs is None else f"{point.macs / 1e6:.2f} M"


def _percent(fraction: float | None) -> str:
    return _ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def _milliseconds(point: Point, *, runtime: RuntimeName, batch: int) -> str:
    latency = point.find_latency(runtime=runtime, batch=batch)
    return _ABSENT if latency is None else f"{latency.median_ms:.2f}"


def _speedup(
    point: Point, *, results: Results, runtime: RuntimeName, batch: int, against: str
) -> str:
    comparison = results.find_comparison(point.name, runtime=runtime, batch=batch, against=against)
    if comparison is None:
        return _ABSENT
    text = f"{comparison.ratio:.2f}x ({comparison.low:.2f}-{comparison.high:.2f})"
    return text if comparison.differs else f"[{text}]"
