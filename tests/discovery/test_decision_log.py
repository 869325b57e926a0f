import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from tiny import random_vit
from tiny_oracle import drifting_vit, make_oracle, settings_of

from vitcut.discovery.acdc import acdc, stages
from vitcut.errors import ArtefactError

PLAIN = (random_vit(num_layers=2), settings_of(tau=0.01))
SPLIT = (random_vit(num_layers=2, num_heads=1), replace(PLAIN[1], tokens="split"))
DRIFTING = (drifting_vit(), settings_of(tau=0.1, ablation="zero"))


@pytest.mark.parametrize(
    ("weights", "config"), [PLAIN, SPLIT, DRIFTING], ids=["plain", "split", "drifting"]
)
@pytest.mark.parametrize("cut_at", [0.0, 0.01, 0.3, 0.7, 0.95, 0.999])
def test_a_search_killed_while_logging_goes_on_to_the_same_result(
    tmp_path, weights, config, cut_at
):
    whole_log, log = tmp_path / "whole.jsonl", tmp_path / "decisions.jsonl"
    oracle = make_oracle(weights, config.ablation, tokens=config.tokens)
    whole = acdc(weights, oracle, config, log=whole_log)
    content = whole_log.read_bytes()
    log.write_bytes(content[: int(len(content) * cut_at)])
    oracle = make_oracle(weights, config.ablation, tokens=config.tokens)
    resumed = acdc(weights, oracle, config, log=log)
    assert log.read_bytes() == content
    for name in ("decisions", "kl", "precision", "node_evaluations", "oracle_calls"):
        assert getattr(resumed, name) == getattr(whole, name), name
    assert np.array_equal(resumed.kept, whole.kept)


def test_the_log_has_one_line_per_edge_between_header_and_stage_ends(tmp_path):
    weights = random_vit()
    log = tmp_path / "deep" / "decisions.jsonl"
    search = acdc(weights, make_oracle(weights), settings_of(), log=log)
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
        {"tokens": "split"},
    ],
    ids=["tau", "criterion", "ablation", "weights", "graph", "images", "tokens"],
)
def test_a_log_of_another_search_is_refused(tmp_path, change):
    log = tmp_path / "decisions.jsonl"
    weights = random_vit(num_layers=2)
    acdc(weights, make_oracle(weights), settings_of(), log=log)
    other = change.get("weights", weights)
    choices = {
        key: value for key, value in change.items() if key in {"ablation", "images", "tokens"}
    }
    oracle = make_oracle(other, **choices)
    settings = {key: value for key, value in change.items() if key != "weights"}
    with pytest.raises(ArtefactError, match="logs another search"):
        acdc(other, oracle, settings_of(**settings), log=log)


@pytest.mark.parametrize("change", ["repeat", "skip", "rename"])
def test_a_log_whose_stages_are_not_those_of_the_search_is_refused(tmp_path, change):
    weights, log = random_vit(num_layers=2), tmp_path / "decisions.jsonl"
    acdc(weights, make_oracle(weights), settings_of(), log=log)
    lines = log.read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if "stage_ends" in line) + 1
    altered = {
        "repeat": [lines[0], *lines[1:end], *lines[1:end]],
        "skip": [lines[0], *lines[end:]],
        "rename": [line.replace('"mlp.1"', '"mlp.99"') for line in lines],
    }
    log.write_text("".join(altered[change]))
    with pytest.raises(ArtefactError, match="was altered: its hashes"):
        acdc(weights, make_oracle(weights), settings_of(), log=log)


def test_no_byte_of_a_log_can_be_altered_in_silence(tmp_path):
    weights, log = random_vit(), tmp_path / "decisions.jsonl"
    whole = acdc(weights, make_oracle(weights), settings_of(), log=log)
    content, drawn = log.read_bytes(), np.random.default_rng(0)
    for place in drawn.integers(0, 8 * len(content), 40):
        altered = bytearray(content)
        altered[place // 8] ^= 1 << place % 8
        log.write_bytes(altered)
        with suppress(ArtefactError):
            found = acdc(weights, make_oracle(weights), settings_of(), log=log)
            assert found.decisions == whole.decisions, f"bit {place}"


def test_memory_and_precision_may_change_when_a_search_goes_on(tmp_path):
    log = tmp_path / "decisions.jsonl"
    weights = random_vit()
    first = acdc(weights, make_oracle(weights), settings_of(), log=log)
    changed = settings_of(memory_gib=1.0, precision="float64")
    again = acdc(weights, make_oracle(weights), changed, log=log)
    assert again.decisions == first.decisions
    assert again.seconds is None


@pytest.mark.parametrize("content", ["no json\n", "[]\n", '{"source": "embed"}\n'])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    log = tmp_path / "decisions.jsonl"
    log.write_text(content)
    weights = random_vit()
    with pytest.raises(ArtefactError, match="not a decision log"):
        acdc(weights, make_oracle(weights), settings_of(), log=log)


def test_a_newer_log_is_refused(tmp_path):
    log = tmp_path / "decisions.jsonl"
    log.write_text('{"format_version": 99, "search": ""}\n')
    weights = random_vit()
    with pytest.raises(ArtefactError, match="upgrade vitcut"):
        acdc(weights, make_oracle(weights), settings_of(), log=log)
