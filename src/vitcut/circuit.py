"""A circuit: the edges, neurons and positions that are kept, and how they were found. Immutable."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from vitcut.errors import ArtefactError, CircuitError
from vitcut.graph import Graph
from vitcut.names import Ablation, TokenKind
from vitcut.store import hash_of_read, read_json, sealed, sha256_json, write_json

FORMAT_VERSION = 3
_BEFORE_POSITIONS, _OLDEST = 2, 1
_MOST_EDGES, _MOST_NEURONS, _MOST_POSITIONS = 1 << 28, 1 << 28, 1 << 24
"""Beyond any ViT: a file that claims more is refused before anything of that size is made."""


class Provenance(TypedDict, total=False):
    """What vitcut writes into a circuit's provenance and reads again; there may be more."""

    model: str | None
    weight_hash: str
    images_fingerprint: str
    settings: "Searched"
    discovered_under: Ablation
    kl: float
    pairs: int
    node_evaluations: int
    oracle_calls: int
    precision: str
    seconds: float | None
    merges: list["Merge"]


class Searched(TypedDict, total=False):
    """The settings of a search that name the images it was made on."""

    images: int
    seed: int


class Merge(TypedDict):
    """What one merging of streams did."""

    parent: str
    edges_restored: int
    cost_before: float
    cost_after: float


class _Shape(TypedDict, total=False):
    num_layers: int
    num_heads: int
    groups: list[str]
    readout: list[str]


class _Neurons(TypedDict):
    per_mlp: int
    kept: dict[str, list[int]]


class _Positions(TypedDict):
    per_image: int
    kept: list[int]


class _File(TypedDict, total=False):
    """The keys and types of ``circuit.json``."""

    method: str
    task: str | None
    tau: float | None
    provenance: Provenance
    fingerprint: str
    graph: _Shape
    ablation: Ablation
    kept: dict[str, list[str]]
    neurons: _Neurons
    positions: _Positions


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Circuit:
    """The edges, neurons and positions that are kept, and the ablation of all others.

    A head is cut if none of its edges is kept. A position that is cut is absent from the image
    under every ablation. Circuits are equal if they compute the same: if graph, kept parts and
    ablation are equal.
    """

    graph: Graph
    kept: NDArray[np.bool_]
    """True where an edge is kept, shape [sources, targets]; copied and made read-only."""
    ablation: Ablation
    """What stands in for a cut part."""
    neurons: NDArray[np.bool_] | None = None
    """True where a neuron is kept, shape [blocks, kinds, neurons]; None if all are kept."""
    positions: NDArray[np.bool_] | None = None
    """True where a patch is kept, row by row of the image's grid, shape [patches]; None if all are
    kept. The others never enter the model: no token is computed for them, and no head sees them."""
    method: str = "manual"
    """The algorithm that chose the parts."""
    task: str | None = None
    """Name of the task that the circuit was found for."""
    tau: float | None = None
    """ACDC's threshold in nats; None for other methods."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Where the circuit comes from: model hash, images, settings; JSON values."""

    def __post_init__(self) -> None:
        graph, kept = self.graph, np.array(self.kept, dtype=np.bool_)
        if kept.shape != graph.edges.shape:
            raise CircuitError(
                f"kept has shape {kept.shape}, this graph needs {graph.edges.shape} "
                "(sources, targets)"
            )
        wrong = np.argwhere(kept & ~graph.edges)
        if len(wrong):
            source, target = wrong[0]
            raise CircuitError(
                f"{graph.sources[source].name} -> {graph.targets[target].name} is not an edge of "
                "this graph: the source must write before the target reads, in the same token kind"
            )
        if self.tau is not None and not 0 < self.tau < np.inf:
            raise CircuitError(f"tau must be a finite number > 0, got {self.tau}")
        if self.ablation not in get_args(Ablation):
            raise CircuitError(
                f"ablation must be one of {', '.join(get_args(Ablation))}, got {self.ablation!r}"
            )
        kept.setflags(write=False)
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        if self.neurons is not None:
            neurons = np.array(self.neurons, dtype=np.bool_)
            places = (graph.num_layers, graph.num_kinds)
            if neurons.ndim != 3 or neurons.shape[:2] != places or neurons.shape[2] < 1:
                raise CircuitError(
                    f"neurons has shape {neurons.shape}, this graph needs ({graph.num_layers}, "
                    f"{graph.num_kinds}, neurons) (blocks, kinds, neurons)"
                )
            neurons.setflags(write=False)
            object.__setattr__(self, "neurons", neurons)
        if self.positions is not None:
            positions = np.array(self.positions, dtype=np.bool_)
            if positions.ndim != 1 or not positions.any():
                raise CircuitError(
                    "positions must be one truth value per patch, of which at least one is true, "
                    f"got shape {positions.shape} with {int(positions.sum())} true"
                )
            positions.setflags(write=False)
            # Keeping all is not a cut, however it is said.
            object.__setattr__(self, "positions", None if positions.all() else positions)

    def __repr__(self) -> str:
        heads = f"{self.num_heads_kept} of {self.graph.num_layers * self.graph.num_heads} heads"
        return (
            f"Circuit({self.method}, {self.ablation} ablation, task {self.task!r}, keeps {heads}, "
            f"{self.num_kept} of {self.graph.num_useful_edges} edges, "
            f"{self.neurons_kept_fraction:.1%} of the neurons, "
            f"{self.positions_kept_fraction:.1%} of the positions)"
        )

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
        positions: NDArray[np.bool_] | None = None,
    ) -> "Circuit":
        """The circuit that keeps some heads and neurons, with all edges of the sources it keeps.

        Args:
            graph: Over whole tokens or per token kind.
            heads: True where a head is kept, shape [blocks, heads, kinds].
            neurons: True where a neuron is kept, shape [blocks, kinds, neurons].
            ablation: What stands in for the others.
            positions: True where a patch is kept, shape [patches]; None keeps all.
        """
        sources = np.ones(len(graph.sources), dtype=np.bool_)
        graph.by_block(sources)[0][:] = heads
        kept = graph.edges & sources[:, None]
        return cls(graph=graph, kept=kept, neurons=neurons, positions=positions, ablation=ablation)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __and__(self, other: "Circuit") -> "Circuit":
        """The parts that both circuits keep."""
        return self._combine(other, np.logical_and, "and")

    def __or__(self, other: "Circuit") -> "Circuit":
        """The parts that either circuit keeps."""
        return self._combine(other, np.logical_or, "or")

    def __invert__(self) -> "Circuit":
        """The complement: exactly the edges that this circuit cuts.

        Raises:
            CircuitError: The circuit cuts neurons or positions, so its edges alone do not define a
                complement.
        """
        if self.neurons is not None or self.positions is not None:
            raise CircuitError(
                "a circuit that cuts neurons or positions has no complement over edges: only "
                "circuits that keep all of both can be inverted"
            )
        return replace(
            self,
            kept=self.graph.edges & ~self.kept,
            method="complement",
            tau=None,
            provenance=self._origin() | {"not": self.fingerprint},
        )

    def _combine(self, other: "Circuit", operation: np.ufunc, how: str) -> "Circuit":
        for name in ("graph", "task", "ablation", "weight_hash"):
            own, others = (
                each.provenance.get(name) if name == "weight_hash" else getattr(each, name)
                for each in (self, other)
            )
            if own != others:
                raise CircuitError(
                    "only circuits of one model, task and ablation can be combined, got "
                    f"{name} {own!r} and {others!r}"
                )
        neurons = [each.neurons for each in (self, other) if each.neurons is not None]
        if len({mask.shape for mask in neurons}) > 1:
            raise CircuitError(
                "only circuits of one model can be combined, got "
                f"{' and '.join(str(mask.shape[2]) for mask in neurons)} neurons per MLP"
            )
        positions = [each.positions for each in (self, other) if each.positions is not None]
        if len({mask.shape for mask in positions}) > 1:
            raise CircuitError(
                "only circuits of one model can be combined, got "
                f"{' and '.join(str(len(mask)) for mask in positions)} patches per image"
            )
        for masks in (neurons, positions):
            # The circuit without a mask keeps all; both operations are symmetric.
            masks += [np.ones_like(mask) for mask in masks if len(masks) == 1]
        return replace(
            self,
            kept=operation(self.kept, other.kept),
            neurons=operation(*neurons) if neurons else None,
            positions=operation(*positions) if positions else None,
            method=how,
            tau=None,
            provenance=self._origin() | {how: [self.fingerprint, other.fingerprint]},
        )

    def _origin(self) -> dict[str, Any]:
        """The part of the provenance that stays true of a circuit made from this one."""
        names = ("model", "weight_hash", "images_fingerprint")
        return {name: self.provenance[name] for name in names if name in self.provenance}

    def with_ablation(self, ablation: Ablation) -> "Circuit":
        """The same parts under another ablation; the provenance names the one of discovery."""
        if ablation == self.ablation:
            return self
        provenance = {"discovered_under": self.ablation, **self.provenance}
        return replace(self, ablation=ablation, provenance=provenance)

    def require_origin(self, weight_hash: str, images_fingerprint: str) -> None:
        """Check that a circuit that was read back was found in a model, and on some images.

        Raises:
            CircuitError: It was found in another model, or on other images.
        """
        for name, wanted in (
            ("weight_hash", weight_hash),
            ("images_fingerprint", images_fingerprint),
        ):
            found = self.provenance.get(name)
            if found != wanted:
                raise CircuitError(
                    f"the circuit in the run directory is of another search ({name} {found!r}, "
                    f"expected {wanted!r}): choose another --out"
                )

    @property
    def discovered_under(self) -> Ablation:
        """The ablation of the search, whatever the circuit's own is now."""
        return self.provenance.get("discovered_under", self.ablation)

    def split(self, kinds: tuple[TokenKind, ...], readout: tuple[TokenKind, ...]) -> "Circuit":
        """The same circuit per token kind: a kept edge or neuron is kept in every kind.

        Args:
            kinds: The token kinds of the model.
            readout: The kinds that the classifier reads.

        Raises:
            CircuitError: The circuit has other token kinds.
        """
        graph = _split_graph(self.graph.unsplit, kinds, readout)
        if self.graph == graph:
            return self
        if self.graph.kinds:
            raise CircuitError(
                f"the circuit has the token kinds {', '.join(self.graph.kinds)} (readout "
                f"{', '.join(self.graph.readout)}), the model has {', '.join(kinds)} (readout "
                f"{', '.join(readout)}): use the model that it was found in"
            )
        # Number n becomes the K numbers from n K on (see Graph). Repeating gives the classifier K
        # equal columns, of which one per readout kind stays; pairs of different kinds are no edges.
        many = graph.num_kinds
        kept = np.repeat(np.repeat(self.kept, many, axis=0), many, axis=1)
        kept = kept[:, : len(graph.targets)] & graph.edges
        neurons = None if self.neurons is None else np.repeat(self.neurons, many, axis=1)
        return replace(self, graph=graph, kept=kept, neurons=neurons)

    @cached_property
    def num_kept(self) -> int:
        """How many edges are kept, without structurally dead ones."""
        return int((self.kept & self.graph.useful_edges).sum())

    @cached_property
    def read_by_all(self) -> NDArray[np.bool_] | None:
        """The sources whose edges are all kept, if every other source keeps none; else None.

        Shape [sources]. None means that some source keeps some of its edges but not all.
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
        first = self.graph.num_kinds
        reached = np.zeros(len(self.graph.sources), dtype=np.bool_)
        reached[:first] = True
        # What a source's targets read has smaller numbers, so it is decided by now.
        for source in range(first, len(reached)):
            targets = list(self.graph.targets_of(source))
            reached[source] = bool((self.kept[:, targets] & reached[:, None]).any())
        return reached

    @cached_property
    def heads_on_path(self) -> NDArray[np.bool_]:
        """Heads on a kept path from embed to the classifier, shape [blocks, heads, kinds]."""
        return self.graph.by_block(self.live_sources & self.reached_sources)[0]

    @cached_property
    def num_heads_kept(self) -> int:
        """The number of heads on a kept path from embed to the classifier, in any token kind."""
        return int(self.heads_on_path.any(axis=2).sum())

    @cached_property
    def neurons_kept_fraction(self) -> float:
        """Kept neurons of MLPs that reach the classifier, as a fraction of all that can; 0 to 1."""
        _, live = self.graph.by_block(self.live_sources)
        _, useful = self.graph.by_block(self.graph.find_live(self.graph.edges)[1])
        kept = live[:, :, None] if self.neurons is None else self.neurons & live[:, :, None]
        return float(kept.mean(axis=2).sum() / useful.sum())

    @property
    def positions_kept_fraction(self) -> float:
        """Kept patches as a fraction of the image's; 0 to 1."""
        return 1.0 if self.positions is None else float(self.positions.mean())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the circuit computes: graph, kept parts, ablation."""
        return sha256_json(self._content())

    def _content(self) -> dict[str, Any]:
        """What the circuit computes, as JSON values."""
        graph = self.graph
        shape: dict[str, Any] = {"num_layers": graph.num_layers, "num_heads": graph.num_heads}
        if graph.kinds:
            # The file format calls token kinds "groups".
            shape |= {"groups": list(graph.kinds), "readout": list(graph.readout)}
        names = [source.name for source in graph.sources]
        kept = {
            target.name: [names[source] for source in np.flatnonzero(self.kept[:, number])]
            for number, target in enumerate(graph.targets)
        }
        content: dict[str, Any] = {"graph": shape, "ablation": self.ablation, "kept": kept}
        if self.neurons is not None:
            by_mlp = {
                names[graph.mlp_source(*place)]: np.flatnonzero(self.neurons[place]).tolist()
                for place in np.ndindex(self.neurons.shape[:2])
            }
            content["neurons"] = {"per_mlp": self.neurons.shape[2], "kept": by_mlp}
        if self.positions is not None:
            kept_patches = np.flatnonzero(self.positions).tolist()
            content["positions"] = {"per_image": len(self.positions), "kept": kept_patches}
        return content

    def to_dict(self) -> dict[str, Any]:
        """The content of ``circuit.json``, with a hash of all of it."""
        content = {
            "method": self.method,
            "task": self.task,
            "tau": self.tau,
            "provenance": dict(self.provenance),
            "fingerprint": self.fingerprint,
            **self._content(),
        }
        # Earlier versions of vitcut read what cuts no positions.
        version = _BEFORE_POSITIONS if self.positions is None else FORMAT_VERSION
        return sealed(content, version)

    def save(self, path: str | Path) -> None:
        """Write ``circuit.json``, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read ``circuit.json``.

        Raises:
            ArtefactError: The file is missing, damaged, altered or of a newer version.
        """
        content = read_json(path, kind="circuit", version=FORMAT_VERSION, oldest=_OLDEST)
        try:
            circuit = cls._from_content(content)
        except (msgspec.ValidationError, LookupError, ValueError, CircuitError) as error:
            raise ArtefactError(f"{path} is not a valid circuit: {error!r}") from None
        return circuit

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> "Circuit":
        """The circuit that the content of a file stands for; it must be just what is written."""
        msgspec.convert(content, _File)
        unknown = content.keys() - _File.__annotations__.keys()
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}")
        written, listed = content["graph"], content.get("neurons")
        kinds = tuple(written.get("groups", ()))
        layers, heads = written["num_layers"], written["num_heads"]
        # Every target is listed, so that the file bounds the size of its graph.
        targets, sources = len(content["kept"]), (layers * (heads + 1) + 1) * max(1, len(kinds))
        if targets < layers * (3 * heads + 1) or targets * sources > _MOST_EDGES:
            raise ValueError(f"{layers} blocks of {heads} heads, but {targets} targets")
        graph = Graph(
            num_layers=layers,
            num_heads=heads,
            kinds=kinds,
            readout=tuple(written.get("readout", ())),
        )
        kept = np.zeros(graph.edges.shape, dtype=np.bool_)
        for target, names in content["kept"].items():
            numbers = [graph.source_numbers[source] for source in names]
            kept[numbers, graph.target_numbers[target]] = True
        neurons = None
        if listed is not None:
            shape = (graph.num_layers, graph.num_kinds, listed["per_mlp"])
            if not 0 < np.prod(shape, dtype=object) < _MOST_NEURONS:
                raise ValueError(f"{listed['per_mlp']} neurons per MLP")
            neurons = np.zeros(shape, dtype=np.bool_)
            for layer, kind in np.ndindex(shape[:2]):
                name = graph.sources[graph.mlp_source(layer, kind)].name
                neurons[layer, kind, listed["kept"][name]] = True
        positions = None
        if (patches := content.get("positions")) is not None:
            if not 0 < patches["per_image"] < _MOST_POSITIONS:
                raise ValueError(f"{patches['per_image']} patches per image")
            positions = np.zeros(patches["per_image"], dtype=np.bool_)
            positions[patches["kept"]] = True
        circuit = cls(
            graph=graph,
            kept=kept,
            neurons=neurons,
            positions=positions,
            ablation=content["ablation"],
            method=content["method"],
            task=content["task"],
            tau=content["tau"],
            provenance=content["provenance"],
        )
        if circuit.fingerprint != content.get("fingerprint") or circuit.fingerprint != hash_of_read(
            {key: content.get(key) for key in circuit._content()}
        ):
            raise ValueError("its graph, parts and fingerprint contradict each other")
        return circuit


@cache
def _split_graph(
    whole: Graph, kinds: tuple[TokenKind, ...], readout: tuple[TokenKind, ...]
) -> Graph:
    """The graph per token kind, made once: its lists of parts are shared by all circuits."""
    return replace(whole, kinds=kinds, readout=readout)
