from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_pixels, random_vit
from tiny_oracle import GROUP_OF_CLASS, make_examples, settings_of

from vitcut.discovery.acdc import acdc
from vitcut.discovery.search import Discovery
from vitcut.discovery.search import make_examples as pair_examples
from vitcut.errors import ArtefactError, ConfigError, TaskError
from vitcut.masked.oracle import Oracle


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_one_discovery_finds_for_any_tau_what_a_search_alone_finds(ablation):
    weights = random_vit()
    examples = make_examples(weights)
    discovery = Discovery(weights, examples, settings_of(tau=9.0, ablation=ablation))
    for tau in (0.1, 0.001):
        settings = settings_of(tau=tau, ablation=ablation)
        alone = acdc(weights, Oracle(weights, examples, ablation), settings)
        found = discovery.find(tau)
        assert found.decisions == alone.decisions
        assert found.kl == alone.kl
        assert np.array_equal(found.kept, alone.kept)


def test_a_discovery_is_over_the_graph_of_its_tokens():
    weights = random_vit()
    discovery = Discovery(weights, make_examples(weights), settings_of(tokens="split"))
    assert discovery.oracle.graph == weights.split_graph
    assert discovery.find(0.01).kept.shape == weights.split_graph.edges.shape


@pytest.mark.parametrize(("ablation", "pairs"), [("resample", 5), ("mean", 3), ("zero", 3)])
def test_pairs_are_images_where_the_pairing_is_not_read(ablation, pairs):
    weights = random_vit()
    examples = pair_examples(
        random_pixels(weights, images=3),
        np.array([0, 1, 2]),
        GROUP_OF_CLASS,
        settings_of(pairs="each_other_group"),
    )
    assert len(examples.clean) == 6
    examples = replace(examples, clean=examples.clean[:5], corrupted=examples.corrupted[:5])
    assert Discovery(weights, examples, settings_of(ablation=ablation)).num_pairs == pairs


def test_a_search_goes_on_from_its_log_and_refuses_that_of_another_tau(tmp_path):
    weights, log = random_vit(), tmp_path / "decisions.jsonl"
    discovery = Discovery(weights, make_examples(weights), settings_of())
    first = discovery.find(0.01, log=log)
    again = discovery.find(0.01, log=log)
    assert again.decisions == first.decisions
    assert again.seconds is None
    with pytest.raises(ArtefactError, match="logs another search"):
        discovery.find(0.02, log=log)


def test_too_little_memory_is_refused_before_the_model_is_measured(monkeypatch):
    weights = random_vit()

    def measured(*_, **__):
        pytest.fail("the oracle measured the model")

    monkeypatch.setattr("vitcut.discovery.search.Oracle", measured)
    with pytest.raises(ConfigError, match="memory-gib allows 1e-06"):
        Discovery(weights, make_examples(weights), settings_of(memory_gib=1e-6))


def test_examples_pair_each_image_with_one_of_another_group():
    weights, groups = random_vit(), np.array([0, 0, 1, 2, 1])
    pixels = random_pixels(weights, images=5)
    examples = pair_examples(pixels, groups, GROUP_OF_CLASS, settings_of(seed=3))
    assert torch.equal(examples.pixels, pixels)
    assert examples.num_groups == 3
    assert (groups[examples.clean] != groups[examples.corrupted]).all()
    other = pair_examples(pixels, groups, GROUP_OF_CLASS, settings_of(seed=4))
    assert (other.corrupted != examples.corrupted).any()
    with pytest.raises(TaskError, match="at least 2 groups, got 1"):
        pair_examples(pixels, np.zeros(5, dtype=int), GROUP_OF_CLASS, settings_of())
