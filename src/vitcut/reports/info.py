"""What a model is, before anything is done with it: sizes, parts, classes, the smallest budget."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from vitcut.preprocessing import Preprocessing
from vitcut.progress import Terminal
from vitcut.results import Point
from vitcut.selection.settings import Budget

if TYPE_CHECKING:
    from vitcut.compact.model import CompactViT
    from vitcut.compact.plan import ViTShape
    from vitcut.compiler.cut import Cut
    from vitcut.model.model import Model

_FIRST = 5
"""How many classes are named."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is known about a model without running it on images."""

    name: str
    shape: "ViTShape"
    """The sizes of the dense model, or of the one that a cut was made from."""
    point: Point
    """Parts, parameters and MACs."""
    dense_macs: int
    preprocessing: Preprocessing | None
    """How images are prepared; None if the model does not say."""
    class_names: tuple[str, ...]
    """One per logit; empty if the model does not say."""
    group_names: tuple[str, ...] = ()
    """The task that a cut was made for; empty for a dense model."""
    num_edges: tuple[int, int] | None = None
    """Over whole tokens, and per token kind; None for a cut."""
    smallest_fraction: float | None = None
    """MACs of the smallest cut that still sees the image, as a fraction; None for a cut."""
    uncut_fraction: float | None = None
    """MACs once compiled without cutting anything, as a fraction; None for a cut."""
    source_model: str | None = None
    """What a cut was made from, if it says so."""
    source_sha256: str | None = None


def describe(model: "Model | CompactViT | Cut") -> Info:
    """Look at a loaded model, and for a dense one, plan the smallest cut."""
    from vitcut.benchmark.points import dense_point
    from vitcut.circuit import Circuit
    from vitcut.compact.model import CompactViT
    from vitcut.compact.operations import count_macs, dense_macs
    from vitcut.compiler.cost import CostModel
    from vitcut.compiler.cut import Cut
    from vitcut.compiler.planning import plan_circuit
    from vitcut.selection.greedy import Alive
    from vitcut.selection.rounds import smallest_cost

    if isinstance(model, (Cut, CompactViT)):
        cut = Cut(model=model, circuit=None) if isinstance(model, CompactViT) else model
        shape, known = cut.model.plan.shape, cut.model.info
        return Info(
            name=cut.name if cut.folder is None else str(cut.folder),
            shape=shape,
            point=cut.point(),
            dense_macs=dense_macs(shape),
            preprocessing=known.preprocessing,
            class_names=known.class_names,
            group_names=known.group_names,
            source_model=known.source_model,
            source_sha256=known.source_sha256,
        )
    weights = model.weights
    shape, costs, graph = weights.shape, CostModel(), weights.graph_of(Budget().tokens)
    dense = dense_macs(shape)

    def macs(circuit: Circuit) -> float:
        return count_macs(plan_circuit(shape, circuit, costs))

    uncut = Alive.useful(graph, weights.num_neurons).circuit(graph, "mean")
    return Info(
        name=model.name,
        shape=shape,
        point=dense_point(model, name=model.name),
        dense_macs=dense,
        preprocessing=model.preprocessing,
        class_names=() if model.labels is None else model.labels.names,
        num_edges=(weights.graph.num_useful_edges, weights.split_graph.num_useful_edges),
        smallest_fraction=smallest_cost(graph, weights.num_neurons, macs) / dense,
        uncut_fraction=macs(uncut) / dense,
    )


def show_info(info: Info) -> None:
    """Print what is known about a model."""
    table = Table(title=info.name, show_header=False, box=None, padding=(0, 2, 0, 0))
    table.title_justify = "left"
    for name, text in _facts(info):
        table.add_row(name, text)
    Terminal().print(table)


def _facts(info: Info) -> Iterator[tuple[str, str]]:
    shape, point = info.shape, info.point
    cut = info.num_edges is None
    yield "model", "cut by vitcut" if cut else "dense, read and checked"
    if cut and info.source_model is not None:
        yield "cut from", f"{info.source_model} (weights {str(info.source_sha256)[:12]})"
    if point.ablation is not None:
        asked = "" if point.budget is None else f", to {point.budget}"
        yield "circuit", f"{point.method}, {point.ablation} ablation{asked}"
    yield (
        "size",
        f"{shape.num_layers} blocks x {shape.num_heads} heads of {shape.head_dim}, "
        + (f"width {shape.width}, {shape.hidden} neurons per MLP"),
    )
    if cut and point.heads_kept is not None:
        share = point.neurons_kept_fraction
        neurons = "" if share is None else f", {share:.1%} of the neurons"
        seen = shape.num_patches / shape.grid_size**2
        neurons += "" if seen == 1 else f", {seen:.1%} of the positions"
        yield "kept", f"{point.heads_kept} of {point.heads_total} heads{neurons}"
    special = {
        "gated MLPs": shape.gated,
        "rotary positions": shape.rotary,
        "qk-norm": shape.head_norm,
        "a norm over neurons": shape.neuron_norm,
        "a norm before the blocks": shape.embed_norm,
    }
    yield "MLP", ", ".join([shape.activation, *(name for name, there in special.items() if there)])
    kinds = ", ".join(f"{kind} {rows.count}" for kind, rows in shape.kind_rows.items())
    yield "tokens", f"{shape.num_tokens}: {kinds}; the classifier reads {', '.join(shape.readout)}"
    if info.num_edges is not None:
        whole, split = info.num_edges
        yield "edges", f"{whole:,} over whole tokens, {split:,} per token kind"
    macs = point.macs or 0
    yield "MACs", f"{macs / 1e6:,.2f} M" + (f" ({macs / info.dense_macs:.1%} of dense)" * cut)
    yield "parameters", f"{(point.params or 0) / 1e6:,.2f} M"
    if info.preprocessing is not None:
        taken = info.preprocessing
        mean, std = (" ".join(f"{x:g}" for x in values) for values in (taken.mean, taken.std))
        framing = taken.framing
        yield (
            "images",
            f"{taken.image_size} px, {framing.channels} channels, mean {mean}, "
            + (f"std {std}, {framing.interpolation}"),
        )
    names = info.class_names
    listed = ", ".join(names[:_FIRST]) + (", ..." if len(names) > _FIRST else "")
    yield "classes", f"{shape.num_classes}: {listed or 'the model does not name them'}"
    if info.group_names:
        yield "groups", ", ".join(info.group_names)
    if info.smallest_fraction is not None:
        yield (
            "budgets",
            f"target-macs from {info.smallest_fraction:.3f} to "
            + (f"{info.uncut_fraction:.3f} of dense"),
        )
