import pytest

from vitcut.errors import ConfigError
from vitcut.selection.settings import Budget

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"target_macs": 0.0}, "target-macs must be above 0 and below 1 of dense, got 0.0"),
        ({"target_macs": 1.0}, "target-macs must be above 0"),
        ({"target_macs": -0.2}, "target-macs must be above 0"),
        ({"target_macs": NAN}, "target-macs must be above 0"),
        ({"target_latency": 0.0}, "target-latency must be above 0"),
        ({"target_latency": 25.0}, "target-latency must be above 0"),
        ({"target_latency": INF}, "target-latency must be above 0"),
        ({"target_macs": 0.2, "target_latency": 0.2}, "got target-macs and target-latency"),
        ({"target_macs": 0.2, "max_drop": 1.0}, "got target-macs and max-drop"),
        ({"target_macs": "0.5,1.2"}, "target-macs must be above 0 and below 1 of dense, got 1.2"),
        ({"target_macs": "half"}, "target-macs must be a fraction .* such as 0.5,0.3,0.2, got 'ha"),
        ({"target_macs": "0.5,"}, "target-macs must be a fraction"),
        ({"max_drop": 0.0}, "max-drop must be a finite number > 0"),
        ({"max_drop": 1.0, "rescore": False}, "max-drop takes cuts back"),
        ({"val_images": 0}, "val_images must be >= 1, got 0"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"score_images": 0}, "score_images must be >= 1, got 0"),
        ({"seed": -1}, "seed must be between 0 and .*, got -1"),
        ({"refresh_fraction": 1.5}, "refresh_fraction must be between 0 and 1"),
        ({"refresh_fraction": NAN}, "refresh_fraction must be between 0 and 1"),
        ({"scores": "random"}, "random scores add up: give --joint false"),
        ({"scores": "magnitude", "joint": True}, "magnitude scores add up: give --joint false"),
    ],
)
def test_bad_settings_are_refused(given, match):
    with pytest.raises(ConfigError, match=match):
        Budget(**given)


@pytest.mark.parametrize(
    ("given", "is_given"),
    [
        ({}, False),
        ({"target_macs": 0.2}, True),
        ({"target_latency": 0.999}, True),
        ({"max_drop": 1.0}, True),
        ({"scores": "random", "joint": False, "refresh_fraction": 0.0}, False),
        ({"refresh_fraction": 1.0, "rounds": 1, "score_images": 1}, False),
    ],
)
def test_good_settings_are_taken(given, is_given):
    assert Budget(**given).is_given == is_given


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("runtime", "pt2", "runtime must be one of torch, .*got 'pt2'"),
        ("scores", "acdc", "scores must be one of fisher, random, magnitude, got 'acdc'"),
        ("tokens", "half", "tokens must be one of all, split, got 'half'"),
    ],
)
def test_unknown_words_are_refused(name, value, match):
    config = Budget()
    # Past the shape hook, which refuses them first in tests.
    object.__setattr__(config, name, value)
    with pytest.raises(ConfigError, match=match):
        config.__post_init__()


@pytest.mark.parametrize(
    ("given", "macs"),
    [
        (None, ()),
        (0.3, (0.3,)),
        ("0.3", (0.3,)),
        ("0.2, 0.5,0.3,0.5", (0.5, 0.3, 0.2)),
        ((0.2, 0.4), (0.4, 0.2)),
    ],
)
def test_several_targets_fall(given, macs):
    budget = Budget(target_macs=given)
    assert budget.macs == macs
    assert budget.target_macs == (None if not macs else macs[0] if len(macs) == 1 else macs)
