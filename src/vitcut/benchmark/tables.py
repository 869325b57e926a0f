"""Results as tables, for terminals and for Markdown; measuring is left to the other files."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from vitcut.names import RuntimeName
from vitcut.results import Comparison, Latency, Point, Results

_ABSENT = "-"
_FILE_WIDTH = 200
"""Characters per line where there is no terminal to fit into."""


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """Text cells, one row per point."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def point_table(
    results: Results, *, runtime: RuntimeName = "onnxruntime", batches: tuple[int, ...] = (1, 64)
) -> PointTable:
    """The points of a run, the dense model first, with latency in one runtime.

    A speed-up is given with its 95 % interval; one in brackets is not shown to differ from 1.
    """
    headers = ["point", "tau", "edges cut", "heads kept", "coarse accuracy", "KL", "MACs"]
    for batch in batches:
        headers += [f"{runtime} ms, batch {batch}", f"speed-up, batch {batch}"]
    rows: list[tuple[str, ...]] = []
    for point in results.all_points():
        cells = [*_description(point)]
        for batch in batches:
            found = results.find_comparison(point.name, runtime=runtime, batch=batch)
            cells += [
                _milliseconds(point.find_latency(runtime=runtime, batch=batch)),
                _speedup(found),
            ]
        rows.append(tuple(cells))
    return PointTable(headers=tuple(headers), rows=tuple(rows))


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
        _ABSENT if point.kl is None else f"{point.kl:.3f}",
        _ABSENT if point.macs is None else f"{point.macs / 1e6:.2f} M",
    )


def _milliseconds(latency: Latency | None) -> str:
    return _ABSENT if latency is None else f"{latency.median_ms:.2f}"


def _speedup(comparison: Comparison | None) -> str:
    if comparison is None:
        return _ABSENT
    text = f"{comparison.ratio:.2f}x ({comparison.low:.2f}-{comparison.high:.2f})"
    return text if comparison.differs else f"[{text}]"
