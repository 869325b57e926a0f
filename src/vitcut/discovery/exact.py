"""Exact scores: cut each edge alone and measure. Slow; what faster scores are compared with."""

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.intervention.oracle import Oracle
from vitcut.progress import track


def exact_scores(
    oracle: Oracle, graph: Graph, *, edges: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """The mean KL(full || circuit) of cutting one edge and nothing else, for every edge.

    Args:
        oracle: Measures on its pairs and under its ablation; one full masked forward per edge.
        graph: The graph of the oracle's model.
        edges: Which edges to measure, shape [sources, targets]; all of them if None.

    Returns:
        Scores in nats, shape [sources, targets]; NaN where nothing was measured.

    Raises:
        CircuitError: ``edges`` marks what is no edge of the graph.
    """
    chosen = graph.edges if edges is None else edges
    if chosen.shape != graph.edges.shape or (chosen & ~graph.edges).any():
        raise CircuitError(
            f"edges must mark edges of a graph of shape {graph.edges.shape} (sources, targets), "
            f"got shape {chosen.shape} with others marked: build it from graph.edges"
        )
    scores = np.full(graph.edges.shape, np.nan)
    kept = graph.edges.copy()
    todo = np.argwhere(chosen)
    for source, target in track(todo, "cutting each edge alone", len(todo), unit="edges"):
        kept[source, target] = False
        scores[source, target] = oracle.kl(kept)
        kept[source, target] = True
    return scores
