"""Naive ACDC: what the fast one must reproduce decision by decision."""

from vitcut.discovery.decision_log import Decision
from vitcut.masked.oracle import Oracle
from vitcut.names import Criterion


def naive_acdc(
    oracle: Oracle, *, tau: float, criterion: Criterion = "increment"
) -> tuple[Decision, ...]:
    """One full float64 masked forward per edge."""
    graph, kept = oracle.graph, oracle.graph.edges.copy()
    current = oracle.kl(kept)
    decisions: list[Decision] = []
    for target in graph.backward_order():
        for source in reversed(graph.readable(target)):
            kept[source, target] = False
            kl = oracle.kl(kept)
            cut = (kl if criterion == "total" else kl - current) < tau
            increment, kept[source, target] = kl - current, not cut
            current = kl if cut else current
            names = {"source": graph.sources[source].name, "target": graph.targets[target].name}
            decisions.append(
                Decision(**names, cut=cut, increment=increment, kl=current, decided_by="oracle")
            )
    return tuple(decisions)
