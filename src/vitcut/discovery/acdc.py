"""ACDC: test edges one by one, from the classifier backwards, and cut those that matter little.

Conmy et al. 2023, arXiv:2304.14997, with the order of their code 1.1; edges are counted as in EAP
and AutoCircuit. The fast path is a filter: where it comes within a guard of tau, the float64
oracle decides, so the circuit is the one that the naive algorithm (``acdc_reference``) finds.
Propagating one change is left to ``propagation``, measuring by definition to the oracle.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.discovery.cache import Cache
from vitcut.discovery.decision_log import Decision, DecisionLog, Stage
from vitcut.discovery.propagation import Propagation
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError, ExactnessError
from vitcut.graph import Graph
from vitcut.masked.oracle import Oracle
from vitcut.model.weights import ViTWeights, map_tensors
from vitcut.names import LETTERS, Criterion
from vitcut.progress import Meter, say
from vitcut.settings import config_hash
from vitcut.shapes import Tensor


@dataclass(frozen=True, kw_only=True)
class Search:
    """The outcome of one ACDC run."""

    kept: NDArray[np.bool_]
    """Shape [sources, targets]."""
    decisions: tuple[Decision, ...]
    kl: float
    """Mean KL(full || circuit) in nats, measured by the oracle."""
    precision: str
    """Of the fast path at the end: float32, or float64 if that was asked for or needed."""
    node_evaluations: int
    """Sources recomputed; naive ACDC takes edges x sources."""
    oracle_calls: int
    """Full masked forwards over all pairs; naive ACDC takes one per edge."""
    seconds: float | None
    """None for a search that was resumed."""


def guard(tau: float) -> float:
    """How near to tau the fast path is not trusted, in nats."""
    return max(1e-6, 1e-3 * tau)


def acdc(
    weights: ViTWeights,
    oracle: Oracle,
    config: DiscoverSettings,
    *,
    cache: Cache | None = None,
    log: Path | None = None,
) -> Search:
    """Search one circuit.

    Args:
        weights: The model.
        oracle: Measures on the pairs, tokens and under the ablation that the circuit is for.
        config: tau, criterion, memory and precision; its tokens and ablation are the oracle's.
        cache: Activations of an earlier search on the same pairs and ablation; built when None.
        log: Decisions are appended here; a log cut short by a kill is continued.

    Raises:
        ConfigError: The activations do not fit into ``config.memory_gib``, or the oracle measures
            other circuits than those that are asked for.
        ArtefactError: ``log`` does not belong to this search.
        ExactnessError: The fast path lost more precision than the guard allows for.
    """
    start = time.perf_counter()
    _require_same("ablation", config.ablation, oracle.ablation)
    _require_same("tokens", config.tokens, oracle.graph.tokens)
    decision_log = DecisionLog(log, _identity(weights, oracle, config))
    resumed = bool(decision_log.stages)
    search = _Search(weights, oracle, config, cache, decision_log)
    kl = search.run()
    if not abs(kl - search.kl) <= _allowed_drift(config) and search.precision == "float32":
        say(f"float32 is {abs(kl - search.kl):.1g} nats off at the end: searching in float64")
        precise = replace(config, precision="float64")
        cache = Cache.build(weights, oracle, precise)
        decision_log.restart()
        search = _Search(weights, oracle, precise, cache, decision_log)
        kl = search.run()
    if not abs(kl - search.kl) <= _allowed_drift(config):
        raise _lost_precision(abs(kl - search.kl), config)
    return Search(
        kept=search.kept,
        decisions=tuple(item for stage in decision_log.stages for item in stage.decisions),
        kl=kl,
        precision=search.precision,
        node_evaluations=sum(stage.node_evaluations for stage in decision_log.stages),
        oracle_calls=sum(stage.oracle_calls for stage in decision_log.stages) + 1,
        seconds=None if resumed else time.perf_counter() - start,
    )


def stages(graph: Graph) -> Iterator[tuple[int, ...]]:
    """The targets in ACDC's order, in runs of one block and kind: where the state is rebuilt."""

    def place(target: int) -> tuple[int, str]:
        return graph.targets[target].layer, graph.targets[target].role

    for _, run in groupby(graph.backward_order(), key=place):
        yield tuple(run)


def acdc_reference(
    oracle: Oracle, *, tau: float, criterion: Criterion = "increment"
) -> tuple[Decision, ...]:
    """Naive ACDC, one full float64 masked forward per edge: what ``acdc`` must reproduce."""
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


class _Search:
    """The circuit decided so far, and how the next stage is decided."""

    def __init__(
        self,
        weights: ViTWeights,
        oracle: Oracle,
        config: DiscoverSettings,
        cache: Cache | None,
        log: DecisionLog,
    ) -> None:
        self._weights = weights
        self._oracle = oracle
        self._config = config
        self._cache = cache
        self._log = log
        self.precision = log.stages[-1].precision if log.stages else config.precision
        self._graph = oracle.graph
        self.kept = oracle.graph.edges.copy()
        self.kl = 0.0

    def run(self) -> float:
        """Decide every stage that is not logged yet; returns the oracle's KL of the circuit."""
        todo = list(stages(self._graph))
        self._log.require_edges(_edges(self._graph, targets) for targets in todo)
        for stage in self._log.stages:
            self._take(stage)
        del todo[: len(self._log.stages)]
        if todo:
            edges = sum(len(self._graph.readable(target)) for run in todo for target in run)
            state = self._state()
            with Meter(f"ACDC tau {self._config.tau:g}", edges, unit="edges") as meter:
                for targets in todo:
                    state = self._decide(state, targets, meter)
        return self._oracle.kl(self.kept)

    def _decide(self, state: Propagation, targets: tuple[int, ...], meter: Meter) -> Propagation:
        """Decide one stage, again in float64 if float32 drifts; returns the state to go on with."""
        allowed = _allowed_drift(self._config)
        attempt = self._attempt(state, targets, meter)
        if not attempt.drift() <= allowed and self.precision == "float32":
            say(f"the KL drifted by {attempt.drift():.1g} in float32: going on in float64")
            self.precision, self._cache = "float64", None
            state = self._state()
            meter.advance(-len(attempt.decisions))
            attempt = self._attempt(state, targets, meter)
        if not attempt.drift() <= allowed:
            raise _lost_precision(attempt.drift(), self._config)
        stage = attempt.stage(self.precision)
        self._log.append(stage)
        self._take(stage)
        return state

    def _attempt(self, state: Propagation, targets: tuple[int, ...], meter: Meter) -> "_Attempt":
        attempt = _Attempt(state, self._oracle, self._config)
        attempt.run(targets, self.kept.copy(), meter)
        return attempt

    def _state(self) -> Propagation:
        config = replace(self._config, precision=self.precision)
        fits = self._cache is not None and self._cache.precision == self.precision
        if self._cache is None or not fits:
            self._cache = Cache.build(self._weights, self._oracle, config)
        return Propagation(self._weights, self._cache, self._oracle)

    def _take(self, stage: Stage) -> None:
        graph = self._graph
        for item in stage.decisions:
            edge = graph.source_numbers[item.source], graph.target_numbers[item.target]
            self.kept[edge] = not item.cut
        self.kl = stage.decisions[-1].kl


class _Attempt:
    """One stage, decided edge by edge from a state computed afresh."""

    def __init__(self, state: Propagation, oracle: Oracle, config: DiscoverSettings) -> None:
        self._graph = oracle.graph
        self._state = state
        self._oracle = oracle
        self._config = config
        self._calls = oracle.calls
        self.decisions: list[Decision] = []

    def run(self, targets: tuple[int, ...], kept: NDArray[np.bool_], meter: Meter) -> None:
        """Decide every edge into ``targets``; ``kept`` is changed."""
        self._kept = kept
        frontier = self._graph.targets[targets[0]].layer
        self._kl = self._state.rebuild(kept, frontier)
        if self._graph.targets[targets[0]].role in LETTERS:
            # The stage before left this state; only a resumed search computes it again.
            self._state.take_evaluations()
        for target in targets:
            decide = self._test if self._state.is_live(target) else self._drop
            for source in reversed(self._graph.readable(target)):
                self.decisions.append(decide(source, target))
                meter.advance(note=f"KL {self._kl:.4g}")
        self._fresh_kl = self._state.rebuild(kept, frontier)

    def drift(self) -> float:
        """How far the running KL is from the one of a state computed afresh, in nats."""
        return abs(self._kl - self._fresh_kl)

    def stage(self, precision: str) -> Stage:
        """The outcome, for the log."""
        return Stage(
            decisions=tuple(self.decisions),
            precision=precision,
            node_evaluations=self._state.take_evaluations(),
            oracle_calls=self._oracle.calls - self._calls,
        )

    def _drop(self, source: int, target: int) -> Decision:
        self._kept[source, target] = False
        return self._decision(source, target, increment=None, decided_by="dead")

    def _test(self, source: int, target: int) -> Decision:
        trial = self._state.try_cut(source, target)
        increment = trial.kl - self._kl
        compared = trial.kl if self._config.criterion == "total" else increment
        # Written so that NaN, too, goes to the oracle.
        trusted = abs(compared - self._config.tau) > guard(self._config.tau)
        if not trusted:
            increment, compared = self._ask_oracle(source, target)
        if compared < self._config.tau:
            self._kept[source, target] = False
            self._state.accept(trial)
            self._kl = trial.kl
        decided_by = "fast" if trusted else "oracle"
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


def _edges(graph: Graph, targets: tuple[int, ...]) -> list[tuple[str, str]]:
    """The names of the edges into some targets, in the order in which they are decided."""
    return [
        (graph.sources[source].name, graph.targets[target].name)
        for target in targets
        for source in reversed(graph.readable(target))
    ]


def _require_same(name: str, asked: str, measured: str) -> None:
    if asked != measured:
        raise ConfigError(
            f"{name} must be that of the oracle, {measured!r}, got {asked!r}: make the oracle with "
            "the settings of the search"
        )


def _allowed_drift(config: DiscoverSettings) -> float:
    return guard(config.tau) / 10


def _lost_precision(drift: float, config: DiscoverSettings) -> ExactnessError:
    return ExactnessError(
        f"ACDC's running KL is {drift:.1g} nats off, at most {_allowed_drift(config):.1g} is "
        f"allowed at tau {config.tau:g}: choose a larger tau"
    )


def _identity(weights: ViTWeights, oracle: Oracle, config: DiscoverSettings) -> str:
    """A hash of everything that a decision depends on."""
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return tensor

    map_tensors(weights, add)
    examples = oracle.examples
    pairs = torch.from_numpy(np.stack([examples.clean, examples.corrupted]))
    for tensor in (examples.pixels, examples.group_of_class, pairs):
        add(tensor)
    scales = [(block.attn.scale, block.attn_norm.eps) for block in weights.blocks]
    choices = [oracle.ablation, oracle.graph.tokens, config.criterion, config.tau]
    return config_hash(digest.hexdigest(), scales, *choices)
