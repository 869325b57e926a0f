"""Circuits, plans and results as text for a terminal. Loads torch only for a compact model."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError
from vitcut.names import LETTERS
from vitcut.progress import Terminal
from vitcut.reports.tables import NO_LOSS, headline, point_table, print_table, recommend
from vitcut.results import CLASS_ONLY, DENSE_REPAIRED, AccuracyDifference, Results
from vitcut.runs import (
    CIRCUIT_FILE,
    PATH_FILE,
    REPAIR_FILE,
    RESULTS_FILE,
    circuits_in,
    find_run,
)

if TYPE_CHECKING:
    from vitcut.benchmark.evaluation import Evaluation
    from vitcut.compact.plan import Plan
    from vitcut.compiler.cost import CostModel
    from vitcut.compiler.cut import Cut
    from vitcut.exports.export import Exported
    from vitcut.training.repair import Repair, Repaired

_SEARCH_FACTS = {"kl", "pairs", "node_evaluations", "oracle_calls", "seconds"}
"""What the provenance of a circuit that ACDC found says."""
_SHOWN_FILES = (PATH_FILE, REPAIR_FILE, RESULTS_FILE)
_MOST_GROUPS = 12
"""Of more groups, no table of confusions is shown, but the most frequent ones."""
_MOST_CONFUSED = 10
_DEAD = "-"
"""In place of counts, where nothing can reach the classifier whatever is kept."""


def show_path(path: Path) -> None:
    """Print what a run directory, a model directory or a circuit.json holds.

    Raises:
        ArtefactError: It holds none of these.
    """
    results, model = path / RESULTS_FILE, _model_folder(path)
    circuits = [path] if path.is_file() else list(circuits_in(path).values())
    if model is not None:
        circuits = [model / CIRCUIT_FILE] if (model / CIRCUIT_FILE).exists() else []
    if results.exists():
        show_results(Results.load(results))
    # A repaired model has the circuit of the cut that it was made from.
    found = {circuit.fingerprint: circuit for circuit in map(Circuit.load, circuits)}
    for circuit in found.values():
        show_circuit(circuit)
    if model is not None:
        from vitcut.compact.model import CompactViT

        show_plan(CompactViT.from_pretrained(model).plan)
    _show_steps(path)
    if (path / REPAIR_FILE).exists():
        from vitcut.training.repair import Repair

        show_pairs(Repair.load(path / REPAIR_FILE))
    if not (circuits or model or any((path / name).exists() for name in _SHOWN_FILES)):
        raise ArtefactError(
            f"nothing to show at {path}: expected a run or model directory of circuits or cuts, or "
            "a circuit.json; of a dense model, or what a training made, vitcut info tells"
        )


def _show_steps(run: Path) -> None:
    """Print the path to a budget, if a search in this directory has ended."""
    if (run / PATH_FILE).exists():
        from vitcut.selection.steps import SearchPath, print_path

        print_path(SearchPath.load(run / PATH_FILE).steps)


def show_plan_of(path: Path) -> None:
    """Print what the compact model of a run, point or model directory computes, with its times.

    Raises:
        ArtefactError: There is no compact model, or several points have one.
    """
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cost import CostModel

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
    show_plan(CompactViT.from_pretrained(model).plan, costs=[CostModel(batch=n) for n in (1, 64)])


def show_results(results: Results) -> None:
    """Print what a command measured: the table, and per point the proof and the KLs of the cut."""
    console = Terminal(soft_wrap=True)
    chosen = recommend(results)
    cuts = [point for point in results.points if point.name not in {CLASS_ONLY, DENSE_REPAIRED}]
    # The verdict comes first: what the model to take is worth.
    for point in sorted(cuts, key=lambda point: point is not chosen):
        console.print(headline(results, point))
    if chosen is not None and len(cuts) > 1:
        safe = chosen.change_low is not None and chosen.change_low >= -NO_LOSS
        why = "the smallest that loses at most one point" if safe else "the most accurate"
        console.print(f"take {chosen.name}: {why}")
    print_table(point_table(results))
    for point in results.points:
        facts = point.faithfulness or {}
        if point.max_abs_diff is not None:
            line = f"{point.name}: compact == masked, largest difference {point.max_abs_diff:.2g}"
            # A KL under resample says little of the cut: both are given.
            searched, cut = facts.get("discovery"), facts.get("cut")
            if searched is not None:
                line += f"; KL on the search's images {searched['kl']:.3f}"
                line += f" under {searched['ablation']}"
                line += "" if cut is None else f", {cut['kl']:.3f} as cut ({cut['ablation']})"
            console.print(line)
        merged = facts.get("merge")
        if merged is None:
            continue
        (before, after), kls = merged["streams"], merged["kl"]
        if kls is None:
            console.print(
                f"{point.name}: nothing merged: with its {after} streams no edge that came back "
                "would save time"
            )
        else:
            was, now = kls
            console.print(
                f"{point.name}: merged: {merged['edges_restored']} edges came back, {before} -> "
                f"{after} streams, KL on val images {was:.3f} -> {now:.3f} ({point.ablation})"
            )


def show_cut(cut: "Cut") -> None:
    """Print the path to a budget, if there was one, and what was measured."""
    if cut.results is not None:
        show_results(cut.results)
    if cut.folder is not None:
        run = find_run(cut.folder)
        _show_steps(cut.folder.parent if run is None else run)


def show_repaired(repaired: "Repaired") -> None:
    """Print what a repair came to: the table, and how the accuracies differ image by image."""
    if repaired.results is not None:
        show_results(repaired.results)
    show_pairs(repaired.repair)


def show_pairs(repair: "Repair") -> None:
    """Print by how much a repaired point is more accurate than others, with its interval."""
    for found in repair.paired:
        show_difference(found)


def show_difference(found: AccuracyDifference) -> None:
    """Print by how much a model is more accurate than another, with its interval."""
    difference, low, high = (100 * x for x in (found.difference, found.low, found.high))
    Terminal(soft_wrap=True).print(
        f"{found.point} against {found.against}: coarse accuracy {difference:+.1f} points "
        f"(95 % interval {low:+.1f} to {high:+.1f}, {found.images} images in pairs)"
    )


def show_evaluation(found: "Evaluation") -> None:
    """Print accuracies, the confusion of the groups, and the difference to another model."""
    console = Terminal(soft_wrap=True)
    measured = [found] if found.against is None else [found, found.against]
    table = Table(title=f"on {found.images} test images")
    table.add_column("model")
    for header in ("coarse accuracy", "fine accuracy", "KL"):
        table.add_column(header, justify="right")
    for item in measured:
        kl = "-" if item.kl is None else f"{item.kl:z.4f}"
        # Images that are labelled with groups have no fine class.
        fine = _DEAD if item.accuracy_fine is None else f"{item.accuracy_fine:.1%}"
        table.add_row(item.name or "", f"{item.accuracy_coarse:.1%}", fine, kl)
    console.print_table(table)
    if len(found.groups) <= _MOST_GROUPS:
        table = Table(title=f"{found.name}: images by group and answer")
        table.add_column("group")
        for header in (*found.groups, "right"):
            table.add_column(header, justify="right")
        for group, row in enumerate(found.confusion):
            right = f"{row[group] / sum(row):.1%}" if sum(row) else _DEAD
            table.add_row(found.groups[group], *map(str, row), right)
        console.print_table(table)
    else:
        pairs = sorted(
            (
                (-count, true, answered)
                for true, row in enumerate(found.confusion)
                for answered, count in enumerate(row)
                if count and answered != true
            )
        )
        for count, true, answered in pairs[:_MOST_CONFUSED]:
            console.print(f"{found.groups[true]} taken for {found.groups[answered]}: {-count}")
    if found.difference is not None:
        show_difference(found.difference)


def show_circuit(circuit: Circuit) -> None:
    """Print a circuit: a summary, and what each block keeps for each token kind.

    Heads and neurons where parts were cut, edges by the target that reads them where edges were.
    """
    console = Terminal(soft_wrap=True)
    for line in circuit_lines(circuit):
        console.print(line)
    graph, edges, neurons = circuit.graph, _cuts_edges(circuit), circuit.neurons
    table = Table(
        title=f"kept {'edges' if edges else 'parts'}, of those that could reach the classifier"
    )
    headers = ["block", *(["tokens"] if graph.kinds else []), "heads"]
    headers += [] if neurons is None else ["which", "neurons"]
    headers += [*(f"to {letter}" for letter in LETTERS), "to mlp"] if edges else []
    for header in headers:
        table.add_column(header, justify="left" if header in {"tokens", "which"} else "right")
    table.columns[0].justify = "left"

    def kept_of(targets: list[int]) -> str:
        useful = graph.useful_edges[:, targets]
        kept = int((circuit.kept[:, targets] & useful).sum())
        return f"{kept} / {int(useful.sum())}" if useful.any() else _DEAD

    useful = graph.find_live(graph.edges)[1]
    for layer in range(graph.num_layers):
        for kind in range(graph.num_kinds):
            heads = circuit.heads_on_path[layer, :, kind]
            alive = useful[graph.head_source(layer, 0, kind)]
            cells = ["" if kind else str(layer), *graph.kinds[kind : kind + 1]]
            cells.append(f"{int(heads.sum())} / {len(heads)}" if alive else _DEAD)
            if neurons is not None:
                mlp = graph.mlp_source(layer, kind)
                own = neurons[layer, kind] & circuit.live_sources[mlp]
                cells.append(" ".join(str(head) for head in heads.nonzero()[0]))
                cells.append(f"{int(own.sum())} / {len(own)}" if useful[mlp] else _DEAD)
            if edges:
                cells += [kept_of([*graph.letter_targets(layer, one, kind)]) for one in LETTERS]
                cells.append(kept_of([graph.mlp_target(layer, kind)]))
            table.add_row(*cells)
    if edges:
        table.add_section()
        for target in graph.classifiers:
            tokens = [graph.targets[target].kind or ""] if graph.kinds else []
            blank = [""] * (len(headers) - 2 - len(tokens))
            table.add_row("classifier", *tokens, *blank, kept_of([target]))
    console.print_table(table, keys=2 if graph.kinds else 1)
    if circuit.positions is not None:
        side = math.isqrt(len(circuit.positions))
        console.print("positions kept (#), on the image's grid of patches:")
        for row in circuit.positions.reshape(side, -1):
            console.print("  " + " ".join("#" if kept else "." for kept in row))


def circuit_lines(circuit: Circuit) -> Iterator[str]:
    """A circuit in a few lines."""
    graph = circuit.graph
    tau = "" if circuit.tau is None else f", tau {circuit.tau:g}"
    yield f"circuit by {circuit.method}{tau}, {circuit.ablation} ablation, task {circuit.task}"
    heads = f"heads kept {circuit.num_heads_kept} of {graph.num_layers * graph.num_heads}"
    heads += " (in any token kind)" if graph.kinds else ""
    if circuit.neurons is not None:
        heads += f", neurons kept {circuit.neurons_kept_fraction:.1%}"
    if circuit.positions is not None:
        kept, total = int(circuit.positions.sum()), len(circuit.positions)
        heads += f", positions kept {kept} of {total}"
    if _cuts_edges(circuit):
        cut = 1 - circuit.num_kept / graph.num_useful_edges
        edges = f"edges kept {circuit.num_kept} of {graph.num_useful_edges} ({cut:.1%} cut)"
        heads = f"{edges}, {heads}"
    yield heads
    found = circuit.provenance
    if set(found) >= _SEARCH_FACTS:
        took = "" if found["seconds"] is None else f", {found['seconds']} s"
        yield (
            f"searched under {circuit.discovered_under} ablation: KL {found['kl']:.4f} nats on "
            f"{found['pairs']} pairs; {found['node_evaluations']} node evaluations, "
            f"{found['oracle_calls']} oracle calls{took}"
        )
    for merged in found.get("merges", ()):
        yield (
            f"then merged: {merged['edges_restored']} edges came back to circuit "
            f"{merged['parent'][:12]}, predicted cost {merged['cost_before']:.4g} -> "
            f"{merged['cost_after']:.4g}"
        )


def show_plan(plan: "Plan", *, costs: "list[CostModel] | None" = None) -> None:
    """Print what a compact model computes, block by block, for which tokens.

    Args:
        plan: The plan.
        costs: Adds the times of each part that these predict, in microseconds.
    """
    from vitcut.compact.operations import count_macs, dense_macs, describe

    costs = costs or []
    table = Table(title="plan", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("part", "tokens", "sums", "heads", "neurons", "MACs"):
        justify = "left" if name in {"part", "tokens"} else "right"
        table.add_column(name, no_wrap=True, justify=justify)
    by_part = [one.latency_by_part(plan) for one in costs]
    for one in costs:
        table.add_column(f"us, {one.batch}", no_wrap=True, justify="right")
    rows, part = describe(plan), ""
    for row in rows:
        mark = "*" if row.absorbed else ""
        name, part = row.part if row.part != part else "", row.part
        table.add_row(
            name,
            row.tokens,
            str(row.streams or ""),
            f"{row.heads}{mark} x {row.query_rows}" if row.heads else "",
            f"{row.neurons} x {row.mlp_rows}" if row.neurons else "",
            f"{row.macs:,}",
            *(f"{1000 * known[name]:,.0f}" if name else "" for known in by_part),
        )
    total, dense = count_macs(plan), dense_macs(plan.shape)
    table.add_section()
    spent = [f"{1000 * one.latency_ms(plan):,.0f}" for one in costs]
    table.add_row("all", f"{total / dense:.1%} of dense", "", "", "", f"{total:,}", *spent)
    notes = ["counts x tokens"]
    if any(row.absorbed for row in rows):
        notes.append("* few queries: without keys or values of their own")
    if costs:
        batches = " and ".join(str(one.batch) for one in costs)
        notes.append(
            f"us: predicted, ONNX Runtime, one thread, {batches} images ({costs[0].origin} costs)"
        )
    table.caption = "; ".join(notes)
    Terminal().print_table(table, keys=2)


def _cuts_edges(circuit: Circuit) -> bool:
    """Whether edges were cut one by one; those of cut heads and MLPs only follow."""
    return circuit.neurons is None or circuit.read_by_all is None


def _model_folder(path: Path) -> Path | None:
    for folder in (path / "model", path):
        if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
            return folder
    return None


def show_exported(exported: "list[Exported]") -> None:
    """Print where each file of an export is, how large it is, and how it compares with torch."""
    for item in exported:
        about = item.about
        parity = about["parity"]
        sys.stdout.write(
            f"{item.target}: {item.folder / about['file']}, {about['bytes'] / 1e6:.2f} MB; "
            f"{parity['labels_equal']} of {parity['images']} answers as torch's on "
            f"{about['parity_on']}, {parity['of'].partition(',')[0]} differ by at most "
            f"{parity['max_abs_diff']:.1g}\n"
        )
