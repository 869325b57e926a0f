import gc
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vitcut.benchmark import latency
from vitcut.benchmark.latency import (
    CpuTimes,
    foreign_cores,
    measure_latency,
    read_cpu_times,
    time_sessions,
)
from vitcut.benchmark.settings import BenchSettings
from vitcut.errors import ConfigError
from vitcut.runtimes.session import Session

IMAGES = torch.zeros(2, 3, 4, 4)
QUICK = BenchSettings(
    runtimes=("torch",), batches=(1, 3), seconds=0.05, min_rounds=5, min_sample_ms=1.0
)


class Clock:
    """Stands still unless work moves it: what is tested is the protocol, not this machine."""

    def __init__(self):
        self.ns = 0
        self.slowdown = 1.0

    def work(self, milliseconds: float) -> None:
        self.ns += round(milliseconds * 1e6 * self.slowdown)


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    CLOCK.__init__()
    fake = SimpleNamespace(perf_counter_ns=lambda: CLOCK.ns)
    monkeypatch.setattr(latency, "time", fake)
    return CLOCK


def worker(milliseconds: float, calls: list[str], name: str = "") -> Session:
    def run(images: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        CLOCK.work(milliseconds)
        return images

    return Session(runtime="torch", batch=2, threads=1, run=run)


class Model(nn.Module):
    """Takes so many milliseconds per image."""

    def __init__(self, milliseconds: float):
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        CLOCK.work(self.milliseconds * len(images))
        return images.flatten(1)


def test_every_round_times_every_session_once_in_a_shuffled_order():
    calls: list[str] = []
    sessions = {name: worker(2, calls, name) for name in "abc"}
    samples = time_sessions(sessions, IMAGES, BenchSettings(seconds=0.01, min_sample_ms=2.0))
    timed = calls[-3 * 7 :]
    rounds = [tuple(timed[start : start + 3]) for start in range(0, len(timed), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2
    assert {len(values) for values in samples.values()} == {7}


def test_the_order_depends_on_the_seed_alone():
    def order(seed: int) -> list[str]:
        calls: list[str] = []
        sessions = {name: worker(1, calls, name) for name in "abc"}
        time_sessions(sessions, IMAGES, BenchSettings(seconds=0.2, seed=seed))
        return calls

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_a_session_is_warmed_up_before_it_is_timed(clock):
    calls: list[str] = []
    first = iter([500.0, 90.0, 20.0])

    def run(images: torch.Tensor) -> torch.Tensor:
        calls.append("")
        clock.work(next(first, 5.0))
        return images

    session = Session(runtime="torch", batch=2, threads=1, run=run)
    assert set(time_sessions({"a": session}, IMAGES, QUICK)["a"]) == {5.0}


def test_samples_are_milliseconds_per_call():
    assert set(time_sessions({"a": worker(4, [])}, IMAGES, QUICK)["a"]) == {4.0}


def test_a_short_call_is_repeated_until_a_sample_can_be_timed():
    calls: list[str] = []
    config = BenchSettings(seconds=0.01, min_rounds=5, min_sample_ms=4.0)
    samples = time_sessions({"a": worker(0.125, calls)}, IMAGES, config)["a"]
    assert len(calls) > 32 * len(samples)
    assert set(samples) == {0.125}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 5), (0.1, 50), (60.0, 300)])
def test_time_buys_rounds_but_never_fewer_than_asked_nor_without_end(seconds, rounds):
    config = BenchSettings(seconds=seconds, min_rounds=5, min_sample_ms=1.0)
    assert len(time_sessions({"a": worker(2, [])}, IMAGES, config)["a"]) == rounds


def test_nothing_is_collected_during_a_sample_and_the_collector_comes_back(clock):
    seen: set[bool] = set()

    def run(images: torch.Tensor) -> torch.Tensor:
        seen.add(gc.isenabled())
        clock.work(1)
        return images

    session = Session(runtime="torch", batch=2, threads=1, run=run)
    time_sessions({"a": session}, IMAGES, QUICK)
    assert seen == {False}
    assert gc.isenabled()


def test_torch_runs_on_the_threads_of_the_settings_and_gets_its_own_back(clock):
    seen: set[int] = set()

    def run(images: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        clock.work(1)
        return images

    before = torch.get_num_threads()
    threads = before + 1
    session = Session(runtime="torch", batch=2, threads=threads, run=run)
    time_sessions({"a": session}, IMAGES, BenchSettings(threads=threads, seconds=0.01))
    assert seen == {threads}
    assert torch.get_num_threads() == before


def test_every_model_is_compared_with_the_baseline_in_time_of_baseline_over_time_of_model():
    models = {"dense": Model(4), "small": Model(1)}
    report = measure_latency(models, IMAGES, QUICK, baselines=("dense",))
    assert [(c.point, c.against, c.runtime, c.batch, c.threads) for c in report.comparisons] == [
        ("small", "dense", "torch", 1, 1),
        ("small", "dense", "torch", 3, 1),
    ]
    assert {(c.low, c.ratio, c.high) for c in report.comparisons} == {(4.0, 4.0, 4.0)}


def test_load_that_comes_and_goes_between_rounds_leaves_the_ratio(clock):
    rounds = np.random.default_rng(0).uniform(1, 9, size=2000)
    calls: list[str] = []

    def session(milliseconds: float) -> Session:
        def run(images: torch.Tensor) -> torch.Tensor:
            calls.append("")
            clock.slowdown = rounds[len(calls) // 2]
            clock.work(milliseconds)
            return images

        return Session(runtime="torch", batch=2, threads=1, run=run)

    sessions = {"dense": session(8), "small": session(4)}
    samples = time_sessions(sessions, IMAGES, BenchSettings(seconds=1.0, min_sample_ms=1.0))
    spread = np.percentile(samples["dense"], 90) / np.percentile(samples["dense"], 10)
    ratios = samples["dense"] / samples["small"]
    assert spread > 3
    assert np.median(ratios) == pytest.approx(2, rel=0.05)


def test_every_model_gets_a_latency_for_every_runtime_and_batch_size():
    report = measure_latency({"dense": Model(5)}, IMAGES, QUICK, baselines=("dense",))
    (one, three) = report.latencies["dense"]
    assert (one.runtime, one.batch, three.batch, one.threads) == ("torch", 1, 3, 1)
    assert (one.device, one.dtype) == ("cpu", "float32")
    assert (three.p10_ms, three.median_ms, three.p90_ms) == (15.0, 15.0, 15.0)
    assert three.images_per_s == pytest.approx(200)
    assert report.comparisons == ()


def test_images_are_repeated_where_a_batch_needs_more():
    shapes: set[tuple[int, ...]] = set()

    class Recorder(Model):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shapes.add(tuple(images.shape))
            return super().forward(images)

    measure_latency({"dense": Recorder(1)}, IMAGES, QUICK, baselines=("dense",))
    assert shapes == {(1, 3, 4, 4), (3, 3, 4, 4)}


def test_a_baseline_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="among small, got 'dense'"):
        measure_latency({"small": Model(1)}, IMAGES, QUICK, baselines=("dense",))


def test_timing_without_images_is_refused():
    with pytest.raises(ConfigError, match="at least one image"):
        measure_latency({"a": Model(1)}, IMAGES[:0], QUICK, baselines=("a",))


def cpu_times(own_s: float, foreign_s: float) -> list[CpuTimes]:
    """Readings before and after ten seconds."""
    after = CpuTimes(machine_s=own_s + foreign_s, own_s=own_s, wall_s=10.0)
    return [CpuTimes(machine_s=0.0, own_s=0.0, wall_s=0.0), after]


@pytest.mark.parametrize(("own_s", "foreign_s", "is_said"), [(5, 15, True), (15, 5, False)])
def test_a_machine_is_busy_through_other_processes_and_never_through_this_one(
    monkeypatch, capsys, own_s, foreign_s, is_said
):
    readings = iter(cpu_times(own_s, foreign_s))
    monkeypatch.setattr(latency, "read_cpu_times", lambda: next(readings))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    config = replace(QUICK, batches=(1,))
    measure_latency({"a": Model(1)}, IMAGES, config, baselines=("a",))
    said = capsys.readouterr().err
    assert ("other processes" in said) is is_said
    assert ("kept 1.5 of 2 cores busy" in said) is is_said


TICKS = os.sysconf("SC_CLK_TCK")


def at(wall_s: float, *, machine_s: float, own_s: float) -> CpuTimes:
    return CpuTimes(machine_s=machine_s, own_s=own_s, wall_s=wall_s)


def test_what_this_process_does_is_not_foreign():
    before, after = at(1, machine_s=7, own_s=2), at(5, machine_s=13, own_s=6)
    assert foreign_cores(before, after) == 0.5


def test_rounding_never_makes_less_than_no_core_busy():
    assert foreign_cores(at(0, machine_s=0, own_s=0), at(1, machine_s=0.9, own_s=1)) == 0


def test_a_moment_is_too_short_to_tell():
    assert foreign_cores(at(0, machine_s=0, own_s=0), at(0.1, machine_s=1, own_s=0)) is None


def test_a_system_that_does_not_tell_has_no_foreign_load(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "_STAT", tmp_path / "stat")
    assert read_cpu_times() is None
    assert foreign_cores(None, at(1, machine_s=1, own_s=1)) is None


def test_idle_and_waiting_cores_are_not_busy(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text("cpu  1 2 4 1000 1000 8 16 32 64 128\ncpu0 1 2 4\n")
    monkeypatch.setattr(latency, "_STAT", tmp_path / "stat")
    assert read_cpu_times().machine_s == 63 / TICKS


@pytest.mark.skipif(not latency._STAT.exists(), reason="needs /proc/stat")
def test_busy_seconds_of_this_process_are_part_of_those_of_the_machine():
    before, end = read_cpu_times(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = read_cpu_times()
    assert after.own_s - before.own_s >= 0.25
    assert after.machine_s - before.machine_s >= 0.25
