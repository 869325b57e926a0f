"""Hypothesis strategies: tiny ViTs, and circuits of every density and structure."""

import functools
import random as global_random
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import random_vit

from vitcut.circuit import Circuit
from vitcut.compiler.cost import CostModel
from vitcut.graph import Graph
from vitcut.model.weights import ViTWeights

DENSITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def skipping_a_head(graph: Graph) -> Circuit:
    """The full circuit in which no MLP and no classifier reads the middle head of a block."""
    kept = graph.edges.copy()
    readers = [target.role in {"mlp", "classifier"} for target in graph.targets]
    middle = [source.role == "head" and source.head == 1 for source in graph.sources]
    kept[np.outer(middle, readers)] = False
    return Circuit(graph=graph, kept=kept, ablation="mean")


def parts_per_group(weights: ViTWeights) -> Circuit:
    """All class-token heads; of the patches one head and some neurons, in the first block only."""
    graph = weights.split_graph
    patch = graph.num_kinds - 1
    kept = graph.edges.copy()
    neurons = np.ones((graph.num_layers, graph.num_kinds, weights.num_neurons), dtype=np.bool_)
    neurons[0, patch, ::2] = False
    for layer in range(graph.num_layers):
        for head in range(1 if layer == 0 else 0, graph.num_heads):
            kept[graph.head_source(layer, head, patch)] = False
        if layer:
            kept[graph.mlp_source(layer, patch)] = False
    return Circuit(graph=graph, kept=kept, neurons=neurons, ablation="linear")


def undisturbed(draw_value):
    """Restore the global generator: beartype draws from it, and Hypothesis refuses that."""

    @functools.wraps(draw_value)
    def wrapped(*args, **kwargs):
        state = global_random.getstate()
        value = draw_value(*args, **kwargs)
        global_random.setstate(state)
        return value

    return wrapped


@st.composite
@undisturbed
def vits(draw: st.DrawFn, max_layers: int = 3, max_heads: int = 3) -> ViTWeights:
    """ViTs of every kind that is understood; half of them are plain."""
    some = st.booleans() if draw(st.booleans()) else st.just(value=False)
    num_prefix = draw(st.integers(1, 2))
    num_read, patch_readout = 1, "none"
    if draw(some):
        num_prefix = draw(st.integers(0, 2))
        num_read = draw(st.integers(0, num_prefix))
        kinds = ["normed_mean", "mean", *(["none"] if num_read else [])]
        patch_readout = draw(st.sampled_from(kinds))
    rotary, neuron_norm = draw(some), draw(some)
    return random_vit(
        draw(st.integers(0, 10**6)),
        num_layers=draw(st.integers(1, max_layers)),
        num_heads=draw(st.integers(1, max_heads)),
        width=draw(st.integers(4, 12)),
        head_dim=draw(st.sampled_from([2, 4] if rotary else [1, 2, 3, 4])),
        # Of few numbers a LayerNorm is nearly a step.
        hidden=draw(st.integers(4 if neuron_norm else 1, 9)),
        patches_per_side=draw(st.integers(1, 2)),
        patch_size=draw(st.integers(1, 2)),
        num_prefix=num_prefix,
        num_read=num_read,
        patch_readout=patch_readout,
        embed_norm=draw(some),
        final_norm=not draw(some),
        head_norm=draw(some),
        rotary=rotary,
        shared_rotation=draw(st.booleans()) if rotary else True,
        gated=draw(some),
        neuron_norm=neuron_norm,
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])),
    )


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    """Costs that prefer now one way to compute the same, now another."""
    factors = st.sampled_from([0.0, 0.01, 1.0, 100.0])
    nanoseconds = {unit: cost * draw(factors) for unit, cost in CostModel().nanoseconds.items()}
    return CostModel(nanoseconds=nanoseconds, batch=draw(st.sampled_from([1, 64])))


@st.composite
@undisturbed
def split_circuits(draw: st.DrawFn, weights: ViTWeights) -> Circuit:
    """Random circuits of edges, heads and neurons, over whole tokens or per kind, also linear."""
    graph = weights.graph_of(draw(st.sampled_from(["all", "split"])))
    circuit = draw(circuits(graph))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    kept, neurons = circuit.kept.copy(), None
    if draw(st.booleans()):
        # Parts only: every edge is there, then whole sources are cut.
        kept = graph.edges.copy()
        kept[random.random(len(graph.sources)) < draw(st.sampled_from(DENSITIES))] = False
        kept[0 : graph.num_kinds] = graph.edges[0 : graph.num_kinds]
    if draw(st.booleans()):
        shape = (graph.num_layers, graph.num_kinds, weights.num_neurons)
        neurons = random.random(shape) < draw(st.sampled_from(DENSITIES))
    ablation = draw(st.sampled_from(["zero", "mean", "linear"]))
    return replace(circuit, kept=kept, neurons=neurons, ablation=ablation)


@st.composite
@undisturbed
def circuits(draw: st.DrawFn, graph: Graph) -> Circuit:
    """Random edges at some density, then whole targets and sources cut or restored."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    density = draw(st.sampled_from(DENSITIES))
    kept = graph.edges & (random.random(graph.edges.shape) < density)
    for change in draw(st.lists(st.sampled_from(sorted(_CHANGES)), max_size=2)):
        _CHANGES[change](kept, graph, random)
    if draw(st.integers(0, 3)):
        _connect(kept, graph, random)
    ablation = draw(st.sampled_from(["zero", "mean"]))
    return Circuit(graph=graph, kept=kept & graph.edges, ablation=ablation)


def _cut_letter(letter: str):
    def cut(kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator) -> None:
        kept[:, [target.role == letter for target in graph.targets]] = False

    return cut


def _cut_some_targets(kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator) -> None:
    kept[:, random.random(len(graph.targets)) < 0.4] = False


def _cut_some_sources(kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator) -> None:
    kept[random.random(len(graph.sources)) < 0.4] = False


def _read_alike(kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator) -> None:
    kept[:] = kept[:, random.integers(len(graph.targets))][:, None]


def _keep_embed_for_keys_and_values(
    kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator
) -> None:
    kept[: graph.num_kinds] = [target.role in {"k", "v"} for target in graph.targets]


def _cut_embed(kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator) -> None:
    kept[: graph.num_kinds, random.random(len(graph.targets)) < 0.8] = False


def _keep_one_path(kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator) -> None:
    kept[:] = False
    source, target = 0, graph.classifier
    while random.random() < 0.8:
        readers = [t for t in np.flatnonzero(graph.edges[source]).tolist() if graph.sources_of(t)]
        if not readers:
            break
        target = int(random.choice(readers))
        kept[source, target] = True
        source = graph.sources_of(target)[0]
    kept[source, list(graph.classifiers)] = True


def _connect(kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator) -> None:
    """Most random cuts leave nothing that depends on the image; these let embed through."""
    for _ in range(2):
        layer, head = int(random.integers(graph.num_layers)), int(random.integers(graph.num_heads))
        last = graph.num_kinds - 1
        letter = "v" if random.random() < 0.5 else "k"
        kept[last, graph.head_target(layer, head, letter, last)] = True
        kept[graph.head_source(layer, head), graph.classifier] = True


_CHANGES = {
    "cut_q": _cut_letter("q"),
    "cut_k": _cut_letter("k"),
    "cut_v": _cut_letter("v"),
    "cut_mlp": _cut_letter("mlp"),
    "cut_some_targets": _cut_some_targets,
    "cut_some_sources": _cut_some_sources,
    "cut_embed": _cut_embed,
    "read_alike": _read_alike,
    "embed_for_kv": _keep_embed_for_keys_and_values,
    "one_path": _keep_one_path,
}
