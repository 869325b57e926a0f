from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_acdc
from strategies import vits
from tiny import random_vit
from tiny_oracle import drifting_vit, make_oracle, settings_of

from vitcut.discovery.acdc import acdc, guard, stages
from vitcut.discovery.cache import Cache, require_room
from vitcut.discovery.propagation import Propagation
from vitcut.errors import ConfigError
from vitcut.graph import Graph
from vitcut.model.forward import classify, project_head
from vitcut.model.weights import ViTWeights, map_tensors


def outcome(decisions) -> list[tuple[str, str, bool]]:
    return [(item.source, item.target, item.cut) for item in decisions]


def named(graph: Graph, source: int, target: int) -> tuple[str, str]:
    return graph.sources[source].name, graph.targets[target].name


def useless(graph: Graph) -> list[tuple[int, int]]:
    """The structurally dead edges."""
    return [(int(s), int(t)) for s, t in np.argwhere(graph.edges & ~graph.useful_edges)]


@settings(max_examples=24)
@given(
    tokens=st.sampled_from(["all", "split"]),
    weights=vits(max_layers=2, max_heads=2),
    ablation=st.sampled_from(["zero", "mean", "resample"]),
    criterion=st.sampled_from(["increment", "total"]),
    tau=st.sampled_from([1e-4, 1e-3, 1e-2, 1e-1, 0.5]),
    precision=st.sampled_from(["float32", "float64"]),
)
def test_incremental_decides_every_edge_as_naive(
    tokens, weights, ablation, criterion, tau, precision
):
    oracle = make_oracle(weights, ablation, tokens=tokens)
    config = settings_of(
        tau=tau,
        ablation=ablation,
        tokens=tokens,
        criterion=criterion,
        precision=precision,
    )
    search = acdc(weights, oracle, config)
    naive = naive_acdc(oracle, tau=tau, criterion=criterion)
    assert outcome(search.decisions) == outcome(naive)
    for fast, slow in zip(search.decisions, naive, strict=True):
        assert fast.kl == pytest.approx(slow.kl, abs=guard(tau))
    assert search.kl == pytest.approx(naive[-1].kl, abs=1e-12)
    dead = {(item.source, item.target) for item in search.decisions if item.decided_by == "dead"}
    assert {named(oracle.graph, *edge) for edge in useless(oracle.graph)} <= dead


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_changes_that_cross_token_kinds_are_decided_as_naive(ablation):
    # Drawn models are often too shallow for one kind to change another before the readout.
    weights = random_vit(num_layers=2, num_heads=1, num_prefix=2)
    oracle = make_oracle(weights, ablation, images=2, tokens="split")
    config = settings_of(tau=1e-3, ablation=ablation, images=2, tokens="split")
    search = acdc(weights, oracle, config)
    assert outcome(search.decisions) == outcome(naive_acdc(oracle, tau=1e-3))
    assert {item.decided_by for item in search.decisions} >= {"fast", "dead"}


def test_decisions_follow_the_published_order():
    weights = random_vit(num_layers=1, num_heads=2)
    search = acdc(weights, make_oracle(weights), settings_of(tau=0.01))
    edges = [f"{item.source} -> {item.target}" for item in search.decisions]
    assert edges == [
        "mlp.0 -> classifier",
        "attn.0.1 -> classifier",
        "attn.0.0 -> classifier",
        "embed -> classifier",
        "attn.0.1 -> mlp.0",
        "attn.0.0 -> mlp.0",
        "embed -> mlp.0",
        "embed -> attn.0.1.v",
        "embed -> attn.0.0.v",
        "embed -> attn.0.1.k",
        "embed -> attn.0.0.k",
        "embed -> attn.0.1.q",
        "embed -> attn.0.0.q",
    ]


def test_token_kinds_follow_each_other_head_by_head():
    weights = random_vit(num_layers=1, num_heads=2, num_prefix=2)
    config = settings_of(tau=0.01, images=4, tokens="split")
    search = acdc(weights, make_oracle(weights, tokens="split"), config)
    targets = list(dict.fromkeys(item.target for item in search.decisions))
    kinds = ["cls", "register", "patch"]
    expected = ["classifier.cls", *(f"mlp.0.{kind}" for kind in kinds)]
    for letter in "vkq":
        expected += [f"attn.0.{head}.{letter}.{kind}" for head in (1, 0) for kind in kinds]
    assert targets == expected
    of_mlp = [item.source for item in search.decisions if item.target == "mlp.0.patch"]
    assert of_mlp == ["attn.0.1.patch", "attn.0.0.patch", "embed.patch"]


def test_a_part_that_writes_nothing_is_cut_and_a_planted_path_is_kept():
    weights = random_vit(num_layers=2, num_heads=2)
    silent = replace(
        weights.blocks[1],
        attn=map_tensors(weights.blocks[1].attn, torch.zeros_like),
        mlp=map_tensors(weights.blocks[1].mlp, torch.zeros_like),
    )
    weights = replace(weights, blocks=(weights.blocks[0], silent))
    search = acdc(weights, make_oracle(weights), settings_of(tau=1e-6))
    graph = weights.graph
    assert not search.kept[graph.head_source(1, 0) :].any()
    assert not search.kept[:, graph.head_target(1, 0, "q") : graph.classifier].any()
    assert search.kept[graph.mlp_source(0), graph.classifier]


def test_edges_into_dead_targets_are_cut_untested():
    weights = random_vit(num_layers=2)
    search = acdc(weights, make_oracle(weights), settings_of(tau=1e6))
    decided = {item.target: item.decided_by for item in search.decisions}
    assert decided.pop("classifier") == "fast"
    assert set(decided.values()) == {"dead"}
    assert not search.kept.any()


@pytest.mark.parametrize("tokens", ["all", "split"])
def test_fewer_nodes_are_evaluated_than_naively(tokens):
    weights = random_vit(num_layers=3, num_heads=3)
    oracle = make_oracle(weights, tokens=tokens)
    search = acdc(weights, oracle, settings_of(tau=0.01, images=4, tokens=tokens))
    naive = oracle.graph.num_edges * len(oracle.graph.sources)
    assert 0 < search.node_evaluations < naive / 5


def test_one_cache_serves_every_tau_over_whole_tokens_and_token_kinds():
    weights = random_vit()
    cache = Cache.build(weights, make_oracle(weights), settings_of())
    for tau, tokens in product((0.1, 0.001), ("all", "split")):
        config = settings_of(tau=tau, images=4, tokens=tokens)
        shared = acdc(weights, make_oracle(weights, tokens=tokens), config, cache=cache)
        alone = acdc(weights, make_oracle(weights, tokens=tokens), config)
        assert shared.decisions == alone.decisions


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_what_a_kind_is_asked_for_is_computed_once_for_all_that_read_it(monkeypatch, letter):
    weights = random_vit(num_layers=2, num_prefix=2)
    oracle = make_oracle(weights, tokens="split")
    state = Propagation(weights, Cache.build(weights, oracle, settings_of()), oracle)
    graph = oracle.graph
    state.rebuild(graph.edges, 0)
    state.take_evaluations()
    projected: list[tuple[str, int]] = []

    def counted(attn, letter, head, normed, rows):
        projected.append((letter, normed.shape[1]))
        return project_head(attn, letter, head, normed, rows)

    monkeypatch.setattr("vitcut.discovery.propagation.project_head", counted)
    patch, num_patches = graph.kinds.index("patch"), weights.num_tokens - weights.num_prefix
    state.try_cut(graph.source_numbers["embed.patch"], graph.head_target(0, 1, letter, patch))
    changed = [num_patches] if letter == "q" else [1, 1, num_patches]
    # Of block 1 the classifier reads cls alone: no other queries.
    later = [(item, rows) for item in "kv" for rows in changed]
    later += [("q", 1)] if letter != "q" else []
    assert projected[0] == (letter, num_patches)
    assert sorted(projected[1:]) == sorted(later * weights.num_heads)
    assert state.take_evaluations() == 2 * len(changed) + weights.num_heads + 1


def test_an_oracle_of_other_tokens_or_ablation_is_refused():
    weights = random_vit()
    for change in ({"tokens": "split"}, {"ablation": "mean"}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} must be that of the oracle"):
            acdc(weights, make_oracle(weights), settings_of(**change))


def test_the_model_is_untouched():
    weights = random_vit()
    before = map_tensors(weights, torch.clone)
    acdc(weights, make_oracle(weights), settings_of())
    same = []
    originals = iter_tensors(weights)
    for was, now in zip(iter_tensors(before), originals, strict=True):
        same.append(torch.equal(was, now))
    assert all(same)
    assert len(same) == 8 + 2 * 16


def iter_tensors(weights: ViTWeights) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(weights, lambda tensor: found.append(tensor) or tensor)
    return found


def in_float32(monkeypatch, change) -> None:
    """Change the logits of the fast path while it is in float32."""

    def changed(weights, readout):
        logits = classify(weights, readout)
        return change(logits) if readout.dtype == torch.float32 else logits

    monkeypatch.setattr("vitcut.discovery.propagation.classify", changed)


def test_float32_that_overflows_is_replaced_by_float64(monkeypatch):
    weights = random_vit()
    in_float32(monkeypatch, lambda logits: logits * torch.nan)
    search = acdc(weights, make_oracle(weights), settings_of())
    naive = naive_acdc(make_oracle(weights), tau=0.01)
    assert search.precision == "float64"
    assert outcome(search.decisions) == outcome(naive)


@pytest.mark.parametrize("criterion", ["increment", "total"])
@pytest.mark.parametrize("offset", [-1e-9, 1e-9])
def test_near_tau_the_oracle_decides(criterion, offset):
    weights = random_vit(num_layers=2)
    oracle = make_oracle(weights)
    naive = naive_acdc(oracle, tau=0.02, criterion=criterion)
    position = next(
        i for i, item in enumerate(naive) if item.increment is not None and item.increment > 1e-3
    )
    aimed = naive[position].increment
    if criterion == "total":
        aimed += naive[position - 1].kl if position else 0.0
    # The decisions before the one aimed at must stay as they are under the new tau.
    tau = aimed + offset
    naive = naive_acdc(oracle, tau=tau, criterion=criterion)
    config = settings_of(tau=tau, criterion=criterion)
    search = acdc(weights, oracle, config)
    assert outcome(search.decisions) == outcome(naive)
    assert any(item.decided_by == "oracle" for item in search.decisions)


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_error_within_the_guard_changes_no_decision(monkeypatch, sign):
    weights = random_vit(num_layers=2)
    oracle = make_oracle(weights)
    naive = naive_acdc(oracle, tau=0.01)
    # A tau just beyond an increment: a fast path that is off would decide otherwise.
    increments = sorted(item.increment for item in naive)
    tau = min(increments, key=lambda value: abs(value - 0.01)) - sign * 0.4 * guard(0.01)
    naive = naive_acdc(oracle, tau=tau)
    exact = Propagation.try_cut

    def disturbed(self, source, target):
        trial = exact(self, source, target)
        return replace(trial, kl=trial.kl + (0.0 if trial.kl < 1e-12 else -sign * 0.9 * guard(tau)))

    monkeypatch.setattr(Propagation, "try_cut", disturbed)
    monkeypatch.setattr("vitcut.discovery.acdc.allowed_drift", lambda tau: np.inf)
    search = acdc(weights, oracle, settings_of(tau=tau, images=4, precision="float64"))
    first = next(i for i, item in enumerate(naive) if abs(item.increment - tau) < guard(tau))
    assert outcome(search.decisions)[: first + 1] == outcome(naive)[: first + 1]
    assert search.decisions[first].decided_by == "oracle"


def test_a_search_that_float32_spoils_at_the_end_is_done_again_in_float64(monkeypatch, tmp_path):
    weights = random_vit()
    said: list[str] = []
    monkeypatch.setattr("vitcut.discovery.acdc.say", said.append)
    in_float32(monkeypatch, lambda logits: 1.1 * logits)
    log = tmp_path / "decisions.jsonl"
    search = acdc(weights, make_oracle(weights), settings_of(), log=log)
    assert search.precision == "float64"
    assert any("searching in float64" in line for line in said)
    monkeypatch.undo()
    naive = naive_acdc(make_oracle(weights), tau=0.01)
    assert outcome(search.decisions) == outcome(naive)
    assert log.read_text().count('"precision": "float64"') == len(list(stages(weights.graph)))


@pytest.mark.parametrize(("ablation", "sources"), [("resample", 3), ("zero", 2)])
def test_the_oracle_counts_in_what_a_search_needs(ablation, sources, monkeypatch):
    """2 blocks of 2 heads: 7 sources, 15 targets; streams of 5 tokens and 6 features."""
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=0))
    weights, config = random_vit(), settings_of(ablation=ablation)
    oracle = make_oracle(weights, ablation)
    many = len(oracle.examples.clean) * 5 * 6
    cached = 2 * (7 + 15) * many * 4
    needed = (cached + (15 + sources * 7) * many * 8) / 2**30
    require_room(weights, oracle.examples, replace(config, memory_gib=1.001 * needed))
    with pytest.raises(ConfigError, match="memory-gib allows"):
        require_room(weights, oracle.examples, replace(config, memory_gib=0.999 * needed))


def test_too_little_memory_is_refused_with_the_need():
    weights = random_vit()
    config = settings_of(memory_gib=1e-6)
    with pytest.raises(ConfigError, match=r"needs about .* GiB.*memory-gib allows 1e-06"):
        acdc(weights, make_oracle(weights), config)


def test_float32_that_drifts_is_replaced_by_float64(monkeypatch):
    weights, config = drifting_vit(), settings_of(tau=0.1, ablation="zero")
    oracle = make_oracle(weights, "zero")
    said: list[str] = []
    monkeypatch.setattr("vitcut.discovery.acdc.say", said.append)
    search = acdc(weights, oracle, config)
    naive = naive_acdc(oracle, tau=config.tau)
    assert outcome(search.decisions) == outcome(naive)
    assert search.precision == "float64"
    assert any("float64" in line for line in said)


@pytest.mark.parametrize("kinds", [(), ("cls", "patch")])
def test_stages_cover_every_target_once(kinds):
    graph = Graph(num_layers=3, num_heads=2, kinds=kinds, readout=kinds[:1])
    assert [target for stage in stages(graph) for target in stage] == list(graph.backward_order())
