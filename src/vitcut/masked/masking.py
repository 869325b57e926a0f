"""The masked model: what a circuit means, computed part by part with no shortcut.

Speed is left to discovery and the compiler; both are tested against this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.masked.fill import Fill
from vitcut.model.forward import (
    activate,
    attend,
    classify,
    embed,
    normalise,
    output_bias,
    project,
    read_out,
    write,
    write_neurons,
)
from vitcut.model.weights import ViTWeights
from vitcut.names import LETTERS
from vitcut.shapes import Float, Tensor

ReadInputs = Callable[
    [Sequence[int], Sequence[Tensor]], Float[Tensor, "#targets images tokens width"]
]
"""Targets of the unsplit graph and the sources so far -> those targets' inputs.

One input stands for all of them where they read the same.
"""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One forward pass, part by part; sources and targets are those of the unsplit graph."""

    sources: tuple[Float[Tensor, "images tokens width"], ...]
    """What each source wrote, in the graph's order."""
    inputs: tuple[Float[Tensor, "_targets images tokens width"], ...]
    """What the targets read, before their LayerNorm: q, k, v, MLP of each block, classifier.

    Heads that read the same have one input between them.
    """
    heads: tuple[Float[Tensor, "heads images tokens head_dim"], ...]
    """Per block, z of its heads: before the output projection."""
    neurons: tuple[Float[Tensor, "images tokens neurons"], ...]
    """Per block, its MLP's hidden units, before any is cut."""
    logits: Float[Tensor, "images classes"]


def run_gib(weights: ViTWeights, images: int) -> float:
    """The memory that a run over parts holds together for so many images, in GiB."""
    blocks, width = len(weights.blocks), weights.width
    attended = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
    per_token = (len(weights.graph.sources) + 2 * blocks + 1) * width
    per_token += blocks * (attended + weights.num_neurons)
    size = torch.finfo(weights.dtype).bits / 8
    return images * weights.num_tokens * per_token * size / 2**30


def full_run(
    weights: ViTWeights, pixels: Float[Tensor, "images channels y x"], *, per_head: bool = False
) -> Trace:
    """The uncut model, and what each of its parts computes.

    Args:
        weights: The model.
        pixels: Normalised images.
        per_head: Give each head inputs of its own, whose gradients can be told apart; slower.
    """
    read = _Sum(weights, per_head=per_head)
    return _run(weights, pixels, read, PartMask(weights, weights.graph, None, None))


def masked_run(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    circuit: Circuit,
    fill: Fill,
    *,
    mask: "PartMask | None" = None,
) -> Trace:
    """The model in which cut parts carry what a fill puts in their place.

    A target's input, before its LayerNorm, is the sum of what its kept sources write now, the
    fill's values of its cut sources, and the output biases before it. A cut neuron has the fill's
    value; the maps of a fill add to what kept heads and neurons write.

    Args:
        weights: The model.
        pixels: Normalised images.
        circuit: What is kept, over whole tokens or per token kind.
        fill: One value for all images (mean, zero, linear), or one per image (resample).
        mask: Applies circuit and fill to heads and neurons; to watch or change them on the way.

    Raises:
        CircuitError: Circuit or fill do not fit the model.
    """
    fill.require_fit(circuit)
    graph, neurons = circuit.graph, circuit.neurons
    mask = mask or PartMask(weights, graph, neurons, fill)
    if circuit.read_by_all is None:
        return _run(weights, pixels, _reader(weights, graph, circuit.kept, fill), mask)
    _require_sizes(weights, graph, circuit.kept, fill)
    rows = weights.rows_of(graph)
    alive = torch.zeros(len(fill.sources), weights.num_tokens, 1, dtype=torch.bool)
    for kind, span in enumerate(rows):
        chosen = torch.from_numpy(circuit.read_by_all[kind :: len(rows)].copy())
        alive[:, span] = chosen[:, None, None]
    return _run(weights, pixels, _Sum(weights, alive.to(weights.device), fill.sources), mask)


def masked_logits(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    kept: NDArray[np.bool_],
    fill: Fill,
    *,
    graph: Graph | None = None,
    neurons: NDArray[np.bool_] | None = None,
) -> Float[Tensor, "images classes"]:
    """Logits of the masked model (see ``masked_run``) for bare masks.

    Args:
        weights: The model.
        pixels: Normalised images.
        kept: True where an edge is kept, shape [sources, targets].
        fill: What stands in for cut parts.
        graph: That ``kept`` belongs to; the unsplit one if None.
        neurons: True where a neuron is kept, shape [blocks, kinds, neurons]; None keeps all.

    Raises:
        CircuitError: ``kept`` or ``fill`` does not fit the model.
    """
    graph = graph or weights.graph
    mask = PartMask(weights, graph, neurons, fill)
    return _run(weights, pixels, _reader(weights, graph, kept, fill), mask).logits


def _reader(weights: ViTWeights, graph: Graph, kept: NDArray[np.bool_], fill: Fill) -> ReadInputs:
    """Reads by any mask: per target the sum of its own sources."""
    _require_sizes(weights, graph, kept, fill)
    rows = weights.rows_of(graph)
    masks = [
        torch.from_numpy(graph.of_kind(kept, kind)).to(weights.device, weights.dtype)
        for kind in range(graph.num_kinds)
    ]

    def read(targets: Sequence[int], written: Sequence[Tensor]) -> Tensor:
        readable = len(written)
        replaced = fill.sources[:readable]
        changes = torch.stack([now - then for now, then in zip(written, replaced, strict=True)])
        parts: list[Tensor] = []
        for mask, span in zip(masks, rows, strict=True):
            # Targets that read alike share one sum.
            chosen, which = mask[:readable, list(targets)].T.unique(dim=0, return_inverse=True)
            seen = changes[..., span, :]
            parts.append((chosen @ seen.flatten(1)).unflatten(1, seen.shape[1:])[which])
        return torch.cat(parts, dim=2) + (replaced.sum(0) + output_bias(weights, readable))

    return read


class _Sum:
    """Reads a stream that is the same for all targets of a token: one running sum of sources."""

    def __init__(
        self,
        weights: ViTWeights,
        alive: Tensor | None = None,
        replaced: Tensor | None = None,
        *,
        per_head: bool = False,
    ) -> None:
        self._weights = weights
        self._alive = alive
        self._replaced = replaced
        self._per_head = per_head
        self._added = self._read_at = 0
        self._total = torch.zeros((), dtype=weights.dtype, device=weights.device)
        self._stream = self._total

    def __call__(self, targets: Sequence[int], written: Sequence[Tensor]) -> Tensor:
        for number in range(self._added, len(written)):
            value = written[number]
            if self._alive is not None and self._replaced is not None:
                value = torch.where(self._alive[number], value, self._replaced[number])
            self._total = self._total + value
        self._added = len(written)
        if self._read_at != len(written):
            self._read_at = len(written)
            self._stream = self._total + output_bias(self._weights, len(written))
        total = self._stream
        return total.expand(len(targets) if self._per_head else 1, *total.shape)


def _require_sizes(weights: ViTWeights, graph: Graph, kept: NDArray[np.bool_], fill: Fill) -> None:
    own = weights.graph
    if (
        graph.unsplit != own
        or len(fill.sources) != len(own.sources)
        or (kept.shape != graph.edges.shape)
    ):
        raise CircuitError(
            f"kept {kept.shape} and the fill of {len(fill.sources)} sources do not fit a model of "
            f"{own.edges.shape} sources and targets"
        )


class PartMask:
    """What becomes of heads and neurons on their way into the stream."""

    def __init__(
        self,
        weights: ViTWeights,
        graph: Graph,
        neurons: NDArray[np.bool_] | None,
        fill: Fill | None,
    ) -> None:
        self.rows = weights.rows_of(graph)
        self._fill = fill
        self._kept: Tensor | None = None
        if neurons is not None:
            expected = (len(weights.blocks), len(self.rows), weights.num_neurons)
            if neurons.shape != expected:
                raise CircuitError(
                    f"neurons has shape {neurons.shape}, this model needs {expected} (blocks, "
                    "kinds, neurons)"
                )
            if fill is None or fill.neurons is None:
                raise CircuitError("the circuit cuts neurons, the fill has no values for them")
            shape = (len(weights.blocks), weights.num_tokens, weights.num_neurons)
            self._kept = torch.ones(shape, dtype=torch.bool, device=weights.device)
            for kind, span in enumerate(self.rows):
                self._kept[:, span] = torch.from_numpy(neurons[:, kind].copy())[:, None]

    def heads(self, layer: int, z: Tensor) -> Tensor | float:
        """What kept heads write for cut ones, shape [heads, images, tokens, width]."""
        if self._fill is None or self._fill.head_maps is None:
            return 0.0
        maps = self._fill.head_maps[layer]
        shares = [
            torch.einsum("hnrd,hwd->hnrw", z[:, :, span], maps[kind])
            for kind, span in enumerate(self.rows)
        ]
        return torch.cat(shares, dim=2)

    def neurons(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | float]:
        """Hidden units with cut ones replaced, and what kept ones write for those."""
        fill, kept = self._fill, self._kept
        if kept is None or fill is None or fill.neurons is None:
            return hidden, 0.0
        replaced = torch.where(kept[layer], hidden, fill.neurons[layer])
        if fill.neuron_maps is None:
            return replaced, 0.0
        alive = hidden * kept[layer]
        maps = fill.neuron_maps[layer]
        shares = [alive[:, span] @ maps[kind].T for kind, span in enumerate(self.rows)]
        return replaced, torch.cat(shares, dim=1)


def _run(weights: ViTWeights, pixels: Tensor, read: ReadInputs, mask: PartMask) -> Trace:
    graph = weights.graph
    written = [embed(weights, pixels)]
    inputs: list[Tensor] = []
    heads: list[Tensor] = []
    neurons: list[Tensor] = []
    for layer, block in enumerate(weights.blocks):
        attn = block.attn
        inputs += [read(graph.letter_targets(layer, letter), written) for letter in LETTERS]
        q, k, v = (
            project(attn, letter, normalise(block.attn_norm, stream))
            for letter, stream in zip(LETTERS, inputs[-3:], strict=True)
        )
        z = attend(q, k, attn.scale) @ v
        heads.append(z)
        written += (write(attn, z) + mask.heads(layer, z)).unbind(0)
        inputs.append(read([graph.mlp_target(layer)], written))
        hidden = activate(block.mlp, normalise(block.mlp_norm, inputs[-1][0]))
        neurons.append(hidden)
        replaced, share = mask.neurons(layer, hidden)
        written.append(write_neurons(block.mlp, replaced) + share)
    inputs.append(read([graph.classifier], written))
    return Trace(
        sources=tuple(written),
        inputs=tuple(inputs),
        heads=tuple(heads),
        neurons=tuple(neurons),
        logits=classify(weights, read_out(weights, inputs[-1][0])),
    )
