"""A fill: what stands in for the cut parts of a model, the same function for every image.

Fitting one is left to ``ablation.py`` (zeros, means) and ``least_squares.py``; applying it to
``masking.py`` and to the compiler.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError, CircuitError
from vitcut.model.weights import hash_tensors
from vitcut.shapes import Float, Tensor
from vitcut.store import atomic_path, sha256_json

_TABLES = ("sources", "neurons")
_MAPS = ("head_maps", "neuron_maps")
_FORMAT_VERSION = 1
_METADATA = "fill"
"""Format version, hash of the content, and fingerprint of the circuit, if any."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fill:
    """Tables for what is cut, and what the kept parts of a layer write in its place.

    Under ``linear`` ablation the cut heads (neurons) of a layer and token kind are predicted from
    its kept ones: a_cut := R a_kept + c. The maps are W_cut R, with W_cut the output weight of the
    cut ones, and c stands in the tables. A map is part of what its head or MLP writes: it travels
    along that source's kept edges.
    """

    sources: Float[Tensor, "sources *images tokens width"]
    """What each source of the unsplit graph carries along cut edges."""
    neurons: Float[Tensor, "blocks *images tokens neurons"] | None = None
    """The value of each hidden unit where it is cut; None for circuits that cut no neuron."""
    head_maps: Float[Tensor, "blocks kinds heads width head_dim"] | None = None
    """What a kept head writes for cut ones, besides its own output weight; None for nothing."""
    neuron_maps: Float[Tensor, "blocks kinds width neurons"] | None = None
    """The same for neurons; zero where a neuron is cut."""
    circuit: str | None = None
    """Fingerprint of the only circuit that it belongs to; None where it fits any."""

    def like(self, tensor: Tensor) -> "Fill":
        """The same fill in the type and place of a tensor."""
        values = {
            name: None if value is None else value.to(tensor.device, tensor.dtype)
            for name, value in self._tensors().items()
        }
        return replace(self, **values)

    def require_fit(self, circuit: Circuit) -> None:
        """Refuse a circuit that this fill was not made for.

        Raises:
            CircuitError: It was made for another circuit, or the ablation needs another fill.
        """
        if self.circuit not in {None, circuit.fingerprint}:
            raise CircuitError(
                f"the fill belongs to circuit {str(self.circuit)[:12]}, got circuit "
                f"{circuit.fingerprint[:12]}: fit it again"
            )
        maps = self.head_maps is not None or self.neuron_maps is not None
        if maps and circuit.ablation != "linear":
            raise CircuitError(
                f"the circuit is under {circuit.ablation} ablation, the fill is linear: pass "
                "circuit.with_ablation('linear')"
            )
        if circuit.ablation == "zero" and self._is_anything:
            raise CircuitError(
                "the circuit is under zero ablation, but the fill is not all zero: pass zeros, or "
                "circuit.with_ablation('mean')"
            )
        if circuit.neurons is not None and self.neurons is None:
            raise CircuitError("the circuit cuts neurons, the fill has no values for them")

    def save(self, path: str | Path) -> None:
        """Write ``fill.safetensors``, atomically, with a hash of its content.

        Raises:
            ArtefactError: The file cannot be written.
        """
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in self._tensors().items()
            if value is not None
        }
        # One key of metadata: safetensors writes several in random order.
        metadata = {_METADATA: f"{_FORMAT_VERSION} {self.fingerprint} {self.circuit or ''}"}
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise ArtefactError(f"cannot write {path}: {error}; is the disk full?") from None

    @classmethod
    def load(cls, path: str | Path) -> "Fill":
        """Read what ``save`` wrote.

        Raises:
            ArtefactError: The file is missing, damaged or altered.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                words = (stored.metadata() or {}).get(_METADATA, "").split(" ")
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path} is no readable fill: {error}") from None
        version, content, circuit, *_ = [*words, "", ""]
        if version.isdigit() and int(version) > _FORMAT_VERSION:
            raise ArtefactError(
                f"{path} has format_version {version}, this vitcut reads up to {_FORMAT_VERSION}: "
                "update vitcut"
            )
        if content != _content_hash(tensors, circuit or None):
            raise ArtefactError(
                f"{path} was altered: its hash is not the one that it was written with; cut again"
            )
        if not {"sources"} <= set(tensors) <= {*_TABLES, *_MAPS}:
            raise ArtefactError(
                f"{path} is no fill: it holds {', '.join(sorted(tensors)) or 'nothing'}, expected "
                f"sources and perhaps {', '.join((*_TABLES[1:], *_MAPS))}"
            )
        return cls(**tensors, circuit=circuit or None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors and of the circuit that they belong to."""
        tensors = {name: value for name, value in self._tensors().items() if value is not None}
        return _content_hash(tensors, self.circuit)

    @property
    def _is_anything(self) -> bool:
        return any(bool(t.any()) for t in self._tensors().values() if t is not None)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in (*_TABLES, *_MAPS)}


def _content_hash(tensors: dict[str, Tensor], circuit: str | None) -> str:
    return sha256_json([circuit, hash_tensors(sorted(tensors.items()))])
