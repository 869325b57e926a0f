"""Flips, forgeries, kills and bad input: a few of each here, all of them under ``-m slow``."""

from collections import Counter

import pytest
from bad_inputs import bad_inputs
from reliability_cases import KILLED, flips, forgeries, kills, tensor_forgeries

from vitcut import cli

# Read by nobody but people: no result depends on it.
_UNREAD = "metrics.jsonl"


def _expect(cases, least, allowed):
    """Check that there are so many cases, and that none came to anything else."""
    found = Counter(cases)
    assert found.total() >= least
    wrong = {key: number for key, number in found.items() if key[1] not in allowed}
    assert not wrong
    return found


def _expect_refusals(cases, least):
    """Of the changes to each kind of file that is read, most are refused; the rest do nothing."""
    found = _expect(cases, least, {"refused", "same"})
    assert {kind for kind, _ in found if _UNREAD not in kind} <= {
        kind for kind, outcome in found if outcome == "refused"
    }
    refused = sum(number for (_, outcome), number in found.items() if outcome == "refused")
    assert refused >= 0.9 * found.total()


def test_a_flipped_bit_is_refused_or_changes_nothing(lab):
    few = ("cache: images.npy", "config.yaml", "results.json", "model: cut.json", "circuit.json")
    _expect_refusals(flips(lab, each=3, only=few), 15)


def test_a_forged_artefact_is_refused(lab):
    _expect_refusals(forgeries(lab, most=3), 30)


def test_a_killed_stage_ends_as_if_it_had_not_been_killed(lab):
    _expect(kills(lab, each=2, only=("train", "discover")), 4, {"same"})


def test_bad_input_ends_in_one_line_and_leaves_no_file(lab, tmp_path):
    _expect(bad_inputs(lab, tmp_path, only=("suggest", "info", "show")), 50, {"refused"})


def test_what_a_command_takes_is_counted_as_accepted(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("bad_inputs.BAD_VALUES", {"device": ("cpu",)})
    monkeypatch.setattr("bad_inputs.BAD_PATHS", ())
    [(verb, outcome)] = bad_inputs(lab, tmp_path, only=("info",))
    assert verb == "info"
    assert outcome.startswith("ACCEPTED with 0")


@pytest.mark.slow
def test_no_flipped_bit_of_any_kind_of_file_is_silent(lab):
    _expect_refusals(flips(lab, each=12), 12 * 25)


@pytest.mark.slow
def test_no_forged_artefact_of_any_kind_is_accepted(lab):
    _expect_refusals([*forgeries(lab, most=40), *tensor_forgeries(lab)], 120)


@pytest.mark.slow
def test_no_kill_changes_a_result_or_leaves_anything(lab):
    _expect(kills(lab, each=25), 25 * len(KILLED), {"same"})


@pytest.mark.slow
def test_no_bad_input_to_any_command_is_accepted_or_unclear(lab, tmp_path):
    found = _expect(bad_inputs(lab, tmp_path), 150, {"refused"})
    assert {verb for verb, _ in found} >= set(cli.VERBS) - {"demo"}
