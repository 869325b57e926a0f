"""How many cores other processes keep busy; what to make of it is left to `latency`."""

import os
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Of the line "cpu": user, nice, system, irq, softirq, steal; not idle and iowait."""
_LEAST_S = 0.2
"""The kernel counts in ticks of 10 ms: too coarse for anything shorter."""


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """Seconds since some moment in the past."""

    machine_s: float
    """Of all cores together, busy."""
    own_s: float
    """Of this process, on all its threads."""
    wall_s: float


def read_cpu_times() -> CpuTimes | None:
    """The CPU time spent so far; None where the system does not tell, which only Linux does."""
    if not _STAT.exists():
        return None
    ticks = [int(field) for field in _STAT.read_text().partition("\n")[0].split()[1:]]
    own = os.times()
    return CpuTimes(
        machine_s=sum(ticks[field] for field in _BUSY_FIELDS) / os.sysconf("SC_CLK_TCK"),
        own_s=own.user + own.system,
        wall_s=own.elapsed,
    )


def foreign_cores(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Cores that other processes kept busy between two readings, on average.

    None where the readings are missing, or too close to each other to tell.
    """
    if before is None or after is None or after.wall_s - before.wall_s < _LEAST_S:
        return None
    own_s = after.own_s - before.own_s
    foreign_s = after.machine_s - before.machine_s - own_s
    return max(0.0, foreign_s / (after.wall_s - before.wall_s))
