"""Circuits, plans and results as text for a terminal."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vitcut.benchmark.tables import point_table, print_table
from vitcut.circuit import Circuit
from vitcut.compact.macs import count_macs, dense_macs, describe
from vitcut.compact.model import CompactViT
from vitcut.compact.plan import Plan
from vitcut.errors import ArtefactError
from vitcut.names import LETTERS
from vitcut.pipeline.repair import REPAIR_FILE, Repair
from vitcut.results import Point, Results

_SEARCH_FACTS = {"kl", "pairs", "node_evaluations", "oracle_calls", "seconds"}
"""What the provenance of a circuit that was searched says."""


def show(path: Path) -> None:
    """Print what a run directory, a model directory or a circuit.json holds.

    Raises:
        ArtefactError: It holds none of these.
    """
    results, model = path / "results.json", _model_folder(path)
    circuits = [path] if path.is_file() else sorted(path.glob("points/*/circuit.json"))
    if model is not None:
        circuits = [model / "circuit.json"] if (model / "circuit.json").exists() else []
    for item in circuits:
        print_circuit(Circuit.load(item))
    if model is not None:
        print_plan(CompactViT.from_pretrained(model).plan)
    if results.exists():
        print_table(point_table(Results.load(results)))
    if (path / REPAIR_FILE).exists():
        _print_paired(Repair.load(path / REPAIR_FILE))
    if not (circuits or model or results.exists()):
        raise ArtefactError(
            f"nothing to show at {path}: expected a run or model directory, or a circuit.json"
        )


def report(results: Results) -> None:
    """Print what a command measured: the table, and per point the proof and the KLs of the cut."""
    print_table(point_table(results))
    console = Console(soft_wrap=True, highlight=False)
    for point in results.points:
        if point.max_abs_diff is not None:
            line = f"{point.name}: compact == masked, largest difference {point.max_abs_diff:.2g}"
            console.print(line + _kls(point))


def report_repair(results: Results, repair: Repair) -> None:
    """Print what a repair came to: the table, and how the accuracies differ image by image."""
    report(results)
    _print_paired(repair)


def _print_paired(repair: Repair) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for found in repair.paired:
        difference, low, high = (100 * x for x in (found.difference, found.low, found.high))
        console.print(
            f"{found.point} against {found.against}: coarse accuracy {difference:+.1f} points "
            f"(95 % interval {low:+.1f} to {high:+.1f}, {found.images} images in pairs)"
        )


def _kls(point: Point) -> str:
    """KL on the search's images, then and as cut: one under resample says little of the cut."""
    searched = (point.faithfulness or {}).get("discovery")
    if point.faithfulness is None or searched is None:
        return ""
    cut = point.faithfulness["cut"]
    text = f"; KL on the search's images {searched['kl']:.3f} under {searched['ablation']}"
    return text if cut is None else f"{text}, {cut['kl']:.3f} as cut ({cut['ablation']})"


def print_circuit(circuit: Circuit) -> None:
    """A circuit: a summary, and per block how many edges each kind of target keeps."""
    console = Console(soft_wrap=True, highlight=False)
    for line in circuit_lines(circuit):
        console.print(line)
    table = Table("block", "heads kept", *LETTERS, "mlp", title="kept edges by target")
    on_path = circuit.live_sources & circuit.reached_sources
    for layer in range(circuit.graph.num_layers):
        first, end = circuit.graph.head_source(layer, 0), circuit.graph.mlp_source(layer)
        mlp = _kept_of(
            circuit, range(circuit.graph.mlp_target(layer), circuit.graph.mlp_target(layer) + 1)
        )
        letters = [_kept_of(circuit, circuit.graph.letter_targets(layer, x)) for x in LETTERS]
        heads = f"{int(on_path[first:end].sum())} / {circuit.graph.num_heads}"
        table.add_row(str(layer), heads, *letters, mlp)
    last = circuit.graph.classifier
    table.add_row("classifier", "", "", "", "", _kept_of(circuit, range(last, last + 1)))
    console.print(table)


def circuit_lines(circuit: Circuit) -> Iterator[str]:
    """A circuit in a few lines."""
    graph = circuit.graph
    tau = "" if circuit.tau is None else f", tau {circuit.tau:g}"
    yield f"circuit by {circuit.method}{tau}, {circuit.ablation} ablation, task {circuit.task}"
    cut = 1 - circuit.num_kept / graph.num_edges
    heads = graph.num_layers * graph.num_heads
    yield (
        f"edges kept {circuit.num_kept} of {graph.num_edges} ({cut:.1%} cut), heads kept "
        f"{circuit.num_heads_kept} of {heads}"
    )
    found = circuit.provenance
    if set(found) >= _SEARCH_FACTS:
        took = "" if found["seconds"] is None else f", {found['seconds']} s"
        yield (
            f"searched under {circuit.discovered_under} ablation: KL {found['kl']:.4f} nats on "
            f"{found['pairs']} pairs; {found['node_evaluations']} node evaluations, "
            f"{found['oracle_calls']} oracle calls{took}"
        )


def print_plan(plan: Plan) -> None:
    """What a compact model computes, block by block, for which tokens."""
    table = Table(title="plan")
    for name in ("part", "tokens", "streams", "heads", "query rows", "neurons", "MLP rows", "MACs"):
        table.add_column(name, no_wrap=name in {"part", "tokens", "MACs"})
    part = ""
    for row in describe(plan):
        heads = f"{row.heads}{'*' if row.absorbed else ''}"
        counts = (row.streams, heads, row.query_rows, row.neurons, row.mlp_rows)
        name, part = row.part if row.part != part else "", row.part
        table.add_row(name, row.tokens, *(str(cell) for cell in counts), f"{row.macs:,}")
    total, dense = count_macs(plan), dense_macs(plan.shape)
    table.add_section()
    table.add_row("all", f"{total / dense:.1%} of dense", *[""] * 5, f"{total:,}")
    if any(row.absorbed for row in describe(plan)):
        table.caption = "* few tokens ask: without keys and values of their own"
    Console().print(table)


def _kept_of(circuit: Circuit, targets: range) -> str:
    columns = list(targets)
    return f"{int(circuit.kept[:, columns].sum())} / {int(circuit.graph.edges[:, columns].sum())}"


def _model_folder(path: Path) -> Path | None:
    for folder in (path / "model", path):
        if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
            return folder
    return None
