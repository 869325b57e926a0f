"""Exact scores: cut each part alone and measure. Slow; what faster scores are compared with."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import CircuitError
from vitcut.masked.oracle import Oracle
from vitcut.progress import track


def exact_edges(oracle: Oracle, edges: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The mean KL(full || circuit) of cutting one edge and nothing else, for every edge.

    Args:
        oracle: Measures on its pairs, tokens and under its ablation; one masked forward per edge.
        edges: Which edges to measure, shape [sources, targets]; all of them if None.

    Returns:
        Scores in nats, shape [sources, targets]; NaN where nothing was measured.

    Raises:
        CircuitError: ``edges`` has another shape, or marks what is no edge of the oracle's graph.
    """
    graph = oracle.graph
    chosen = graph.edges if edges is None else edges
    _require_shape("edges", chosen, graph.edges.shape, "(sources, targets)")
    if (chosen & ~graph.edges).any():
        source, target = np.argwhere(chosen & ~graph.edges)[0]
        raise CircuitError(
            f"{graph.sources[source].name} -> {graph.targets[target].name} is no edge of the "
            "oracle's graph: choose from graph.edges"
        )

    def without(edge: tuple[int, ...]) -> float:
        kept = graph.edges.copy()
        kept[edge] = False
        return oracle.kl(kept)

    return _measured(chosen, without, "edges")


def exact_heads(oracle: Oracle, heads: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The mean KL(full || circuit) of cutting one head in one token kind and nothing else.

    A head is cut with all the edges that it writes to. It writes to a whole token kind, or to all
    tokens where the oracle's graph has no kinds.

    Args:
        oracle: Measures on its pairs, tokens and under its ablation; one masked forward per head.
        heads: Which heads to measure, shape [blocks, heads, kinds]; all of them if None.

    Returns:
        Scores in nats, shape [blocks, heads, kinds]; NaN where nothing was measured.

    Raises:
        CircuitError: ``heads`` has another shape.
    """
    graph = oracle.graph
    shape = (graph.num_layers, graph.num_heads, graph.num_kinds)
    chosen = np.ones(shape, dtype=np.bool_) if heads is None else heads
    _require_shape("heads", chosen, shape, "(blocks, heads, kinds)")

    def without(head: tuple[int, ...]) -> float:
        kept = graph.edges.copy()
        kept[graph.head_source(*head)] = False
        return oracle.kl(kept)

    return _measured(chosen, without, "heads")


def exact_neurons(oracle: Oracle, neurons: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean KL(full || circuit) of cutting one neuron in one token kind and nothing else.

    Args:
        oracle: Measures on its pairs, tokens and under its ablation; one masked forward per neuron.
        neurons: Which neurons to measure, shape [blocks, kinds, neurons].

    Returns:
        Scores in nats, shape [blocks, kinds, neurons]; NaN where nothing was measured.

    Raises:
        CircuitError: ``neurons`` has another shape.
    """
    graph = oracle.graph
    shape = (graph.num_layers, graph.num_kinds, *neurons.shape[2:3])
    _require_shape("neurons", neurons, shape, "(blocks, kinds, neurons)")

    def without(neuron: tuple[int, ...]) -> float:
        kept = np.ones_like(neurons)
        kept[neuron] = False
        return oracle.kl(graph.edges, kept)

    return _measured(neurons, without, "neurons")


def _measured(
    chosen: NDArray[np.bool_], without: Callable[[tuple[int, ...]], float], unit: str
) -> NDArray[np.float64]:
    """What ``without`` gives for each chosen part."""
    scores = np.full(chosen.shape, np.nan)
    todo = [tuple(part) for part in np.argwhere(chosen).tolist()]
    for part in track(todo, f"cutting {unit} one at a time", len(todo), unit=unit):
        scores[part] = without(part)
    return scores


def _require_shape(
    name: str, chosen: NDArray[np.bool_], shape: tuple[int, ...], words: str
) -> None:
    if chosen.shape != shape:
        raise CircuitError(f"{name} must have shape {shape} {words}, got {chosen.shape}")
