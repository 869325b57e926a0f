"""ACDC: test edges one by one, from the classifier backwards, and cut those that matter little.

Conmy et al. 2023, arXiv:2304.14997, with the order of their code 1.1; edges are counted as in EAP
and AutoCircuit. The fast path is a filter: where it comes within a guard of tau, the float64
oracle decides, so the circuit is the one that the naive algorithm (``acdc_reference``) finds.
Propagating one change is left to ``propagation``, measuring by definition to the oracle.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.discovery.propagation import Cache, Propagation
from vitcut.discovery.settings import DiscoverConfig
from vitcut.errors import ArtefactError, ExactnessError
from vitcut.graph import Graph
from vitcut.intervention.oracle import Oracle
from vitcut.names import Criterion
from vitcut.progress import Meter, say
from vitcut.vits.weights import ViTWeights


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of one edge; one line of ``decisions.jsonl``."""

    source: str
    target: str
    cut: bool
    increment: float | None
    """Rise of the mean KL in nats; None for an untested edge into a dead target."""
    kl: float
    """Mean KL of the circuit after this decision, in nats."""
    decided_by: str
    """``fast``, ``oracle`` or ``dead``."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The outcome of one ACDC run."""

    kept: NDArray[np.bool_]
    """Shape [sources, targets]."""
    decisions: tuple[Decision, ...]
    kl: float
    """Mean KL(full || circuit) in nats, measured by the oracle."""
    node_evaluations: int
    """Sources recomputed by this process; naive ACDC takes edges x sources."""
    oracle_calls: int
    seconds: float
    """Of this process; a resumed run counts what it did itself."""


def guard(tau: float) -> float:
    """How near to tau the fast path is not trusted, in nats."""
    return max(1e-6, 1e-3 * tau)


def acdc(
    weights: ViTWeights,
    oracle: Oracle,
    config: DiscoverConfig,
    *,
    cache: Cache | None = None,
    log: Path | None = None,
) -> Search:
    """Search one circuit.

    Args:
        weights: The model.
        oracle: Measures on the pairs and under the ablation that the circuit is for.
        config: tau, criterion, memory and precision.
        cache: Activations of an earlier search on the same oracle; built when None.
        log: Decisions are appended here; a log cut short by a kill is continued.

    Raises:
        ConfigError: The activations do not fit into ``config.memory_gib``.
        ArtefactError: ``log`` does not belong to this search.
        ExactnessError: The fast path lost more precision than the guard allows for.
    """
    start = time.perf_counter()
    cache = build_cache(weights, oracle, config) if cache is None else cache
    calls = oracle.calls
    decision_log = _Log(log, weights.graph)
    search = _Search(weights, oracle, config, cache)
    with Meter(f"ACDC tau {config.tau:g}", weights.graph.num_edges, unit="edges") as meter:
        for stage in stages(weights.graph):
            decisions = decision_log.take(stage)
            if decisions is None:
                decisions = search.decide(stage)
                decision_log.append(decisions)
            search.take(decisions)
            meter.advance(len(decisions), note=f"KL {search.kl:.4g}")
    return Search(
        kept=search.kept,
        decisions=tuple(search.decisions),
        kl=oracle.kl(search.kept),
        node_evaluations=search.node_evaluations,
        oracle_calls=oracle.calls - calls,
        seconds=time.perf_counter() - start,
    )


def build_cache(weights: ViTWeights, oracle: Oracle, config: DiscoverConfig) -> Cache:
    """The activations that every tau on this oracle shares."""
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return Cache.build(weights, oracle, memory_gib=config.memory_gib, dtype=dtype)


def stages(graph: Graph) -> Iterator[tuple[int, ...]]:
    """The targets in ACDC's order, in runs of one block and kind: where the state is rebuilt."""

    def place(target: int) -> tuple[int, str]:
        return graph.targets[target].layer, graph.targets[target].kind

    for _, run in groupby(graph.backward_order(), key=place):
        yield tuple(run)


def acdc_reference(
    oracle: Oracle, graph: Graph, *, tau: float, criterion: Criterion = "increment"
) -> tuple[Decision, ...]:
    """Naive ACDC, one full float64 masked forward per edge: what ``acdc`` must reproduce."""
    kept = graph.edges.copy()
    current = oracle.kl(kept)
    decisions: list[Decision] = []
    for target in graph.backward_order():
        for source in reversed(range(graph.num_readable(target))):
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


class _Search:
    """The circuit decided so far, and how the next stage is decided."""

    def __init__(
        self, weights: ViTWeights, oracle: Oracle, config: DiscoverConfig, cache: Cache
    ) -> None:
        self._weights = weights
        self._oracle = oracle
        self._config = config
        self._state = Propagation(weights, cache, oracle)
        self.kept = weights.graph.edges.copy()
        self.kl = 0.0
        self.decisions: list[Decision] = []
        self.node_evaluations = 0

    def take(self, decisions: list[Decision]) -> None:
        """Make the decisions of a stage final."""
        graph = self._weights.graph
        for item in decisions:
            edge = graph.source_numbers[item.source], graph.target_numbers[item.target]
            self.kept[edge] = not item.cut
        self.kl = decisions[-1].kl
        self.decisions += decisions

    def decide(self, stage: tuple[int, ...]) -> list[Decision]:
        """Decide every edge into the targets of one stage; again in float64 if float32 drifts."""
        allowed = guard(self._config.tau) / 10
        attempt = self._attempt(stage)
        if attempt.drift() > allowed and self._state.dtype != torch.float64:
            say(f"the KL drifted by {attempt.drift():.1g} in float32: going on in float64")
            precise = replace(self._config, precision="float64")
            cache = build_cache(self._weights, self._oracle, precise)
            self._state = Propagation(self._weights, cache, self._oracle)
            attempt = self._attempt(stage)
        if not attempt.drift() <= allowed:
            raise ExactnessError(
                f"ACDC's running KL drifted by {attempt.drift():.1g} nats, at most {allowed:.1g} "
                f"is allowed at tau {self._config.tau:g}: choose a larger tau"
            )
        return attempt.decisions

    def _attempt(self, stage: tuple[int, ...]) -> "_Attempt":
        attempt = _Attempt(self._weights.graph, self._state, self._oracle, self._config)
        attempt.run(stage, self.kept.copy())
        self.node_evaluations += self._state.take_evaluations()
        return attempt


class _Attempt:
    """One stage, decided edge by edge from a state computed afresh."""

    def __init__(
        self, graph: Graph, state: Propagation, oracle: Oracle, config: DiscoverConfig
    ) -> None:
        self._graph = graph
        self._state = state
        self._oracle = oracle
        self._config = config
        self.decisions: list[Decision] = []

    def run(self, stage: tuple[int, ...], kept: NDArray[np.bool_]) -> None:
        """Decide every edge into the targets of ``stage``; ``kept`` is changed."""
        self._kept = kept
        frontier = self._graph.targets[stage[0]].layer
        self._kl = self._state.rebuild(kept, frontier)
        for target in stage:
            decide = self._test if self._state.is_live(target) else self._drop
            for source in reversed(range(self._graph.num_readable(target))):
                self.decisions.append(decide(source, target))
        self._fresh_kl = self._state.rebuild(kept, frontier)

    def drift(self) -> float:
        """How far the running KL is from the one of a state computed afresh, in nats."""
        return abs(self._kl - self._fresh_kl)

    def _drop(self, source: int, target: int) -> Decision:
        self._kept[source, target] = False
        return self._decision(source, target, increment=None, decided_by="dead")

    def _test(self, source: int, target: int) -> Decision:
        trial = self._state.try_cut(source, target)
        increment = trial.kl - self._kl
        compared = trial.kl if self._config.criterion == "total" else increment
        near = abs(compared - self._config.tau) <= guard(self._config.tau)
        if near:
            increment, compared = self._ask_oracle(source, target)
        if compared < self._config.tau:
            self._kept[source, target] = False
            self._state.accept(trial)
            self._kl = trial.kl
        decided_by = "oracle" if near else "fast"
        return self._decision(source, target, increment=increment, decided_by=decided_by)

    def _ask_oracle(self, source: int, target: int) -> tuple[float, float]:
        """The increment, and the value to compare with tau, by definition."""
        before = self._oracle.kl(self._kept)
        without = self._kept.copy()
        without[source, target] = False
        after = self._oracle.kl(without)
        increment = after - before
        return increment, after if self._config.criterion == "total" else increment

    def _decision(
        self, source: int, target: int, *, increment: float | None, decided_by: str
    ) -> Decision:
        return Decision(
            source=self._graph.sources[source].name,
            target=self._graph.targets[target].name,
            cut=not self._kept[source, target],
            increment=increment,
            kl=self._kl,
            decided_by=decided_by,
        )


class _Log:
    """``decisions.jsonl``: stages that are complete in it are taken, the rest is cut off."""

    def __init__(self, path: Path | None, graph: Graph) -> None:
        self._path = path
        self._graph = graph
        self._earlier: list[Decision] = []
        self._taken = 0
        self._read_up = False
        if path is not None and path.exists():
            self._earlier = list(_read_decisions(path))

    def take(self, stage: tuple[int, ...]) -> list[Decision] | None:
        """The logged decisions of a stage, or None from the first incomplete one on."""
        if self._path is None or self._read_up:
            return None
        edges = [
            (self._graph.sources[source].name, self._graph.targets[target].name)
            for target in stage
            for source in reversed(range(self._graph.num_readable(target)))
        ]
        found = self._earlier[self._taken : self._taken + len(edges)]
        if [(item.source, item.target) for item in found] != edges[: len(found)]:
            raise ArtefactError(
                f"{self._path} logs another search: expected {edges[0][0]} -> {edges[0][1]} after "
                f"{self._taken} decisions; choose another --out"
            )
        if len(found) < len(edges):
            self._read_up = True
            _keep_lines(self._path, self._taken)
            return None
        self._taken += len(edges)
        return found

    def append(self, decisions: list[Decision]) -> None:
        """Write one line per decision."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(vars(item)) + "\n" for item in decisions)


def _keep_lines(path: Path, count: int) -> None:
    """Cut a file off after its first lines."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)[:count]
        with path.open("r+b") as stream:
            stream.truncate(sum(len(line) for line in lines))


def _read_decisions(path: Path) -> Iterator[Decision]:
    """Decisions up to the first line that a kill cut short."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        try:
            fields: dict[str, Any] = json.loads(line)
            decision = Decision(**fields)
        except (json.JSONDecodeError, TypeError) as error:
            raise ArtefactError(f"{path} is not a decision log: {error}; delete it") from None
        yield decision
