"""ACDC: test edges one by one, from the classifier backwards, and cut those that matter little.

Conmy et al. 2023, arXiv:2304.14997, in the order of their code 1.1; edges are counted as in EAP and
AutoCircuit. By definition every edge takes one full masked forward in float64, and is cut if the
mean KL divergence rises by less than tau. Here ``Propagation`` computes that rise incrementally, as
a filter: within a guard band around tau the float64 oracle decides. So the circuit is the one that
the naive algorithm finds, whatever the precision of the fast path, threads, batches and restarts.
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
from vitcut.names import LETTERS
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
    """Precision of the fast path at the end: float64 if that was asked for or needed."""
    node_evaluations: int
    """Sources recomputed; naive ACDC takes edges x sources."""
    oracle_calls: int
    """Full masked forwards over all pairs; naive ACDC takes one per edge."""
    seconds: float | None
    """None for a search that was resumed."""


def guard(tau: float) -> float:
    """How near to tau, in nats, the oracle decides instead of the fast path."""
    return max(1e-6, 1e-3 * tau)


def allowed_drift(tau: float) -> float:
    """How far the running KL may be off before an increment could leave the guard band, in nats."""
    return guard(tau) / 10


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
        cache: Activations of an earlier search on the same pairs and ablation; built if None.
        log: Decisions are appended to this file; a log cut short by a kill is continued.

    Raises:
        ConfigError: The activations do not fit into ``config.memory_gib``, or the oracle measures
            other circuits than those asked for.
        ArtefactError: ``log`` does not belong to this search.
        ExactnessError: The fast path lost more precision than the guard allows for.
    """
    start = time.perf_counter()
    graph, measured = oracle.graph, {"ablation": oracle.ablation, "tokens": oracle.graph.tokens}
    for name, value in measured.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name} must be that of the oracle, {value!r}, got {getattr(config, name)!r}: "
                "make the oracle with the settings of the search"
            )
    edges = [
        [
            (graph.sources[source].name, graph.targets[target].name)
            for target in targets
            for source in reversed(graph.readable(target))
        ]
        for targets in stages(graph)
    ]
    decision_log = DecisionLog(log, _identity(weights, oracle, config), edges)
    resumed = bool(decision_log.stages)
    search = _Search(weights, oracle, config, cache, decision_log)
    kl = search.run()
    # The drift within a stage does not show what the cache itself lost; the oracle does. Here and
    # below, comparisons are written so that NaN fails them.
    if not abs(kl - search.kl) <= allowed_drift(config.tau) and search.precision == "float32":
        say(f"float32 is {abs(kl - search.kl):.1g} nats off at the end: searching in float64")
        precise = replace(config, precision="float64")
        cache = Cache.build(weights, oracle, precise)
        decision_log.restart()
        search = _Search(weights, oracle, precise, cache, decision_log)
        kl = search.run()
    if not abs(kl - search.kl) <= allowed_drift(config.tau):
        raise _lost_precision(abs(kl - search.kl), config.tau)
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
    """The targets in ACDC's order, in runs of one block and role: where the state is rebuilt."""

    def place(target: int) -> tuple[int, str]:
        return graph.targets[target].layer, graph.targets[target].role

    for _, run in groupby(graph.backward_order(), key=place):
        yield tuple(run)


@dataclass(eq=False)
class _Search:
    """The circuit decided so far, and how the stages that follow are decided."""

    weights: ViTWeights
    oracle: Oracle
    config: DiscoverSettings
    cache: Cache | None
    log: DecisionLog

    def __post_init__(self) -> None:
        self.precision = self.config.precision
        if self.log.stages:
            self.precision = self.log.stages[-1].precision
        self.kept = self.oracle.graph.edges.copy()
        self.kl = 0.0

    def run(self) -> float:
        """Decide every stage that is not logged yet; returns the oracle's KL of the circuit."""
        graph, allowed = self.oracle.graph, allowed_drift(self.config.tau)
        for stage in self.log.stages:
            self._take(stage)
        todo = list(stages(graph))[len(self.log.stages) :]
        if not todo:
            return self.oracle.kl(self.kept)
        edges = sum(len(graph.readable(target)) for targets in todo for target in targets)
        state = self._state()
        with Meter(f"ACDC tau {self.config.tau:g}", edges, unit="edges") as meter:
            for targets in todo:
                stage, drift = self._decide(state, targets, meter)
                if not drift <= allowed and self.precision == "float32":
                    say(f"the KL drifted by {drift:.1g} in float32: going on in float64")
                    self.precision, self.cache = "float64", None
                    state = self._state()
                    meter.advance(-len(stage.decisions))
                    stage, drift = self._decide(state, targets, meter)
                if not drift <= allowed:
                    raise _lost_precision(drift, self.config.tau)
                self.log.append(stage)
                self._take(stage)
        return self.oracle.kl(self.kept)

    def _decide(
        self, state: Propagation, targets: tuple[int, ...], meter: Meter
    ) -> tuple[Stage, float]:
        """Decide the edges into the targets of one stage, from a state computed afresh.

        Returns:
            The stage, and by how many nats the running KL had drifted at its end.
        """
        graph, oracle, tau = self.oracle.graph, self.oracle, self.config.tau
        total, kept, calls = self.config.criterion == "total", self.kept.copy(), oracle.calls
        frontier, role = graph.targets[targets[0]].layer, graph.targets[targets[0]].role
        kl = state.rebuild(kept, frontier)
        if role in LETTERS:
            # The stage before (the MLP or another letter of this block) left this very state. Only
            # a resumed search has to compute it again, and that does not count.
            state.take_evaluations()
        decisions: list[Decision] = []
        for target in targets:
            # Cutting edges into a target does not change whether it is live.
            live = state.is_live(target)
            for source in reversed(graph.readable(target)):
                # An edge into a dead target changes nothing: it is cut without a test.
                increment, decided_by, cut = None, "dead", True
                if live:
                    trial = state.try_cut(source, target)
                    increment, decided_by = trial.kl - kl, "fast"
                    compared = trial.kl if total else increment
                    if not abs(compared - tau) > guard(tau):
                        # Too near tau for the fast path: decide as the naive algorithm does.
                        decided_by = "oracle"
                        without = kept.copy()
                        without[source, target] = False
                        before, after = oracle.kl(kept), oracle.kl(without)
                        increment = after - before
                        compared = after if total else increment
                    cut = compared < tau
                    if cut:
                        # The running KL stays the fast path's, whoever decided: an increment is
                        # the difference of two values with much the same error.
                        state.accept(trial)
                        kl = trial.kl
                kept[source, target] = not cut
                decisions.append(
                    Decision(
                        source=graph.sources[source].name,
                        target=graph.targets[target].name,
                        cut=cut,
                        increment=increment,
                        kl=kl,
                        decided_by=decided_by,
                    )
                )
                meter.advance(note=f"KL {kl:.4g}")
        # What the updates of this stage have lost together.
        drift = abs(kl - state.rebuild(kept, frontier))
        stage = Stage(
            decisions=tuple(decisions),
            precision=self.precision,
            node_evaluations=state.take_evaluations(),
            oracle_calls=oracle.calls - calls,
        )
        return stage, drift

    def _state(self) -> Propagation:
        if self.cache is None or self.cache.precision != self.precision:
            config = replace(self.config, precision=self.precision)
            self.cache = Cache.build(self.weights, self.oracle, config)
        return Propagation(self.weights, self.cache, self.oracle)

    def _take(self, stage: Stage) -> None:
        graph = self.oracle.graph
        for item in stage.decisions:
            edge = graph.source_numbers[item.source], graph.target_numbers[item.target]
            self.kept[edge] = not item.cut
        self.kl = stage.decisions[-1].kl


def _lost_precision(drift: float, tau: float) -> ExactnessError:
    return ExactnessError(
        f"ACDC's running KL is {drift:.1g} nats off, at most {allowed_drift(tau):.1g} is allowed "
        f"at tau {tau:g}: choose a larger tau"
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
