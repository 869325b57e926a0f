"""What a compact model costs in time: its operations by kind, and how long each kind takes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from vitcut.compact.operations import Kind, Operation, head_set_operations, operations
from vitcut.compact.plan import HeadSetPlan, Plan, ViTShape
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ArtefactError
from vitcut.progress import say
from vitcut.runtime import describe_machine
from vitcut.store import read_json, sealed, sha256_json, write_json

FORMAT_VERSION = 2

Unit = Literal[
    "call",
    "operation",
    "product",
    "weight",
    "small_product",
    "small_mac",
    "added",
    "moved",
    "normalised",
    "exponential",
    "activated",
    "patch_mac",
]
"""What takes time: the call itself; an operation of any kind; a MAC of a product with weights, its
columns rounded up to whole panels; a weight that is read; a product of two matrices per image and
head, and its MACs; elements that are added, copied, normalised, in a softmax, in an activation; a
MAC of the patch embedding."""
Counts = dict[Unit, float]

_UNITS: dict[Kind, Unit] = {
    "patch embedding": "patch_mac",
    "product per image": "small_mac",
    "sum": "added",
    "sum in product": "moved",
    "copy": "moved",
    "norm": "normalised",
    "softmax": "exponential",
    "activation": "activated",
}
"""The unit of an operation's elements or MACs; products with weights are counted in panels."""

_PANEL = 16
"""Columns of a product that CPU kernels compute together: fewer take as long."""

_SHIPPED: dict[Unit, float] = {
    "call": 3000.0,
    "operation": 1000.0,
    "product": 0.021,
    "weight": 0.05,
    "small_product": 500.0,
    "small_mac": 0.03,
    "added": 0.17,
    "moved": 0.12,
    "normalised": 0.4,
    "exponential": 0.55,
    "activated": 0.65,
    "patch_mac": 0.019,
}
"""ONNX Runtime 1.31 on one core of an AMD EPYC with AVX-512, from its operations timed alone."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Nanoseconds per unit, on one thread of some machine in some runtime.

    ``CostModel(batch=64)`` has the costs that come with vitcut, whatever was measured here.
    """

    nanoseconds: dict[Unit, float] = field(default_factory=lambda: dict(_SHIPPED))
    batch: int = 64
    """Images per call."""
    origin: str = "shipped"
    """Where the costs are from: ``shipped`` or ``calibrated``."""
    smooth: bool = False
    """Whether to spread steps evenly, for choices between parts so small that only several of them
    together save anything. Columns then count one by one, not in panels, and what the first cut
    adds counts from the start (see ``operations``)."""

    @property
    def fingerprint(self) -> str:
        """Tells costs apart: where they are from, and a hash of the numbers."""
        return f"{self.origin} {sha256_json(sorted(self.nanoseconds.items()))[:12]}"

    def latency_ms(self, plan: Plan) -> float:
        """The predicted latency of a compact model for one call, in ms."""
        return self._nanoseconds(self.count(plan)) / 1e6

    def latency_by_part(self, plan: Plan) -> dict[str, float]:
        """The predicted latencies of the embedding, each block and the classifier, in ms.

        Each part is predicted alone, so products of earlier parts are added to its sums as values.
        """
        parts = {"embed": replace(plan, blocks=(), readout=())}
        for number, block in enumerate(plan.blocks):
            parts[f"block {number}"] = replace(plan, embeds=False, blocks=(block,), readout=())
        parts["classifier"] = replace(plan, embeds=False, blocks=())
        call = self.nanoseconds["call"] / 1e6
        return {name: self.latency_ms(part) - call for name, part in parts.items()}

    def prefers(self, shape: ViTShape, one: HeadSetPlan, other: HeadSetPlan) -> bool:
        """Whether a head set, with its own queries and outputs, is faster than another."""
        times = [
            self._nanoseconds(self._tally(head_set_operations(shape, head_set, ends=True)))
            for head_set in (one, other)
        ]
        return times[0] < times[1]

    def count(self, plan: Plan) -> Counts:
        """How often each unit occurs in one call of a compact model."""
        counts = self._tally(operations(plan, smooth=self.smooth))
        counts["call"] = 1.0
        return counts

    @classmethod
    def of(cls, settings: CutSettings) -> "CostModel":
        """The costs that plans of a cut are chosen by: those of a file, or the shipped ones.

        Raises:
            ArtefactError: The file is missing, damaged, or of another version.
        """
        if settings.costs is None:
            return cls(batch=settings.batch)
        return cls.load(Path(settings.costs), batch=settings.batch)

    def save(self, path: str | Path) -> None:
        """Write costs that were measured on this machine, as JSON."""
        content = {"machine": _machine(), "nanoseconds": self.nanoseconds}
        write_json(path, sealed(content, FORMAT_VERSION))

    @classmethod
    def load(cls, path: str | Path, *, batch: int = 64) -> "CostModel":
        """Read costs that ``save`` has written; says so if they are of another machine.

        Args:
            path: The file.
            batch: Images per call.

        Raises:
            ArtefactError: The file is missing, damaged or of a newer version, or a cost is missing,
                unknown or no positive number.
        """
        content = read_json(path, kind="costs", version=FORMAT_VERSION)
        costs = content.get("nanoseconds")
        if not isinstance(costs, dict) or set(costs) != set(get_args(Unit)):
            got = ", ".join(costs) if isinstance(costs, dict) else repr(costs)
            raise ArtefactError(
                f"{path} must hold nanoseconds for {', '.join(get_args(Unit))}, got "
                f"{got or 'none'}: calibrate again"
            )
        for unit, cost in costs.items():
            if type(cost) not in {int, float} or not 0 < cost < math.inf:
                raise ArtefactError(
                    f"{path}: the cost of {unit} must be a finite number > 0, got {cost!r}: "
                    "calibrate again"
                )
        if content.get("machine") != _machine():
            say(f"{path} was measured on another machine or with another version of ONNX Runtime")
        return cls(nanoseconds=costs, batch=batch, origin="calibrated")

    def _nanoseconds(self, counts: Counts) -> float:
        return sum(self.nanoseconds[unit] * number for unit, number in counts.items())

    def _tally(self, found: Iterable[Operation]) -> Counts:
        panel = 1 if self.smooth else _PANEL
        # Integers below 2^53, so that the order in which they are added up does not matter.
        counts: Counts = dict.fromkeys(get_args(Unit), 0.0)
        for operation in found:
            heads, outputs = operation.heads, operation.outputs
            if operation.kind != "sum in product":
                counts["operation"] += 1
            if operation.kind == "product":
                # Kernels compute whole panels of columns, and read each weight once per call.
                columns = panel * -(-outputs // panel)
                counts["product"] += (
                    self.batch * heads * operation.rows * operation.inputs * columns
                )
                counts["weight"] += heads * operation.inputs * outputs
                continue
            counts[_UNITS[operation.kind]] += self.batch * operation.size
            if operation.kind == "product per image":
                counts["small_product"] += self.batch * heads
        return counts


def _machine() -> dict[str, str]:
    """What costs depend on."""
    machine = describe_machine()
    return {
        "cpu": f"{machine['cpu']}, {' '.join(machine['cpu_flags'])}",
        "onnxruntime": str(machine["versions"]["onnxruntime"]),
    }
