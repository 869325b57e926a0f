"""Circuits, plans and results as text for a terminal."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vitcut.benchmark.tables import point_table, print_table
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs, dense_macs, describe
from vitcut.compact.plan import Plan
from vitcut.compiler.merging import MERGES
from vitcut.errors import ArtefactError
from vitcut.names import LETTERS
from vitcut.pipeline.checks import Calibration
from vitcut.pipeline.costs import cost_model, costs_path
from vitcut.pipeline.path import PATH_FILE, load_path, print_path
from vitcut.pipeline.repair import REPAIR_FILE, Repair
from vitcut.results import Point, Results
from vitcut.runtime import describe_machine

_SEARCH_FACTS = {"kl", "pairs", "node_evaluations", "oracle_calls", "seconds"}
"""What the provenance of a circuit that was searched says."""

_WORDS = {"part", "tokens"}
_BATCHES = (1, 64)
"""Images per call of predicted times."""

_DEAD = "-"
"""Of what can reach nothing, whatever is kept."""


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
    if (path / PATH_FILE).exists():
        print_path(load_path(path / PATH_FILE))
    if results.exists():
        print_table(point_table(Results.load(results)))
    if (path / REPAIR_FILE).exists():
        _print_paired(Repair.load(path / REPAIR_FILE))
    if not (circuits or model or results.exists()):
        raise ArtefactError(
            f"nothing to show at {path}: expected a run or model directory, or a circuit.json"
        )


def show_plan(path: Path) -> None:
    """Print what the compact model of a run, point or model directory computes, with its times.

    Raises:
        ArtefactError: There is no compact model, or several points have one.
    """
    model = _model_folder(path)
    points = [point for point in sorted(path.glob("points/*")) if _model_folder(point)]
    if model is None and len(points) > 1:
        listed = ", ".join(map(str, points))
        raise ArtefactError(f"{path} has compact models in its points: give one of {listed}")
    if model is None and points:
        model = _model_folder(points[0])
    if model is None:
        raise ArtefactError(
            f"no compact model at {path}: expected a run directory that `vitcut cut` wrote, one of "
            "its points, or a model directory"
        )
    print_plan(CompactViT.from_pretrained(model).plan, times=True)


def print_calibration(found: Calibration) -> None:
    """What there is on this machine, and how well latencies are predicted on it."""
    machine = describe_machine()
    console = Console(soft_wrap=True, highlight=False)
    flags = " ".join(machine["cpu_flags"])
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {flags}")
    console.print(
        f"Python {machine['python']}, {machine['system']}, GPU {machine['gpu'] or 'none'}"
    )
    versions = machine["versions"].items()
    console.print(", ".join(f"{name} {number}" for name, number in versions if number))
    console.print(
        f"{found.models} compact models at batch 1 and 64, ONNX Runtime, one thread: predicted "
        f"latency off by {found.error_after:.0%} (median of models not fitted to; "
        f"{found.error_before:.0%} before)"
    )
    console.print(f"costs: {costs_path()}")


def report(results: Results) -> None:
    """Print what a command measured: the table, and per point the proof and the KLs of the cut."""
    print_table(point_table(results))
    console = Console(soft_wrap=True, highlight=False)
    for point in results.points:
        if point.max_abs_diff is not None:
            line = f"{point.name}: compact == masked, largest difference {point.max_abs_diff:.2g}"
            console.print(line + _kls(point))
        if "merge" in (point.faithfulness or {}):
            console.print(f"{point.name}: {_merge_line(point)}")


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


def _merge_line(point: Point) -> str:
    merged = (point.faithfulness or {})["merge"]
    before, after = merged["streams"]
    if merged["kl"] is None:
        return f"nothing merged: with its {after} streams no edge that came back would save time"
    was, now = merged["kl"]
    return (
        f"merged: {merged['edges_restored']} edges came back, {before} -> {after} streams, KL on "
        f"the val images {was:.3f} -> {now:.3f} ({point.ablation})"
    )


def print_circuit(circuit: Circuit) -> None:
    """A circuit: a summary, and what each block keeps in each token kind.

    Heads and neurons where parts were cut, edges by the target that reads them where edges were.
    """
    console = Console(soft_wrap=True, highlight=False)
    for line in circuit_lines(circuit):
        console.print(line)
    graph, edges, neurons = circuit.graph, _cuts_edges(circuit), circuit.neurons is not None
    table = Table(
        title=f"kept {'edges' if edges else 'parts'}, of those that could reach the classifier"
    )
    table.add_column("block")
    headers = [
        *(("tokens",) if graph.kinds else ()),
        *("heads", *(("which",) if neurons else ())),
        *(("neurons",) if neurons else ()),
        *((*(f"to {letter}" for letter in LETTERS), "to mlp") if edges else ()),
    ]
    for header in headers:
        table.add_column(header, justify="left" if header in {"tokens", "which"} else "right")
    for layer in range(graph.num_layers):
        for group in range(graph.num_kinds):
            name = f"{layer}" if group == 0 else ""
            table.add_row(name, *_block_cells(circuit, layer, group, edges=edges))
    if edges:
        table.add_section()
        for target in graph.classifiers:
            blank = [""] * (len(headers) - 1 - bool(graph.kinds))
            tokens = (graph.targets[target].kind or "",) if graph.kinds else ()
            table.add_row("classifier", *tokens, *blank, _kept_of(circuit, [target]))
    console.print(table)


def circuit_lines(circuit: Circuit) -> Iterator[str]:
    """A circuit in a few lines."""
    graph = circuit.graph
    tau = "" if circuit.tau is None else f", tau {circuit.tau:g}"
    yield f"circuit by {circuit.method}{tau}, {circuit.ablation} ablation, task {circuit.task}"
    heads = f"heads kept {circuit.num_heads_kept} of {graph.num_layers * graph.num_heads}"
    if graph.kinds:
        heads += " (in any token kind)"
    if circuit.neurons is not None:
        heads += f", neurons kept {circuit.neurons_kept_fraction:.1%}"
    if _cuts_edges(circuit):
        cut = 1 - circuit.num_kept / graph.num_useful_edges
        edges = f"edges kept {circuit.num_kept} of {graph.num_useful_edges} ({cut:.1%} cut)"
        yield f"{edges}, {heads}"
    else:
        yield heads
    found = circuit.provenance
    if set(found) >= _SEARCH_FACTS:
        took = "" if found["seconds"] is None else f", {found['seconds']} s"
        yield (
            f"searched under {circuit.discovered_under} ablation: KL {found['kl']:.4f} nats on "
            f"{found['pairs']} pairs; {found['node_evaluations']} node evaluations, "
            f"{found['oracle_calls']} oracle calls{took}"
        )
    for merged in found.get(MERGES, ()):
        yield (
            f"then merged: {merged['edges_restored']} edges came back to circuit "
            f"{merged['parent'][:12]}, predicted cost {merged['cost_before']:.4g} -> "
            f"{merged['cost_after']:.4g}"
        )


def print_plan(plan: Plan, *, times: bool = False) -> None:
    """What a compact model computes, block by block, for which tokens.

    Args:
        plan: The plan.
        times: Whether to add the predicted times of each part, in microseconds.
    """
    table = Table(title="plan", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("part", "tokens", "sums", "heads", "neurons", "MACs"):
        table.add_column(name, no_wrap=True, justify="left" if name in _WORDS else "right")
    models = [cost_model(batch) for batch in _BATCHES] if times else []
    by_part = [costs.latency_by_part(plan) for costs in models]
    for costs in models:
        table.add_column(f"us, {costs.batch}", no_wrap=True, justify="right")
    part = ""
    for row in describe(plan):
        heads = _times(row.heads, row.query_rows, mark="*" if row.absorbed else "")
        counts = str(row.streams or ""), heads, _times(row.neurons, row.mlp_rows)
        name, part = row.part if row.part != part else "", row.part
        spent = [f"{1000 * known[name]:,.0f}" if name else "" for known in by_part]
        table.add_row(name, row.tokens, *counts, f"{row.macs:,}", *spent)
    total, dense = count_macs(plan), dense_macs(plan.shape)
    table.add_section()
    spent = [f"{1000 * costs.latency_ms(plan):,.0f}" for costs in models]
    table.add_row("all", f"{total / dense:.1%} of dense", "", "", "", f"{total:,}", *spent)
    notes = ["counts x tokens"]
    if any(row.absorbed for row in describe(plan)):
        notes.append("* few tokens ask: without keys or values of their own")
    if times:
        notes.append(
            f"us: predicted, ONNX Runtime, one thread, 1 and 64 images ({models[0].origin} costs)"
        )
    table.caption = "; ".join(notes)
    Console().print(table)


def _times(count: int, rows: int, *, mark: str = "") -> str:
    return f"{count}{mark} x {rows}" if count else ""


def _cuts_edges(circuit: Circuit) -> bool:
    """Whether edges were cut one by one; those of cut heads and MLPs only follow."""
    return circuit.neurons is None or circuit.read_by_all is None


def _block_cells(circuit: Circuit, layer: int, group: int, *, edges: bool) -> Iterator[str]:
    """The cells of a block and token kind; a dash where nothing can reach the classifier."""
    graph = circuit.graph
    useful = graph.find_live(graph.edges)[1]
    first, mlp = graph.head_source(layer, 0, group), graph.mlp_source(layer, group)
    if graph.kinds:
        yield graph.kinds[group]
    kept = circuit.heads_on_path[layer, :, group]
    yield f"{int(kept.sum())} / {len(kept)}" if useful[first] else _DEAD
    if circuit.neurons is not None:
        yield " ".join(str(head) for head in kept.nonzero()[0])
        own = circuit.neurons[layer, group] & circuit.live_sources[mlp]
        yield f"{int(own.sum())} / {len(own)}" if useful[mlp] else _DEAD
    if edges:
        for letter in LETTERS:
            yield _kept_of(circuit, graph.letter_targets(layer, letter, group))
        yield _kept_of(circuit, [graph.mlp_target(layer, group)])


def _kept_of(circuit: Circuit, targets: Iterable[int]) -> str:
    columns = list(targets)
    useful = circuit.graph.useful_edges[:, columns]
    if not useful.any():
        return _DEAD
    return f"{int((circuit.kept[:, columns] & useful).sum())} / {int(useful.sum())}"


def _model_folder(path: Path) -> Path | None:
    for folder in (path / "model", path):
        if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
            return folder
    return None
