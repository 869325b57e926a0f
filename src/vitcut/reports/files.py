"""What a report shows, as files for other programs: tables, graphs and figures for papers."""

import csv
import json
import re
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitcut.circuit import Circuit
from vitcut.errors import ConfigError
from vitcut.graph import Place
from vitcut.names import LETTERS, RuntimeName
from vitcut.results import Point, Results
from vitcut.store import atomic_path

FileKind = Literal["csv", "networkx", "mib", "svg", "png"]

_COLORS = {
    "q": "#2f9bd6",
    "k": "#c98300",
    "v": "#008a63",
    "mlp": "#b4598f",
    "classifier": "#444b57",
}
"""Of edges by what reads them, as on the page."""
_ACCENT = "#1f5fd0"

Strengths = dict[tuple[str, str], float]
"""What cutting an edge costs, in nats, by the names of its source and target."""


def files_of(
    results: Results | None, circuits: dict[str, tuple[Circuit, Strengths]], kinds: set[FileKind]
) -> Iterator[tuple[str, bytes]]:
    """The files of one run by name.

    Args:
        results: What was measured, if anything was.
        circuits: The circuit of each point, and the strengths of its edges as far as known.
        kinds: Which files. ``mib`` is for circuits over whole tokens; ``svg`` and ``png`` need
            matplotlib.
    """
    if "csv" in kinds and results is not None:
        yield "points.csv", _points_csv(results).encode()
    # A point may be named after a path.
    named: dict[str, tuple[Circuit, Strengths]] = {}
    for point, known in circuits.items():
        name = re.sub(r"[^\w.-]+", "-", point)
        while name in named:
            name += "-too"
        named[name] = known
    for name, (circuit, strengths) in named.items():
        if "networkx" in kinds:
            yield f"{name}.networkx.json", _json(to_networkx(circuit, strengths))
        if "mib" in kinds and not circuit.graph.kinds:
            yield f"{name}.mib.json", _json(to_mib(circuit, strengths))
    for suffix in sorted(kinds & {"svg", "png"}):
        if results is not None:
            for name, figure in _accuracy_figures(results):
                yield f"{name}.{suffix}", _drawn(figure, suffix)
        for name, (circuit, _) in named.items():
            yield f"{name}.{suffix}", _drawn(_circuit_figure(circuit), suffix)


def write_files(folder: Path, files: Iterator[tuple[str, bytes]]) -> None:
    """Write files, each atomically."""
    for name, content in files:
        with atomic_path(folder / name) as part:
            part.write_bytes(content)


def to_networkx(circuit: Circuit, strengths: Strengths) -> dict[str, Any]:
    """The kept edges as node-link data, for ``networkx.node_link_graph(data, edges="edges")``."""
    graph, live = circuit.graph, circuit.live_sources & circuit.reached_sources
    nodes = {source.name: bool(live[n]) for n, source in enumerate(graph.sources)}
    nodes |= {graph.targets[number].name: True for number in graph.classifiers}
    edges: list[dict[str, Any]] = []
    for source, target in np.argwhere(circuit.kept & graph.useful_edges):
        one, other = graph.sources[source], graph.targets[target]
        edges.append(
            {
                "source": one.name,
                "target": _node(other),
                "key": other.role if other.role in LETTERS else "",
                "strength": strengths.get((one.name, other.name)),
            }
        )
    return {
        "directed": True,
        "multigraph": True,
        "graph": {"method": circuit.method, "ablation": circuit.ablation, "tau": circuit.tau},
        "nodes": [{"id": name, "kept": kept} for name, kept in nodes.items()],
        "edges": edges,
    }


def to_mib(circuit: Circuit, strengths: Strengths) -> dict[str, Any]:
    """A circuit over whole tokens in the JSON of MIB and EAP-IG: every edge with score and mask.

    Where an edge was not tested, its score is 1 if it is kept and 0 if not. The width of the model
    is not part of a circuit, so ``d_model`` is None.

    Raises:
        ConfigError: The circuit is per token kind, which MIB does not know.
    """
    graph = circuit.graph
    if graph.kinds:
        raise ConfigError(
            f"MIB's circuits are over whole tokens, got the token kinds {', '.join(graph.kinds)}"
        )
    live = circuit.live_sources & circuit.reached_sources
    nodes = {_mib_name(source): bool(live[n]) for n, source in enumerate(graph.sources)}
    edges: dict[str, dict[str, Any]] = {}
    for source, target in np.argwhere(graph.edges):
        one, other = graph.sources[source], graph.targets[target]
        kept = bool(circuit.kept[source, target])
        letter = f"<{other.role}>" if other.role in LETTERS else ""
        edges[f"{_mib_name(one)}->{_mib_name(other)}{letter}"] = {
            "score": strengths.get((one.name, other.name), float(kept)),
            "in_graph": kept,
        }
    return {
        "cfg": {
            "n_layers": graph.num_layers,
            "n_heads": graph.num_heads,
            "parallel_attn_mlp": False,
            "d_model": None,
        },
        "nodes": {name: {"in_graph": kept} for name, kept in (nodes | {"logits": True}).items()},
        "edges": edges,
    }


def _mib_name(place: Place) -> str:
    if place.head >= 0:
        return f"a{place.layer}.h{place.head}"
    names = {"embed": "input", "classifier": "logits"}
    return names.get(place.role, f"m{place.layer}")


def _node(target: Place) -> str:
    """The name of the source that a target belongs to; that of the classifier is its own."""
    return target.name.replace(f".{target.role}", "") if target.role in LETTERS else target.name


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode()


def _points_csv(results: Results) -> str:
    """A row per point and latency; accuracies are fractions of 1."""
    plain = [
        *("name", "method", "granularity", "ablation", "tau", "edges_total", "edges_kept"),
        *("heads_total", "heads_kept", "neurons_kept_fraction"),
        *("positions_kept_fraction", "accuracy_fine"),
        *("accuracy_coarse", "change_low", "change_high", "kl", "macs", "params", "bytes"),
        *("max_abs_diff", "images"),
    ]
    timed = ["runtime", "device", "dtype", "batch", "threads", "median_ms", "p10_ms", "p90_ms"]
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*plain, *timed])
    for point in results.all_points():
        known = [getattr(point, name) for name in plain]
        for latency in point.latency or (None,):
            rows.writerow([*known, *(getattr(latency, name, None) for name in timed)])
    return text.getvalue()


def _figure(width: float, height: float) -> Any:
    figures = import_module("matplotlib.figure")
    return figures.Figure(figsize=(width, height), layout="constrained")


def _drawn(figure: Any, suffix: str) -> bytes:
    content = BytesIO()
    figure.savefig(content, format=suffix, dpi=150)
    return content.getvalue()


def _accuracy_figures(results: Results) -> Iterator[tuple[str, Any]]:
    """Coarse accuracy against latency, a figure per runtime and batch size."""
    points = results.all_points()
    timed: dict[tuple[RuntimeName, int], None] = {
        (item.runtime, item.batch): None for point in points for item in point.latency
    }
    dense = results.dense.accuracy_coarse if results.dense else None
    for runtime, batch in timed:
        figure = _figure(6, 4)
        axes = figure.add_subplot()
        for point in points:
            latency = point.find_latency(runtime=runtime, batch=batch)
            if latency is None or point.accuracy_coarse is None:
                continue
            x, y = latency.median_ms, 100 * point.accuracy_coarse
            axes.errorbar(
                [x],
                [y],
                xerr=[[x - latency.p10_ms], [latency.p90_ms - x]],
                yerr=_interval(point, dense),
                fmt="o",
                color=_ACCENT if point is not results.dense else "black",
                elinewidth=0.8,
            )
            axes.annotate(point.name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"ms per batch of {batch} ({runtime}), p10 to p90")
        axes.set_ylabel("coarse accuracy, % (95 % interval of the change)")
        axes.spines[["top", "right"]].set_visible(False)
        yield f"accuracy-{runtime}-{batch}", figure


def _interval(point: Point, dense: float | None) -> list[list[float]] | None:
    if dense is None or point.change_low is None or point.change_high is None:
        return None
    change = (point.accuracy_coarse or 0.0) - dense
    # The interval of a bootstrap need not hold the estimate.
    low, high = change - point.change_low, point.change_high - change
    return [[100 * max(0.0, low)], [100 * max(0.0, high)]]


def _circuit_figure(circuit: Circuit) -> Any:
    """A circuit in layers, as on the page: embed left, classifier right, MLPs beneath heads."""
    graph = circuit.graph

    def spot(place: Place) -> tuple[float, float]:
        band = graph.kind_number(place) * (graph.num_heads + 2)
        if place.role in {"embed", "classifier"}:
            return (2.0 * max(place.layer, -0.5), band + graph.num_heads / 2)
        if place.role == "mlp":
            return (2.0 * place.layer + 1, band + graph.num_heads)
        return (2.0 * place.layer, float(band + place.head))

    rows = graph.num_kinds * (graph.num_heads + 2)
    figure = _figure(max(5.0, 0.8 * graph.num_layers + 2), max(2.5, 0.3 * rows))
    axes = figure.add_subplot()
    kept = circuit.kept & graph.useful_edges
    opacity = min(0.8, 12 / max(1, circuit.num_kept) ** 0.5)
    for number, target in enumerate(graph.targets):
        for source in np.flatnonzero(kept[:, number]):
            (x0, y0), (x1, y1) = spot(graph.sources[source]), spot(target)
            y1 += {"q": -0.15, "v": 0.15}.get(target.role, 0.0)
            axes.plot([x0, x1], [y0, y1], color=_COLORS[target.role], lw=0.5, alpha=opacity)
    live = circuit.live_sources & circuit.reached_sources
    places = [*zip(graph.sources, live, strict=True)]
    places += [(graph.targets[number], np.True_) for number in graph.classifiers]
    for place, on in places:
        words = {"embed": "in", "classifier": "out", "mlp": "mlp"}
        box = {
            "boxstyle": "round",
            "fc": _ACCENT if on else "white",
            "ec": _ACCENT if on else "grey",
        }
        axes.text(
            *spot(place),
            words.get(place.role, str(place.head)),
            size=6,
            ha="center",
            va="center",
            color="white" if on else "grey",
            bbox=box,
        )
    axes.set_xlim(-1.6, 2.0 * graph.num_layers + 0.6)
    axes.set_ylim(rows - 0.8, -0.8)
    axes.set_axis_off()
    return figure
