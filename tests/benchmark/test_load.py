import os
import time

import pytest

from vitcut.benchmark import load
from vitcut.benchmark.load import CpuTimes, foreign_cores, read_cpu_times

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
    monkeypatch.setattr(load, "_STAT", tmp_path / "stat")
    assert read_cpu_times() is None
    assert foreign_cores(None, at(1, machine_s=1, own_s=1)) is None


def test_idle_and_waiting_cores_are_not_busy(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text("cpu  1 2 4 1000 1000 8 16 32 64 128\ncpu0 1 2 4\n")
    monkeypatch.setattr(load, "_STAT", tmp_path / "stat")
    assert read_cpu_times().machine_s == 63 / TICKS


@pytest.mark.skipif(not load._STAT.exists(), reason="needs /proc/stat")
def test_busy_seconds_of_this_process_are_part_of_those_of_the_machine():
    before, end = read_cpu_times(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = read_cpu_times()
    assert after.own_s - before.own_s >= 0.25
    assert after.machine_s - before.machine_s >= 0.25
