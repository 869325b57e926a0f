import subprocess
import sys
from dataclasses import dataclass, field
from math import inf, nan
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vitcut.settings
from vitcut.benchmark.settings import BenchSettings
from vitcut.errors import ConfigError
from vitcut.runtime import set_threads
from vitcut.settings import (
    as_plain,
    config_hash,
    require_at_least,
    require_fraction,
    require_here,
    require_memory,
    require_one_of,
    require_positive,
)
from vitcut.training.settings import TrainSettings

CHECKS = {
    "positive": lambda value: require_positive("x", value),
    "at least 1": lambda value: require_at_least("x", value, 1),
    "fraction": lambda value: require_fraction("x", value),
}


@dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    pairs: tuple[tuple[float, ...], ...] = ((0.5,),)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        ("positive", 1e-300),
        ("positive", 3),
        ("at least 1", 1),
        ("at least 1", inf),
        ("fraction", 0.0),
        ("fraction", 1.0),
    ],
)
def test_what_is_in_range_passes(check, value):
    CHECKS[check](value)


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [("positive", value, "a finite number > 0") for value in (0.0, -1.0, nan, inf, -inf)]
    + [("at least 1", value, ">= 1") for value in (0, -1, 0.999, nan, -inf)]
    + [("fraction", value, "between 0 and 1") for value in (-1e-9, 1.001, nan, inf)],
)
def test_what_is_out_of_range_is_refused_with_its_name_and_value(check, value, expected):
    with pytest.raises(ConfigError, match=f"^x must be {expected}, got {value}$"):
        CHECKS[check](value)


def test_settings_become_json_values():
    plain = {"name": "x", "inner": {"sizes": [1, 2]}, "pairs": [[0.5]]}
    assert as_plain(Outer()) == plain


@given(st.dictionaries(st.text(), st.integers() | st.tuples(st.integers(), st.text())))
def test_equal_settings_have_equal_hashes(content):
    as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in content.items()}
    assert config_hash(content) == config_hash(dict(reversed(as_lists.items())))


@given(st.lists(st.integers(), max_size=3), st.lists(st.integers(), max_size=3))
def test_different_settings_have_different_hashes(one, other):
    assert (config_hash(*one) == config_hash(*other)) == (one == other)
    assert len(config_hash(*one)) == 16


def test_a_word_outside_a_closed_set_is_refused_with_the_set():
    require_one_of("precision", "float32", ("float32", "float64"))
    with pytest.raises(ConfigError, match="precision must be one of float32, float64, got 'half'"):
        require_one_of("precision", "half", ("float32", "float64"))


@pytest.mark.parametrize(
    ("needed", "told"), [(123.4, "123.4"), (4.04, "4.1"), (1e4, "10,000.0"), (0.0123, "0.012")]
)
def test_memory_that_is_needed_is_told_so_that_it_is_more_than_what_is_allowed(
    needed, told, monkeypatch
):
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=0))
    with pytest.raises(ConfigError, match=rf"a fit needs about {told} GiB, .*memory-gib allows"):
        require_memory("a fit", needed_gib=needed, memory_gib=0.99 * needed)


def test_what_the_process_holds_already_counts(monkeypatch):
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=3 * 2**30))
    require_memory("a fit", needed_gib=1, memory_gib=4)
    with pytest.raises(ConfigError, match=r"about 4\.1 GiB, 3\.0 of them for what is"):
        require_memory("a fit", needed_gib=1.1, memory_gib=4)


def test_settings_of_a_larger_machine_load_and_are_refused_where_they_are_used(monkeypatch):
    monkeypatch.setitem(vitcut.settings._BOUNDS, "threads", (1, 2, "the cores"))
    made = (TrainSettings(threads=64, workers=1), BenchSettings(threads=64))
    for settings in made:
        with pytest.raises(ConfigError, match="threads must be between 1 and 2"):
            require_here(settings)
    with pytest.raises(ConfigError, match="threads must be between 1 and 2"):
        set_threads(64)


def test_threads_are_bounded_by_the_cores_that_this_process_may_use():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    code += "from vitcut.settings import require_bounds; require_bounds('threads', 2)"
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert "threads must be between 1 and 1 (the cores that this process may use)" in ended.stderr
