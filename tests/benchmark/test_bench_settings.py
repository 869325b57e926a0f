import pytest

from vitcut.benchmark.settings import BenchSettings
from vitcut.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtimes": ()}, "runtimes .* got none"),
        ({"batches": (1, 1)}, "batches .* got 1, 1"),
        ({"batches": (0,)}, "batch must be between 1 and .*, got 0"),
        ({"threads": 0}, "threads"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"min_rounds": 2}, "min_rounds"),
        ({"min_sample_ms": 0.0}, "min_sample_ms"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**change)


def test_an_unknown_runtime_is_refused_by_name():
    config = BenchSettings()
    # Past the shape hook, which refuses it first in tests.
    object.__setattr__(config, "runtimes", ("torch", "pt2"))
    with pytest.raises(ConfigError, match=r"runtime must be one of torch, .*'pt2'"):
        config.__post_init__()


def test_unless_told_otherwise_torch_and_onnxruntime_run_one_and_64_images_on_one_thread():
    config = BenchSettings()
    assert config.runtimes == ("torch", "onnxruntime")
    assert (config.batches, config.threads) == ((1, 64), 1)
