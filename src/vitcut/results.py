"""What a run reports: measured points, their latencies and comparisons, and the results file."""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from vitcut import store
from vitcut.errors import ArtefactError, ConfigError, ModelError
from vitcut.names import Ablation, RuntimeName
from vitcut.settings import require_at_least, require_fraction

FORMAT_VERSION = 2

DENSE = "dense"
"""The name of the untouched model's point."""
CLASS_ONLY = "class-only"
"""The uncut circuit, compiled: exact, and the fairer baseline (its last block is class-only)."""
DENSE_REPAIRED = "dense-repaired"
"""The dense model, fine-tuned as the cut one was: what a repair is compared with."""


class Asked(TypedDict, total=False):
    """A budget: {"macs": 0.2}, {"max_drop": 1.0} or {"latency": 0.25, "runtime": ..., ...}."""

    macs: float
    max_drop: float
    latency: float
    runtime: RuntimeName
    batch: int


class Measured(TypedDict):
    """A mean KL divergence in nats, and the ablation it was measured under."""

    ablation: Ablation
    kl: float


class Merged(TypedDict):
    """What merging streams did; each pair is before and after."""

    edges_restored: int
    streams: tuple[int, int]
    kl: tuple[float, float] | None


class Faithfulness(TypedDict, total=False):
    """How far a circuit is from the model, where it was found and as it was cut."""

    discovery: Measured | None
    cut: Measured | None
    merge: Merged


def require_inside(name: str, path: str | None) -> None:
    """Refuse a path in a file that leads out of the file's directory.

    Raises:
        ConfigError: It does.
    """
    if path is not None:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in path or not path.isprintable():
            raise ConfigError(f"{name} must be a path within the run directory, got {path!r}")


def _require_order(what: str, *values: float | None) -> None:
    """Refuse numbers that do not rise."""
    known = [value for value in values if value is not None]
    if any(one > other for one, other in pairwise(known)):
        raise ConfigError(f"{what} must not fall, got {known}")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one model takes for one batch, in one runtime."""

    runtime: RuntimeName
    device: str
    dtype: str
    batch: int
    threads: int
    median_ms: float
    """Per batch, like `p10_ms` and `p90_ms`."""
    p10_ms: float
    p90_ms: float
    images_per_s: float
    """At the median."""

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("median_ms", "p10_ms", "p90_ms", "images_per_s"):
            require_at_least(name, getattr(self, name), 0)
        _require_order("latencies", self.p10_ms, self.median_ms, self.p90_ms)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much faster a point is than another that was timed in turn with it."""

    point: str
    against: str
    runtime: RuntimeName
    batch: int
    threads: int
    ratio: float
    """Time of `against` / time of `point`: median of the paired ratios; above 1 is faster."""
    low: float
    """Lower end of the 95 % bootstrap interval of `ratio`."""
    high: float
    """Upper end of the same interval."""

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("low", self.low, 0)
        _require_order("an interval", self.low, self.high)

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1: only then may a speed-up or slow-down be claimed."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True, kw_only=True)
class AccuracyDifference:
    """How much more often a point is right than another, on the same images."""

    point: str
    against: str
    images: int
    difference: float
    """Coarse accuracy of `point` less that of `against`, as fractions of 1."""
    low: float
    """Lower end of the 95 % bootstrap interval of `difference`, images drawn in pairs."""
    high: float
    """Upper end of the same interval."""

    def __post_init__(self) -> None:
        require_at_least("images", self.images, 1)
        _require_order("an interval", -1, self.low, self.high, 1)

    def save(self, path: str | Path) -> None:
        """Write it atomically."""
        store.save(path, self, version=FORMAT_VERSION)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model of a run: how it was made, how good, how large and how fast it is.

    A value that does not apply is None. Accuracies are fractions of 1.

    Raises:
        ConfigError: A fraction is outside 0 to 1, a count is negative, numbers contradict each
            other, or a path leads out of the run directory.
        ModelError: A number is NaN or infinite.
    """

    name: str
    method: str | None = None
    granularity: str | None = None
    ablation: Ablation | None = None
    tau: float | None = None
    budget: Asked | None = None
    """What was asked for: {"macs": 0.2}, or {"latency": 0.25, "runtime": ..., "batch": ...}."""
    edges_total: int | None = None
    edges_kept: int | None = None
    heads_total: int | None = None
    heads_kept: int | None = None
    neurons_kept_fraction: float | None = None
    positions_kept_fraction: float | None = None
    accuracy_fine: float | None = None
    accuracy_coarse: float | None = None
    change_low: float | None = None
    """Lower end of the 95 % paired interval of `accuracy_coarse` less the dense model's."""
    change_high: float | None = None
    """Upper end of the same interval."""
    kl: float | None = None
    """Mean KL(dense || this model) on the task distribution, in nats."""
    macs: int | None = None
    """Per image."""
    params: int | None = None
    bytes: int | None = None
    """Of the file of weights."""
    max_abs_diff: float | None = None
    """Largest difference between the logits of the compact and the masked model."""
    seconds: float | None = None
    """What it took to make this point."""
    images: int | None = None
    """How many images the accuracies were measured on."""
    latency: tuple[Latency, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Images by true group (rows) and predicted group (columns)."""
    faithfulness: Faithfulness | None = None
    circuit: str | None = None
    """Path of the circuit, relative to the results file."""
    model: str | None = None
    """Path of the model directory, relative to the results file."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ModelError(
                    f"point {self.name!r}: {item.name} is {value}, expected a finite number: "
                    "check the model's weights for NaN and overflow"
                )
        for name in (
            *("neurons_kept_fraction", "positions_kept_fraction"),
            *("accuracy_fine", "accuracy_coarse"),
        ):
            if getattr(self, name) is not None:
                require_fraction(f"{name} of point {self.name!r}", getattr(self, name))
        for name in ("macs", "params", "bytes", "seconds", "max_abs_diff"):
            if getattr(self, name) is not None:
                require_at_least(f"{name} of point {self.name!r}", getattr(self, name), 0)
        for kept, total in (
            (self.edges_kept, self.edges_total),
            (self.heads_kept, self.heads_total),
        ):
            _require_order(f"what point {self.name!r} keeps", 0, kept, total)
        _require_order(f"change of point {self.name!r}", -1, self.change_low, self.change_high, 1)
        for name in ("circuit", "model"):
            require_inside(f"{name} of point {self.name!r}", getattr(self, name))
        self._require_counts()

    def _require_counts(self) -> None:
        """Refuse a confusion that is not of the images and the accuracy."""
        if self.images is not None:
            require_at_least(f"images of point {self.name!r}", self.images, 1)
        if self.confusion is None:
            return
        rows, images = self.confusion, sum(map(sum, self.confusion))
        right = sum(row[number] for number, row in enumerate(rows) if number < len(row))
        if (
            any(len(row) != len(rows) or min(row) < 0 for row in rows)
            or self.images not in {None, images}
            or not math.isclose(self.accuracy_coarse or 0, right / max(images, 1), abs_tol=1e-6)
        ):
            raise ConfigError(f"the confusion of point {self.name!r} contradicts its accuracy")

    def find_latency(self, *, runtime: RuntimeName, batch: int) -> Latency | None:
        """The latency in this runtime at this batch size; None if it was not measured."""
        found = (item for item in self.latency if (item.runtime, item.batch) == (runtime, batch))
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of ``results.json``: a dense model and the points made from it."""

    task: str
    machine: dict[str, Any]
    """As `runtime.describe_machine` gives it."""
    dense: Point | None = None
    """None if there is no dense model to compare with."""
    points: tuple[Point, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def __post_init__(self) -> None:
        names = [point.name for point in self.all_points()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two points are named {twice[0]!r}: a point's name must be its own")

    def all_points(self) -> tuple[Point, ...]:
        """All points; the dense model's comes first, if there is one."""
        return self.points if self.dense is None else (self.dense, *self.points)

    def find_comparison(
        self, point: str, *, runtime: RuntimeName, batch: int, against: str = "dense"
    ) -> Comparison | None:
        """The paired comparison of two points by name; None if it was not measured."""
        wanted = (point, against, runtime, batch)
        found = (c for c in self.comparisons if (c.point, c.against, c.runtime, c.batch) == wanted)
        return next(found, None)

    def save(self, path: str | Path) -> None:
        """Write ``results.json`` atomically."""
        store.save(path, self, version=FORMAT_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read what `save` wrote.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        found = store.load(path, cls, kind="results", version=FORMAT_VERSION)
        # A card shows some points alone, and still what they were compared with.
        compared = {name for item in found.comparisons for name in (item.point, item.against)}
        missing = compared - {point.name for point in found.all_points()}
        if not isinstance(found.machine.get("cpu"), str):
            raise ArtefactError(f"{path} does not say its cpu: {store.REMEDY}")
        if missing:
            raise ArtefactError(
                f"{path} compares point {min(missing)!r}, which it does not hold: {store.REMEDY}"
            )
        return found
