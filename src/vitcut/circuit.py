"""A circuit: which edges are kept, and how that was found. Immutable.

What it computes is left to the intervention floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import ArtefactError, CircuitError
from vitcut.files import read_json, sha256_json, write_json
from vitcut.graph import Graph
from vitcut.names import Ablation

FORMAT_VERSION = 1
_SAME = ("graph", "task", "ablation")
_ORIGIN = ("model", "weight_hash", "images_fingerprint")
"""What of the provenance also holds for what is made of a circuit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """The edges of a graph that are kept, under one ablation of the others.

    Two circuits are equal when graph, kept edges and ablation are: what they compute.
    """

    graph: Graph
    kept: NDArray[np.bool_]
    """True where an edge is kept, shape [sources, targets]; copied and made read-only."""
    ablation: Ablation
    """What stands in for a cut edge."""
    method: str = "manual"
    """Which algorithm chose the edges."""
    task: str | None = None
    """Name of the task that the circuit was found for."""
    tau: float | None = None
    """ACDC's threshold in nats; None for other methods."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Where the circuit comes from: model hash, images, settings; JSON values."""

    def __post_init__(self) -> None:
        kept = np.array(self.kept, dtype=np.bool_)
        if kept.shape != self.graph.edges.shape:
            raise CircuitError(
                f"kept has shape {kept.shape}, this graph needs {self.graph.edges.shape} "
                "(sources, targets)"
            )
        if (kept & ~self.graph.edges).any():
            source, target = np.argwhere(kept & ~self.graph.edges)[0]
            raise CircuitError(
                f"{self.graph.sources[source].name} -> {self.graph.targets[target].name} is no "
                "edge of this graph: the target reads before the source writes"
            )
        if self.ablation not in get_args(Ablation):
            raise CircuitError(
                f"ablation must be one of {', '.join(get_args(Ablation))}, got {self.ablation!r}"
            )
        kept.setflags(write=False)
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def full(cls, graph: Graph, *, ablation: Ablation = "mean") -> "Circuit":
        """The circuit that keeps every edge: the model itself."""
        return cls(graph=graph, kept=graph.edges, ablation=ablation)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        same = self.graph == other.graph and self.ablation == other.ablation
        return same and np.array_equal(self.kept, other.kept)

    def __hash__(self) -> int:
        return hash((self.graph, self.ablation, self.kept.tobytes()))

    def __and__(self, other: "Circuit") -> "Circuit":
        """Edges that both keep."""
        return self._combine(other, np.logical_and, "and")

    def __or__(self, other: "Circuit") -> "Circuit":
        """Edges that either keeps."""
        return self._combine(other, np.logical_or, "or")

    def __invert__(self) -> "Circuit":
        """The complement: exactly the edges that this circuit cuts."""
        provenance = {**self._origin(), "not": self.fingerprint}
        kept = self.graph.edges & ~self.kept
        return replace(self, kept=kept, method="complement", tau=None, provenance=provenance)

    def with_ablation(self, ablation: Ablation) -> "Circuit":
        """The same edges under another ablation; the provenance names the one of discovery."""
        if ablation == self.ablation:
            return self
        provenance = {"discovered_under": self.ablation, **self.provenance}
        return replace(self, ablation=ablation, provenance=provenance)

    @property
    def discovered_under(self) -> Ablation:
        """The ablation of the search, whatever the circuit's own is now."""
        return self.provenance.get("discovered_under", self.ablation)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the circuit computes: graph, kept edges, ablation."""
        return sha256_json(self._content())

    @cached_property
    def num_kept(self) -> int:
        """How many edges are kept."""
        return int(self.kept.sum())

    @cached_property
    def live_sources(self) -> NDArray[np.bool_]:
        """Sources with a kept path to the classifier, shape [sources]."""
        live_target = np.zeros(len(self.graph.targets), dtype=np.bool_)
        live_target[self.graph.classifier] = True
        live = np.zeros(len(self.graph.sources), dtype=np.bool_)
        for source in reversed(range(len(self.graph.sources))):
            live[source] = bool((self.kept[source] & live_target).any())
            live_target[list(self.graph.targets_of(source))] = live[source]
        return live

    @cached_property
    def reached_sources(self) -> NDArray[np.bool_]:
        """Sources with a kept path from embed, shape [sources]."""
        reached = np.zeros(len(self.graph.sources), dtype=np.bool_)
        reached[0] = True
        for source in range(1, len(self.graph.sources)):
            readers = list(self.graph.targets_of(source))
            reached[source] = bool((self.kept[:, readers] & reached[:, None]).any())
        return reached

    @cached_property
    def num_heads_kept(self) -> int:
        """Heads on a kept path from embed to the classifier."""
        on_path = self.live_sources & self.reached_sources
        heads = np.array([source.kind == "head" for source in self.graph.sources])
        return int((on_path & heads).sum())

    def save(self, path: Path) -> None:
        """Write ``circuit.json``, atomically."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of ``circuit.json``, with a hash of all of it."""
        origin = {
            "method": self.method,
            "task": self.task,
            "tau": self.tau,
            "provenance": dict(self.provenance),
            "fingerprint": self.fingerprint,
        }
        content = {"format_version": FORMAT_VERSION, **origin, **self._content()}
        return {**content, "sha256": sha256_json(content)}

    @classmethod
    def load(cls, path: Path) -> "Circuit":
        """Read ``circuit.json``.

        Raises:
            ArtefactError: The file is missing, damaged, altered or of a newer version.
        """
        content = read_json(path, kind="circuit", newest_version=FORMAT_VERSION)
        try:
            hashed = content.pop("sha256")
            sound = sha256_json(content) == hashed
            graph = Graph(**content["graph"])
            circuit = cls(
                graph=graph,
                kept=_kept_from_names(graph, content["kept"]),
                ablation=content["ablation"],
                method=content["method"],
                task=content["task"],
                tau=content["tau"],
                provenance=content["provenance"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, CircuitError) as error:
            raise ArtefactError(f"{path} is not a valid circuit: {error!r}") from None
        if not sound:
            raise ArtefactError(
                f"{path} was altered: its hash is not the one that it was written with; discover "
                "the circuit again"
            )
        return circuit

    def _content(self) -> dict[str, Any]:
        graph = {"num_layers": self.graph.num_layers, "num_heads": self.graph.num_heads}
        names = [source.name for source in self.graph.sources]
        kept = {
            target.name: [names[source] for source in np.flatnonzero(self.kept[:, number])]
            for number, target in enumerate(self.graph.targets)
        }
        return {"graph": graph, "ablation": self.ablation, "kept": kept}

    def _origin(self) -> dict[str, Any]:
        return {key: self.provenance[key] for key in _ORIGIN if key in self.provenance}

    def _combine(self, other: "Circuit", operation: np.ufunc, how: str) -> "Circuit":
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _SAME}
        hashes = self.provenance.get("weight_hash"), other.provenance.get("weight_hash")
        for name, (own, others) in {**pairs, "weight_hash": hashes}.items():
            if own != others:
                raise CircuitError(
                    f"only circuits of one model, task and ablation can be combined, got {name} "
                    f"{own!r} and {others!r}"
                )
        kept = operation(self.kept, other.kept)
        provenance = {**self._origin(), how: [self.fingerprint, other.fingerprint]}
        return replace(self, kept=kept, method=how, tau=None, provenance=provenance)


def _kept_from_names(graph: Graph, names: Mapping[str, list[str]]) -> NDArray[np.bool_]:
    kept = np.zeros(graph.edges.shape, dtype=np.bool_)
    for target, sources in names.items():
        for source in sources:
            kept[graph.source_numbers[source], graph.target_numbers[target]] = True
    return kept
