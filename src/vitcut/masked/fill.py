"""A fill: what stands in for the cut parts of a model, and its file format."""

from dataclasses import dataclass, replace
from pathlib import Path

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError, CircuitError
from vitcut.model.weights import ViTWeights
from vitcut.shapes import Float, Tensor
from vitcut.store import FOLDER_REMEDY, sha256_json
from vitcut.tensors import hash_tensors, read_tensors, write_tensors

_DIMENSIONS = {
    "sources": (3, 4), "neurons": (3, 4), "head_maps": (5,), "neuron_maps": (4,),
    "head_weight": (2,), "head_bias": (1,),
}  # fmt: skip
"""How many each tensor may have."""
_FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Fill:
    """Constants in place of cut parts and, under ``linear`` ablation, maps from the kept ones.

    A linear fill predicts the cut heads (neurons) of a layer and token kind from the kept ones:
    a_cut[t] := R a_kept[t] + c[t]. The stream receives W_cut a_cut, so the map of a kept part is
    its columns of W_cut R, where W_cut is the output weight of the cut parts; W_cut c[t] is in the
    tables. A map is part of what its head or MLP writes and follows that source's kept edges.
    The classifier is fitted last: to the full model's logits, from what the cut model gives it.
    """

    sources: Float[Tensor, "sources *images tokens width"]
    """What a cut edge carries, per source of the unsplit graph."""
    neurons: Float[Tensor, "blocks *images tokens neurons"] | None = None
    """The value of each cut neuron; None for circuits that cut none."""
    head_maps: Float[Tensor, "blocks kinds heads width head_dim"] | None = None
    """What a kept head writes for the cut ones, in addition to its own output; None for nothing."""
    neuron_maps: Float[Tensor, "blocks kinds width neurons"] | None = None
    """The same for kept neurons; zero where a neuron is cut."""
    head_weight: Float[Tensor, "classes features"] | None = None
    """The classifier of the cut model; None for the model's own."""
    head_bias: Float[Tensor, "classes"] | None = None
    circuit: str | None = None
    """Fingerprint of the circuit that the fill was fitted to; None if it fits any circuit."""

    def like(self, tensor: Tensor) -> "Fill":
        """The same fill with the dtype and device of a tensor."""
        values = {name: t.to(tensor.device, tensor.dtype) for name, t in self._tensors().items()}
        return replace(self, **values)

    def on(self, weights: ViTWeights) -> "Fill":
        """The same fill on the tokens of a model, without rows of patches that it does not have.

        Args:
            weights: The model, on all patches or on some (see ``ViTWeights.at``).

        Raises:
            CircuitError: The fill is of a model with another number of tokens.
        """
        tokens, patches = self.sources.shape[-2], weights.shape.grid_size**2
        if tokens == weights.num_tokens:
            return self
        if weights.kept_patches is None or tokens != weights.num_prefix + patches:
            raise CircuitError(
                f"the fill is of a model with {tokens} tokens, got one with {weights.num_tokens}: "
                "fit it again"
            )
        kept = [weights.num_prefix + patch for patch in weights.kept_patches]
        rows = [*range(weights.num_prefix), *kept]
        neurons = None if self.neurons is None else self.neurons[..., rows, :]
        return replace(self, sources=self.sources[..., rows, :], neurons=neurons)

    def applied(self, weights: ViTWeights, circuit: Circuit) -> tuple[ViTWeights, "Fill"]:
        """The model that a circuit is masked in: on the positions it keeps, with the classifier.

        Returns:
            The weights, and this fill on their tokens.

        Raises:
            CircuitError: Circuit or fill do not fit the model.
        """
        self.require_fit(circuit)
        weights = weights.at(circuit.positions)
        fill = self.on(weights)
        return fill.refitted(weights), fill

    def refitted(self, weights: ViTWeights) -> ViTWeights:
        """The weights with this fill's classifier, if it has one."""
        if self.head_weight is None or self.head_bias is None:
            return weights
        own = self.like(weights.head_weight)
        return replace(weights, head_weight=own.head_weight, head_bias=own.head_bias)

    def require_fit(self, circuit: Circuit) -> None:
        """Check that this fill can be used for a circuit.

        Raises:
            CircuitError: It was fitted to another circuit, or the ablation needs another fill.
        """
        if self.circuit not in {None, circuit.fingerprint}:
            raise CircuitError(
                f"the fill belongs to circuit {str(self.circuit)[:12]}, got circuit "
                f"{circuit.fingerprint[:12]}: fit it again"
            )
        maps = any(
            tensor is not None for tensor in (self.head_maps, self.neuron_maps, self.head_weight)
        )
        if maps and circuit.ablation != "linear":
            raise CircuitError(
                f"the circuit is under {circuit.ablation} ablation, the fill is linear: pass "
                "circuit.with_ablation('linear')"
            )
        if circuit.ablation == "zero" and any(bool(t.any()) for t in self._tensors().values()):
            raise CircuitError(
                "the circuit is under zero ablation, but the fill is not all zero: pass zeros, or "
                "circuit.with_ablation('mean')"
            )
        if circuit.neurons is not None and self.neurons is None:
            raise CircuitError("the circuit cuts neurons, but the fill has no values for them")

    def save(self, path: str | Path) -> None:
        """Write ``fill.safetensors`` atomically, with a hash of its content.

        Raises:
            ArtefactError: The file cannot be written.
        """
        write_tensors(
            Path(path), self._tensors(), {"circuit": self.circuit}, version=_FORMAT_VERSION
        )

    @classmethod
    def load(cls, path: str | Path) -> "Fill":
        """Read a file written by ``save``.

        Raises:
            ArtefactError: The file is missing, damaged, altered or of another version.
        """
        tensors, facts = read_tensors(
            Path(path), kind="fill", version=_FORMAT_VERSION, remedy=FOLDER_REMEDY
        )
        wrong = [
            name
            for name, tensor in tensors.items()
            if tensor.ndim not in _DIMENSIONS.get(name, ()) or not tensor.is_floating_point()
        ]
        circuit = facts.get("circuit")
        if (
            wrong
            or "sources" not in tensors
            or ("head_weight" in tensors) != ("head_bias" in tensors)
            or facts.keys() != {"circuit"}
            or not isinstance(circuit, str | None)
        ):
            raise ArtefactError(
                f"{path} is not a fill: it holds {', '.join(sorted(tensors)) or 'nothing'}, "
                f"expected sources and optionally {', '.join(list(_DIMENSIONS)[1:])}; cut again"
            )
        return cls(**tensors, circuit=circuit)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors and of the circuit that they belong to."""
        return _content_hash(self._tensors(), self.circuit)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors that this fill has, by name."""
        values = {name: getattr(self, name) for name in _DIMENSIONS}
        return {name: tensor for name, tensor in values.items() if tensor is not None}


def zero_fill(weights: ViTWeights) -> Fill:
    """Zeros for every source, neuron and token."""
    like, tokens = weights.patch_weight, weights.num_tokens
    return Fill(
        sources=like.new_zeros(len(weights.graph.sources), tokens, weights.width),
        neurons=like.new_zeros(len(weights.blocks), tokens, weights.num_neurons),
    )


def _content_hash(tensors: dict[str, Tensor], circuit: str | None) -> str:
    return sha256_json([circuit, hash_tensors(sorted(tensors.items()))])
