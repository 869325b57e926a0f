import pytest

from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_tau_must_be_a_positive_number(tau):
    with pytest.raises(ConfigError, match="tau must be a finite number > 0"):
        DiscoverSettings(tau=tau)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed must be between 0 and"):
        DiscoverSettings(seed=-1)


def test_a_search_refuses_linear_ablation_in_one_line():
    config = DiscoverSettings()
    # Past the shape hook, which refuses it first in tests.
    object.__setattr__(config, "ablation", "linear")
    expected = "^ablation of a search must be one of zero, mean, resample, got 'linear'$"
    with pytest.raises(ConfigError, match=expected):
        config.__post_init__()


def test_a_search_is_under_the_ablation_that_its_cut_is_filled_with():
    assert DiscoverSettings().ablation == "mean"
