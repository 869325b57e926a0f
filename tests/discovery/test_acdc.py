import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import vits
from tiny import random_pixels, random_vit

from vitcut.discovery.acdc import acdc, acdc_reference, build_cache, guard, stages
from vitcut.discovery.propagation import Propagation
from vitcut.discovery.settings import DiscoverConfig
from vitcut.errors import ArtefactError, ConfigError
from vitcut.graph import Graph
from vitcut.intervention.oracle import Examples, Oracle
from vitcut.vits.weights import BlockWeights, ViTWeights, map_tensors

GROUPS = torch.tensor([0, 1, 1, 2])


def make_oracle(weights: ViTWeights, ablation: str = "resample", images: int = 4) -> Oracle:
    numbers = np.arange(images)
    examples = Examples(
        pixels=random_pixels(weights, images=images),
        clean=numbers,
        corrupted=np.roll(numbers, 1),
        group_of_class=GROUPS,
    )
    return Oracle(weights, examples, ablation)


def outcome(decisions) -> list[tuple[str, str, bool]]:
    return [(item.source, item.target, item.cut) for item in decisions]


@settings(max_examples=12)
@given(
    weights=vits(max_layers=2, max_heads=2),
    ablation=st.sampled_from(["zero", "mean", "resample"]),
    criterion=st.sampled_from(["increment", "total"]),
    tau=st.sampled_from([1e-4, 1e-3, 1e-2, 1e-1, 0.5]),
    precision=st.sampled_from(["float32", "float64"]),
)
def test_incremental_decides_every_edge_as_naive(weights, ablation, criterion, tau, precision):
    oracle = make_oracle(weights, ablation)
    config = DiscoverConfig(
        tau=tau, ablation=ablation, criterion=criterion, precision=precision, images=4
    )
    search = acdc(weights, oracle, config)
    naive = acdc_reference(oracle, weights.graph, tau=tau, criterion=criterion)
    assert outcome(search.decisions) == outcome(naive)
    for fast, slow in zip(search.decisions, naive, strict=True):
        assert fast.kl == pytest.approx(slow.kl, abs=guard(tau))
    assert search.kl == pytest.approx(naive[-1].kl, abs=1e-12)


def test_decisions_follow_the_published_order():
    weights = random_vit(num_layers=1, num_heads=2)
    search = acdc(weights, make_oracle(weights), DiscoverConfig(tau=0.01, images=4))
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


def test_a_part_that_writes_nothing_is_cut_and_a_planted_path_is_kept():
    weights = random_vit(num_layers=2, num_heads=2)
    silent = replace(
        weights.blocks[1],
        attn=map_tensors(weights.blocks[1].attn, torch.zeros_like),
        mlp=map_tensors(weights.blocks[1].mlp, torch.zeros_like),
    )
    weights = replace(weights, blocks=(weights.blocks[0], silent))
    search = acdc(weights, make_oracle(weights), DiscoverConfig(tau=1e-6, images=4))
    graph = weights.graph
    assert not search.kept[graph.head_source(1, 0) :].any()
    assert not search.kept[:, graph.head_target(1, 0, "q") : graph.classifier].any()
    assert search.kept[graph.mlp_source(0), graph.classifier]


def test_edges_into_dead_targets_are_cut_untested():
    weights = random_vit(num_layers=2)
    search = acdc(weights, make_oracle(weights), DiscoverConfig(tau=1e6, images=4))
    decided = {item.target: item.decided_by for item in search.decisions}
    assert decided.pop("classifier") == "fast"
    assert set(decided.values()) == {"dead"}
    assert not search.kept.any()


def test_fewer_nodes_are_evaluated_than_naively():
    weights = random_vit(num_layers=3, num_heads=3)
    search = acdc(weights, make_oracle(weights), DiscoverConfig(tau=0.01, images=4))
    naive = weights.graph.num_edges * len(weights.graph.sources)
    assert 0 < search.node_evaluations < naive / 5


def test_one_cache_serves_every_tau():
    weights = random_vit()
    oracle = make_oracle(weights)
    cache = build_cache(weights, oracle, DiscoverConfig(images=4))
    for tau in (0.1, 0.001):
        config = DiscoverConfig(tau=tau, images=4)
        shared = acdc(weights, oracle, config, cache=cache)
        alone = acdc(weights, make_oracle(weights), config)
        assert shared.decisions == alone.decisions


def test_the_model_is_untouched():
    weights = random_vit()
    before = map_tensors(weights, torch.clone)
    acdc(weights, make_oracle(weights), DiscoverConfig(images=4))
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


def without_output_biases(block: BlockWeights) -> BlockWeights:
    attn = replace(block.attn, out_bias=torch.zeros_like(block.attn.out_bias))
    mlp = replace(block.mlp, out_bias=torch.zeros_like(block.mlp.out_bias))
    return replace(block, attn=attn, mlp=mlp)


def drifting_vit() -> ViTWeights:
    """A target that reads zeros alone: LayerNorm then amplifies what rounding left of its input."""
    weights = random_vit(num_layers=2, width=8)
    return replace(weights, blocks=tuple(map(without_output_biases, weights.blocks)))


PLAIN = (random_vit(num_layers=2), DiscoverConfig(tau=0.01, images=4))
DRIFTING = (drifting_vit(), DiscoverConfig(tau=0.1, ablation="zero", images=4))


@pytest.mark.parametrize(("weights", "config"), [PLAIN, DRIFTING], ids=["plain", "drifting"])
@pytest.mark.parametrize("cut_at", [0.0, 0.01, 0.3, 0.7, 0.95, 0.999])
def test_a_search_killed_while_logging_goes_on_to_the_same_result(
    tmp_path, weights, config, cut_at
):
    whole_log, log = tmp_path / "whole.jsonl", tmp_path / "decisions.jsonl"
    whole = acdc(weights, make_oracle(weights, config.ablation), config, log=whole_log)
    content = whole_log.read_bytes()
    log.write_bytes(content[: int(len(content) * cut_at)])
    resumed = acdc(weights, make_oracle(weights, config.ablation), config, log=log)
    assert log.read_bytes() == content
    for name in ("decisions", "kl", "precision", "node_evaluations", "oracle_calls"):
        assert getattr(resumed, name) == getattr(whole, name), name
    assert np.array_equal(resumed.kept, whole.kept)


def test_the_log_has_one_line_per_edge_between_header_and_stage_ends(tmp_path):
    weights = random_vit()
    log = tmp_path / "deep" / "decisions.jsonl"
    search = acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)
    header, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert set(header) == {"format_version", "search"}
    decided = [line for line in lines if "stage_ends" not in line]
    assert decided == [vars(item) for item in search.decisions]
    assert len(decided) == weights.graph.num_edges
    assert len(lines) - len(decided) == len(list(stages(weights.graph)))


@pytest.mark.parametrize(
    "change",
    [
        {"tau": 0.5},
        {"criterion": "total"},
        {"ablation": "mean"},
        {"weights": random_vit(seed=9)},
        {"weights": random_vit(num_layers=3)},
        {"images": 3},
    ],
    ids=["tau", "criterion", "ablation", "weights", "graph", "images"],
)
def test_a_log_of_another_search_is_refused(tmp_path, change):
    log = tmp_path / "decisions.jsonl"
    weights = random_vit(num_layers=2)
    acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)
    other = change.get("weights", weights)
    oracle = make_oracle(other, change.get("ablation", "resample"), change.get("images", 4))
    settings = {key: value for key, value in change.items() if key != "weights"}
    with pytest.raises(ArtefactError, match="logs another search"):
        acdc(other, oracle, DiscoverConfig(**{"images": 4, **settings}), log=log)


@pytest.mark.parametrize("change", ["repeat", "skip", "rename"])
def test_a_log_whose_stages_are_not_those_of_the_search_is_refused(tmp_path, change):
    weights, log = random_vit(num_layers=2), tmp_path / "decisions.jsonl"
    acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)
    lines = log.read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if "stage_ends" in line) + 1
    altered = {
        "repeat": [lines[0], *lines[1:end], *lines[1:end]],
        "skip": [lines[0], *lines[end:]],
        "rename": [line.replace('"mlp.1"', '"mlp.99"') for line in lines],
    }
    log.write_text("".join(altered[change]))
    with pytest.raises(ArtefactError, match="does not hold the stages of this search"):
        acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)


def test_float32_that_overflows_is_replaced_by_float64(monkeypatch):
    weights = random_vit()
    exact = Propagation._kl

    def overflowing(self, readout):
        return float("nan") if readout.dtype == torch.float32 else exact(self, readout)

    monkeypatch.setattr(Propagation, "_kl", overflowing)
    search = acdc(weights, make_oracle(weights), DiscoverConfig(images=4))
    naive = acdc_reference(make_oracle(weights), weights.graph, tau=0.01)
    assert search.precision == "float64"
    assert outcome(search.decisions) == outcome(naive)


def test_memory_and_precision_may_change_when_a_search_goes_on(tmp_path):
    log = tmp_path / "decisions.jsonl"
    weights = random_vit()
    first = acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)
    changed = DiscoverConfig(images=4, memory_gib=1.0, precision="float64")
    again = acdc(weights, make_oracle(weights), changed, log=log)
    assert again.decisions == first.decisions
    assert again.seconds is None


@pytest.mark.parametrize("content", ["no json\n", "[]\n", '{"source": "embed"}\n'])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    log = tmp_path / "decisions.jsonl"
    log.write_text(content)
    weights = random_vit()
    with pytest.raises(ArtefactError, match="not a decision log"):
        acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)


def test_a_newer_log_is_refused(tmp_path):
    log = tmp_path / "decisions.jsonl"
    log.write_text('{"format_version": 99, "search": ""}\n')
    weights = random_vit()
    with pytest.raises(ArtefactError, match="upgrade vitcut"):
        acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)


@pytest.mark.parametrize("criterion", ["increment", "total"])
@pytest.mark.parametrize("offset", [-1e-9, 1e-9])
def test_near_tau_the_oracle_decides(criterion, offset):
    weights = random_vit(num_layers=2)
    oracle = make_oracle(weights)
    naive = acdc_reference(oracle, weights.graph, tau=0.02, criterion=criterion)
    position = next(
        i for i, item in enumerate(naive) if item.increment is not None and item.increment > 1e-3
    )
    aimed = naive[position].increment
    if criterion == "total":
        aimed += naive[position - 1].kl if position else 0.0
    # The decisions before the one aimed at must stay as they are under the new tau.
    tau = aimed + offset
    naive = acdc_reference(oracle, weights.graph, tau=tau, criterion=criterion)
    config = DiscoverConfig(tau=tau, criterion=criterion, images=4)
    search = acdc(weights, oracle, config)
    assert outcome(search.decisions) == outcome(naive)
    assert any(item.decided_by == "oracle" for item in search.decisions)


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_error_within_the_guard_changes_no_decision(monkeypatch, sign):
    weights = random_vit(num_layers=2)
    oracle = make_oracle(weights)
    naive = acdc_reference(oracle, weights.graph, tau=0.01)
    # A tau just beyond an increment: a fast path that is off would decide otherwise.
    increments = sorted(item.increment for item in naive)
    tau = min(increments, key=lambda value: abs(value - 0.01)) - sign * 0.4 * guard(0.01)
    naive = acdc_reference(oracle, weights.graph, tau=tau)
    exact = Propagation.try_cut

    def disturbed(self, source, target):
        trial = exact(self, source, target)
        return replace(trial, kl=trial.kl + (0.0 if trial.kl < 1e-12 else -sign * 0.9 * guard(tau)))

    monkeypatch.setattr(Propagation, "try_cut", disturbed)
    monkeypatch.setattr("vitcut.discovery.acdc._allowed_drift", lambda config: np.inf)
    search = acdc(weights, oracle, DiscoverConfig(tau=tau, images=4, precision="float64"))
    first = next(i for i, item in enumerate(naive) if abs(item.increment - tau) < guard(tau))
    assert outcome(search.decisions)[: first + 1] == outcome(naive)[: first + 1]
    assert search.decisions[first].decided_by == "oracle"


def test_a_search_that_float32_spoils_at_the_end_is_done_again_in_float64(monkeypatch, tmp_path):
    weights = random_vit()
    said: list[str] = []
    monkeypatch.setattr("vitcut.discovery.acdc.say", said.append)
    exact = Propagation._kl

    def spoiled(self, readout):
        return exact(self, readout) + (1e-3 if readout.dtype == torch.float32 else 0.0)

    monkeypatch.setattr(Propagation, "_kl", spoiled)
    log = tmp_path / "decisions.jsonl"
    search = acdc(weights, make_oracle(weights), DiscoverConfig(images=4), log=log)
    assert search.precision == "float64"
    assert any("searching in float64" in line for line in said)
    monkeypatch.undo()
    naive = acdc_reference(make_oracle(weights), weights.graph, tau=0.01)
    assert outcome(search.decisions) == outcome(naive)
    assert log.read_text().count('"precision": "float64"') == len(list(stages(weights.graph)))


def test_too_little_memory_is_refused_with_the_need():
    weights = random_vit()
    config = DiscoverConfig(images=4, memory_gib=1e-6)
    with pytest.raises(ConfigError, match=r"need about .* GiB.*memory-gib allows 1e-06"):
        acdc(weights, make_oracle(weights), config)


def test_float32_that_drifts_is_replaced_by_float64(monkeypatch):
    weights, config = DRIFTING
    oracle = make_oracle(weights, "zero")
    said: list[str] = []
    monkeypatch.setattr("vitcut.discovery.acdc.say", said.append)
    search = acdc(weights, oracle, config)
    naive = acdc_reference(oracle, weights.graph, tau=config.tau)
    assert outcome(search.decisions) == outcome(naive)
    assert search.precision == "float64"
    assert any("float64" in line for line in said)


def test_stages_cover_every_target_once():
    graph = Graph(num_layers=3, num_heads=2)
    assert [target for stage in stages(graph) for target in stage] == list(graph.backward_order())


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_tau_must_be_a_positive_number(tau):
    with pytest.raises(ConfigError, match="tau must be a finite number > 0"):
        DiscoverConfig(tau=tau)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed must be >= 0"):
        DiscoverConfig(seed=-1)
