"""Hypothesis strategies for tiny ViTs, cost models, and circuits of every density and structure."""

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
CHANGES = (
    *("q", "k", "v", "mlp", "some targets", "some sources"),
    *("most of embed", "embed for k and v alone", "all targets read alike", "one path"),
)
"""What `circuits` may do to random edges: cut all inputs of a letter, some targets, ..."""


def skipping_a_head(graph: Graph) -> Circuit:
    """The full circuit, but no MLP and no classifier reads head 1 of any block."""
    readers = [target.role in {"mlp", "classifier"} for target in graph.targets]
    skipped = [source.role == "head" and source.head == 1 for source in graph.sources]
    kept = graph.edges & ~np.outer(skipped, readers)
    return Circuit(graph=graph, kept=kept, ablation="mean")


def parts_per_kind(weights: ViTWeights) -> Circuit:
    """All heads of the first kinds; of the patches one head and half the neurons of block 0."""
    graph = weights.split_graph
    patch = graph.num_kinds - 1
    heads = np.ones((graph.num_layers, graph.num_heads, graph.num_kinds), dtype=np.bool_)
    heads[:, :, patch] = False
    heads[0, 0, patch] = True
    neurons = np.ones((graph.num_layers, graph.num_kinds, weights.num_neurons), dtype=np.bool_)
    neurons[0, patch, ::2] = False
    circuit = Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation="linear")
    kept = circuit.kept.copy()
    kept[[graph.mlp_source(layer, patch) for layer in range(1, graph.num_layers)]] = False
    return replace(circuit, kept=kept)


def undisturbed(draw_value):
    """Make a strategy leave Python's global generator as it was.

    The shape checks of beartype draw from it, which Hypothesis takes for a flaky strategy.
    """

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
    """Tiny ViTs with every combination of supported features; half of them are plain."""
    some = st.booleans() if draw(st.booleans()) else st.just(value=False)
    # Class token and at most one register, unless the readout is drawn too.
    num_prefix = draw(st.integers(1, 2))
    num_read, patch_readout = 1, "none"
    if draw(some):
        num_prefix = draw(st.integers(0, 2))
        num_read = draw(st.integers(0, num_prefix))
        # A classifier that reads no prefix token must read the patches.
        readouts = ["normed_mean", "mean", *(["none"] if num_read else [])]
        patch_readout = draw(st.sampled_from(readouts))
    rotary, neuron_norm = draw(some), draw(some)
    return random_vit(
        draw(st.integers(0, 10**6)),
        num_layers=draw(st.integers(1, max_layers)),
        num_heads=draw(st.integers(1, max_heads)),
        width=draw(st.integers(4, 12)),
        head_dim=draw(st.sampled_from([2, 4] if rotary else [1, 2, 3, 4])),
        # A LayerNorm over very few numbers is nearly a step function.
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
    """Random prices of operations, so that the compiler picks each way to compute the same."""
    factors = st.sampled_from([0.0, 0.01, 1.0, 100.0])
    nanoseconds = {unit: cost * draw(factors) for unit, cost in CostModel().nanoseconds.items()}
    return CostModel(nanoseconds=nanoseconds, batch=draw(st.sampled_from([1, 64])))


@st.composite
@undisturbed
def split_circuits(draw: st.DrawFn, weights: ViTWeights) -> Circuit:
    """Circuits of edges, heads, neurons and positions, over all tokens or per kind, any fill."""
    graph = weights.graph_of(draw(st.sampled_from(["all", "split"])))
    circuit = draw(circuits(graph))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    kept, neurons = circuit.kept.copy(), None
    if draw(st.booleans()):
        # A circuit of parts: whole sources are cut, all edges of the others kept.
        kept = graph.edges.copy()
        kept[random.random(len(graph.sources)) < draw(st.sampled_from(DENSITIES))] = False
        kept[: graph.num_kinds] = graph.edges[: graph.num_kinds]
    if draw(st.booleans()):
        shape = (graph.num_layers, graph.num_kinds, weights.num_neurons)
        neurons = random.random(shape) < draw(st.sampled_from(DENSITIES))
    positions = None
    if draw(st.booleans()):
        positions = random.random(len(weights.positions)) < draw(st.sampled_from(DENSITIES))
        positions[random.integers(len(positions))] = True
    ablation = draw(st.sampled_from(["zero", "mean", "linear"]))
    return replace(circuit, kept=kept, neurons=neurons, positions=positions, ablation=ablation)


@st.composite
@undisturbed
def circuits(draw: st.DrawFn, graph: Graph) -> Circuit:
    """Random edges at some density, then up to two changes that give the circuit structure."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    density = draw(st.sampled_from(DENSITIES))
    kept = graph.edges & (random.random(graph.edges.shape) < density)
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        _change(kept, graph, random, change)
    if draw(st.integers(0, 3)):
        # Most random cuts leave logits that are the same for every image. Two short paths
        # embed -> k or v of a head -> classifier make them depend on the patches.
        for _ in range(2):
            layer, head = random.integers(graph.num_layers), random.integers(graph.num_heads)
            letter, patch = ("v" if random.random() < 0.5 else "k"), graph.num_kinds - 1
            kept[patch, graph.head_target(int(layer), int(head), letter, patch)] = True
            kept[graph.head_source(int(layer), int(head)), graph.classifier] = True
    ablation = draw(st.sampled_from(["zero", "mean"]))
    return Circuit(graph=graph, kept=kept & graph.edges, ablation=ablation)


def _change(
    kept: NDArray[np.bool_], graph: Graph, random: np.random.Generator, change: str
) -> None:
    """Cut or restore edges in place, as one of `CHANGES` says."""
    roles = np.array([target.role for target in graph.targets])
    match change:
        case "q" | "k" | "v" | "mlp":
            # These inputs become constant.
            kept[:, roles == change] = False
        case "some targets":
            kept[:, random.random(len(graph.targets)) < 0.4] = False
        case "some sources":
            kept[random.random(len(graph.sources)) < 0.4] = False
        case "most of embed":
            kept[: graph.num_kinds, random.random(len(graph.targets)) < 0.8] = False
        case "embed for k and v alone":
            kept[: graph.num_kinds] = np.isin(roles, ["k", "v"])
        case "all targets read alike":
            # The compiler lets them share a stream.
            kept[:] = kept[:, random.integers(len(graph.targets))][:, None]
        case "one path":
            kept[:] = False
            source = 0
            while random.random() < 0.8:
                later = np.flatnonzero(graph.edges[source]).tolist()
                targets = [target for target in later if graph.sources_of(target)]
                if not targets:
                    break
                target = int(random.choice(targets))
                kept[source, target] = True
                source = graph.sources_of(target)[0]
            kept[source, list(graph.classifiers)] = True
        case _:
            raise ValueError(change)
