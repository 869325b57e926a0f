"""A circuit: which edges and neurons are kept, and how that was found. Immutable.

What it computes is left to the intervention floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import ArtefactError, CircuitError
from vitcut.graph import Graph
from vitcut.names import Ablation, TokenKind
from vitcut.store import read_json, sha256_json, write_json

FORMAT_VERSION = 2
_SAME = ("graph", "task", "ablation")
_ORIGIN = ("model", "weight_hash", "images_fingerprint")
"""What of the provenance also holds for what is made of a circuit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """The edges and neurons of a graph that are kept, under one ablation of the others.

    A head is cut where none of its edges is kept. Two circuits are equal when graph, kept parts and
    ablation are: what they compute.
    """

    graph: Graph
    kept: NDArray[np.bool_]
    """True where an edge is kept, shape [sources, targets]; copied and made read-only."""
    ablation: Ablation
    """What stands in for a cut part."""
    neurons: NDArray[np.bool_] | None = None
    """True where a neuron is kept, shape [blocks, kinds, neurons]; None where all are."""
    method: str = "manual"
    """Which algorithm chose the parts."""
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
        object.__setattr__(self, "neurons", _checked_neurons(self.graph, self.neurons))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def full(cls, graph: Graph, *, ablation: Ablation = "mean") -> "Circuit":
        """The circuit that keeps every edge: the model itself."""
        return cls(graph=graph, kept=graph.edges, ablation=ablation)

    @classmethod
    def of_parts(
        cls,
        graph: Graph,
        *,
        heads: NDArray[np.bool_],
        neurons: NDArray[np.bool_],
        ablation: Ablation,
        **origin: Any,
    ) -> "Circuit":
        """The circuit that keeps some heads and neurons, and every edge of what it keeps.

        Args:
            graph: Over whole tokens or per token kind.
            heads: True where a head is kept, shape [blocks, heads, kinds].
            neurons: True where a neuron is kept, shape [blocks, kinds, neurons].
            ablation: What stands in for the others.
            **origin: ``method``, ``task``, ``tau``, ``provenance``.
        """
        sources = np.ones(len(graph.sources), dtype=np.bool_)
        graph.by_block(sources)[0][:] = heads
        kept = graph.edges & sources[:, None]
        return cls(graph=graph, kept=kept, neurons=neurons, ablation=ablation, **origin)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __and__(self, other: "Circuit") -> "Circuit":
        """Parts that both keep."""
        return self._combine(other, np.logical_and, "and")

    def __or__(self, other: "Circuit") -> "Circuit":
        """Parts that either keeps."""
        return self._combine(other, np.logical_or, "or")

    def __invert__(self) -> "Circuit":
        """The complement: exactly the edges that this circuit cuts.

        Raises:
            CircuitError: The circuit cuts neurons: edges alone do not say what it is made of.
        """
        if self.neurons is not None:
            raise CircuitError(
                "a circuit that cuts neurons has no complement over edges: compare it with "
                "circuits of edges, or of other parts"
            )
        return replace(
            self,
            kept=self.graph.edges & ~self.kept,
            method="complement",
            tau=None,
            provenance={**self._origin(), "not": self.fingerprint},
        )

    def with_ablation(self, ablation: Ablation) -> "Circuit":
        """The same parts under another ablation; the provenance names the one of discovery."""
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
        """SHA-256 of what the circuit computes: graph, kept edges and neurons, ablation."""
        return sha256_json(self._content())

    def split(self, kinds: tuple[TokenKind, ...], readout: tuple[TokenKind, ...]) -> "Circuit":
        """The same circuit per token kind: every kept edge and neuron is kept in each kind.

        Args:
            kinds: Those of the model.
            readout: The ones that the classifier reads.

        Raises:
            CircuitError: The circuit has other token kinds.
        """
        graph = _split_graph(self.graph.unsplit, kinds, readout)
        if self.graph.kinds and self.graph != graph:
            raise CircuitError(
                f"the circuit has the token kinds {', '.join(self.graph.kinds)} (readout "
                f"{', '.join(self.graph.readout)}), the model has {', '.join(kinds)} (readout "
                f"{', '.join(readout)}): use the model that it was found in"
            )
        if self.graph.kinds:
            return self
        many = graph.num_kinds
        kept = np.repeat(np.repeat(self.kept, many, axis=0), many, axis=1)
        neurons = None if self.neurons is None else np.repeat(self.neurons, many, axis=1)
        kept = kept[:, : len(graph.targets)] & graph.edges
        return replace(self, graph=graph, kept=kept, neurons=neurons)

    @cached_property
    def num_kept(self) -> int:
        """How many edges are kept, structurally dead ones left out."""
        return int((self.kept & self.graph.useful_edges).sum())

    @cached_property
    def read_by_all(self) -> NDArray[np.bool_] | None:
        """Sources that all their targets read, where every other is read by none; else None.

        Shape [sources]; None says that some edge is cut while its source is kept.
        """
        readers = self.kept.sum(axis=1)
        everyone = readers == self.graph.edges.sum(axis=1)
        return everyone if bool((everyone | (readers == 0)).all()) else None

    @cached_property
    def live_sources(self) -> NDArray[np.bool_]:
        """Sources with a kept path to the classifier, shape [sources]."""
        return self.graph.find_live(self.kept)[1]

    @cached_property
    def reached_sources(self) -> NDArray[np.bool_]:
        """Sources with a kept path from embed, shape [sources]."""
        reached = np.zeros(len(self.graph.sources), dtype=np.bool_)
        first = self.graph.num_kinds
        reached[:first] = True
        for source in range(first, len(self.graph.sources)):
            readers = list(self.graph.targets_of(source))
            reached[source] = bool((self.kept[:, readers] & reached[:, None]).any())
        return reached

    @cached_property
    def heads_on_path(self) -> NDArray[np.bool_]:
        """Heads on a kept path from embed to the classifier, shape [blocks, heads, kinds]."""
        return self.graph.by_block(self.live_sources & self.reached_sources)[0]

    @cached_property
    def num_heads_kept(self) -> int:
        """Heads on a kept path from embed to the classifier, in any token kind."""
        return int(self.heads_on_path.any(axis=2).sum())

    @cached_property
    def neurons_kept_fraction(self) -> float:
        """Kept neurons of MLPs that reach the classifier, of all that can; 0 to 1."""
        _, live = self.graph.by_block(self.live_sources)
        _, useful = self.graph.by_block(self.graph.find_live(self.graph.edges)[1])
        kept = live[:, :, None] if self.neurons is None else self.neurons & live[:, :, None]
        return float(kept.mean(axis=2).sum() / useful.sum())

    def save(self, path: str | Path) -> None:
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
    def load(cls, path: str | Path) -> "Circuit":
        """Read ``circuit.json``.

        Raises:
            ArtefactError: The file is missing, damaged, altered or of a newer version.
        """
        content = read_json(path, kind="circuit", newest_version=FORMAT_VERSION)
        try:
            hashed = content.pop("sha256")
            sound = sha256_json(content) == hashed
            graph = _graph_from(content["graph"])
            circuit = cls(
                graph=graph,
                kept=_kept_from_names(graph, content["kept"]),
                neurons=_neurons_from_lists(graph, content.get("neurons")),
                ablation=content["ablation"],
                method=content["method"],
                task=content["task"],
                tau=content["tau"],
                provenance=content["provenance"],
            )
        except (LookupError, TypeError, ValueError, AttributeError, CircuitError) as error:
            raise ArtefactError(f"{path} is not a valid circuit: {error!r}") from None
        if not sound:
            raise ArtefactError(
                f"{path} was altered: its hash is not the one that it was written with; discover "
                "the circuit again"
            )
        return circuit

    def _content(self) -> dict[str, Any]:
        graph: dict[str, Any] = {
            "num_layers": self.graph.num_layers,
            "num_heads": self.graph.num_heads,
        }
        if self.graph.kinds:
            graph |= {"groups": list(self.graph.kinds), "readout": list(self.graph.readout)}
        names = [source.name for source in self.graph.sources]
        kept = {
            target.name: [names[source] for source in np.flatnonzero(self.kept[:, number])]
            for number, target in enumerate(self.graph.targets)
        }
        content = {"graph": graph, "ablation": self.ablation, "kept": kept}
        return content if self.neurons is None else {**content, "neurons": self._neuron_lists()}

    def _neuron_lists(self) -> dict[str, Any]:
        """The kept neurons of each MLP, by the name of its source."""
        neurons = np.empty((0, 0, 0)) if self.neurons is None else self.neurons
        kept = {
            self.graph.sources[self.graph.mlp_source(layer, kind)].name: np.flatnonzero(
                neurons[layer, kind]
            ).tolist()
            for layer, kind in np.ndindex(neurons.shape[:2])
        }
        return {"per_mlp": neurons.shape[2], "kept": kept}

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
        neurons = [item.neurons for item in (self, other) if item.neurons is not None]
        if len({item.shape for item in neurons}) > 1:
            raise CircuitError(
                "only circuits of one model can be combined, got "
                + " and ".join(f"{item.shape[2]}" for item in neurons)
                + " neurons per MLP"
            )
        if len(neurons) == 1:
            neurons.append(np.ones_like(neurons[0]))
        return replace(
            self,
            kept=operation(self.kept, other.kept),
            neurons=operation(*neurons) if neurons else None,
            method=how,
            tau=None,
            provenance={**self._origin(), how: [self.fingerprint, other.fingerprint]},
        )


@cache
def _split_graph(
    whole: Graph, kinds: tuple[TokenKind, ...], readout: tuple[TokenKind, ...]
) -> Graph:
    """The same graph per token kind; its parts are listed once for all circuits of a model."""
    return replace(whole, kinds=kinds, readout=readout)


def _kept_from_names(graph: Graph, names: Mapping[str, list[str]]) -> NDArray[np.bool_]:
    kept = np.zeros(graph.edges.shape, dtype=np.bool_)
    for target, sources in names.items():
        for source in sources:
            kept[graph.source_numbers[source], graph.target_numbers[target]] = True
    return kept


def _graph_from(content: Mapping[str, Any]) -> Graph:
    stored = {"kinds": "groups", "readout": "readout"}
    kinds = {name: tuple(content[key]) for name, key in stored.items() if key in content}
    return Graph(num_layers=content["num_layers"], num_heads=content["num_heads"], **kinds)


def _checked_neurons(graph: Graph, neurons: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    if neurons is None:
        return None
    checked = np.array(neurons, dtype=np.bool_)
    places = (graph.num_layers, graph.num_kinds)
    if checked.ndim != 3 or checked.shape[:2] != places or checked.shape[2] < 1:
        raise CircuitError(
            f"neurons has shape {checked.shape}, this graph needs ({graph.num_layers}, "
            f"{graph.num_kinds}, neurons) (blocks, kinds, neurons)"
        )
    checked.setflags(write=False)
    return checked


def _neurons_from_lists(
    graph: Graph, content: Mapping[str, Any] | None
) -> NDArray[np.bool_] | None:
    if content is None:
        return None
    neurons = np.zeros((graph.num_layers, graph.num_kinds, content["per_mlp"]), dtype=np.bool_)
    for layer, kind in np.ndindex(neurons.shape[:2]):
        name = graph.sources[graph.mlp_source(layer, kind)].name
        neurons[layer, kind, content["kept"][name]] = True
    return neurons
