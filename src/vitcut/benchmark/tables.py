"""Results as tables, for terminals and for Markdown; measuring is left to the other files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from vitcut.names import RuntimeName
from vitcut.results import Point, Results

_HEADERS = ("point", "tau", "edges cut", "heads kept", "coarse accuracy", "KL", "MACs")
_ABSENT = "-"
_PREFERRED: RuntimeName = "onnxruntime"
_CLASS_ONLY = "class-only"
"""The uncut model, compiled: it gains what class-token readout gives away for free."""
_FILE_WIDTH = 240
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
    columns = _latency_columns(results, runtime or _main_runtime(results))
    rows = tuple(
        (*_description(point), *(cell(point) for _, cell in columns))
        for point in results.all_points()
    )
    return PointTable(headers=(*_HEADERS, *(header for header, _ in columns)), rows=rows)


def to_markdown(table: PointTable) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [
        table.headers,
        ("---", *["---:"] * (len(table.headers) - 1)),
        *(tuple(cell.replace("|", r"\|") for cell in row) for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def print_table(table: PointTable, *, title: str | None = None) -> None:
    """Write a table to standard output."""
    drawn = Table(title=title)
    for position, header in enumerate(table.headers):
        drawn.add_column(header, justify="right" if position else "left")
    for row in table.rows:
        drawn.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(drawn)


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


def _description(point: Point) -> tuple[str, ...]:
    edges_cut = _ABSENT
    if point.edges_total is not None and point.edges_kept is not None:
        edges_cut = f"{100 * (1 - point.edges_kept / point.edges_total):.1f} %"
    heads_kept = _ABSENT
    if point.heads_total is not None and point.heads_kept is not None:
        heads_kept = f"{point.heads_kept} of {point.heads_total}"
    accuracy = _ABSENT
    if point.accuracy_coarse is not None:
        accuracy = f"{100 * point.accuracy_coarse:.1f} %"
    return (
        point.name,
        _ABSENT if point.tau is None else f"{point.tau:g}",
        edges_cut,
        heads_kept,
        accuracy,
        _ABSENT if point.kl is None else f"{point.kl:z.3f}",
        _ABSENT if point.macs is None else f"{point.macs / 1e6:.2f} M",
    )


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
