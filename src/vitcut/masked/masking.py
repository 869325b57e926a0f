"""The masked model: what a circuit means, computed part by part with no shortcut.

Discovery and the compiler are fast; both are tested against this file.
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
from vitcut.shapes import Bool, Float, Tensor

ReadInputs = Callable[
    [Sequence[int], Sequence[Tensor]], Float[Tensor, "#targets images tokens width"]
]
"""Maps targets of the unsplit graph, and all sources written so far, to the targets' inputs.

Returns a single input if all the targets read the same.
"""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One forward pass, part by part; sources and targets are those of the unsplit graph."""

    sources: tuple[Float[Tensor, "images tokens width"], ...]
    """What each source wrote, in the graph's order."""
    inputs: tuple[Float[Tensor, "_targets images tokens width"], ...]
    """What the targets read, before their LayerNorm: q, k, v, MLP of each block, classifier.

    Heads that read the same share one input.
    """
    heads: tuple[Float[Tensor, "heads images tokens head_dim"], ...]
    """Per block, z of its heads: before the output projection."""
    neurons: tuple[Float[Tensor, "images tokens neurons"], ...]
    """Per block, the hidden units of its MLP, before any is cut."""
    logits: Float[Tensor, "images classes"]


def run_gib(weights: ViTWeights, images: int) -> float:
    """Memory that a ``Trace`` of this many images takes, in GiB."""
    blocks, width = len(weights.blocks), weights.width
    attended = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
    # Every source, the inputs of attention, MLP and classifier, z of the heads, hidden units.
    per_token = (len(weights.graph.sources) + 2 * blocks + 1) * width
    per_token += blocks * (attended + weights.num_neurons)
    size = torch.finfo(weights.dtype).bits / 8
    return images * weights.num_tokens * per_token * size / 2**30


def full_run(
    weights: ViTWeights, pixels: Float[Tensor, "images channels y x"], *, per_head: bool = False
) -> Trace:
    """Run the uncut model and keep what each of its parts computes.

    Args:
        weights: The model.
        pixels: Normalised images.
        per_head: Give each head its own inputs, so that their gradients can be told apart; slower.
    """
    read = _running_sum(weights, per_head=per_head)
    return run_parts(weights, pixels, read, PartMask(weights, weights.graph, None, None))


def masked_run(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    circuit: Circuit,
    fill: Fill,
) -> Trace:
    """Run the model in which cut parts are replaced by a fill.

    A target's input, before its LayerNorm, is the sum of what its kept sources write now, the
    fill's values of its cut sources, and the output biases before it. A cut neuron has the fill's
    value; the maps of a fill add to what kept heads and neurons write.

    Args:
        weights: The model.
        pixels: Normalised images.
        circuit: What is kept, over whole tokens or per token kind.
        fill: One value for all images (mean, zero, linear), or one per image (resample).

    Raises:
        CircuitError: Circuit or fill do not fit the model.
    """
    fill.require_fit(circuit)
    mask = PartMask(weights, circuit.graph, circuit.neurons, fill)
    return run_parts(weights, pixels, circuit_reader(weights, circuit, fill.sources), mask)


def masked_logits(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    kept: NDArray[np.bool_],
    fill: Fill,
    *,
    graph: Graph | None = None,
    neurons: NDArray[np.bool_] | None = None,
) -> Float[Tensor, "images classes"]:
    """Logits of the masked model (see ``masked_run``) for plain masks.

    Args:
        weights: The model.
        pixels: Normalised images.
        kept: True where an edge is kept, shape [sources, targets].
        fill: What stands in for cut parts.
        graph: The graph of ``kept``; the unsplit one if None.
        neurons: True where a neuron is kept, shape [blocks, kinds, neurons]; None keeps all.

    Raises:
        CircuitError: ``kept`` or ``fill`` does not fit the model.
    """
    graph = graph or weights.graph
    mask = PartMask(weights, graph, neurons, fill)
    return run_parts(weights, pixels, _edge_reader(weights, graph, kept, fill.sources), mask).logits


def run_parts(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    read: ReadInputs,
    mask: "PartMask",
) -> Trace:
    """The forward pass behind all masked models.

    Args:
        weights: The model.
        pixels: Normalised images.
        read: What the targets read; it is called right after the sources were written that they
            can see.
        mask: What becomes of heads and neurons before they are written.
    """
    graph = weights.graph
    written = [embed(weights, pixels)]
    inputs: list[Tensor] = []
    heads: list[Tensor] = []
    neurons: list[Tensor] = []
    for layer, block in enumerate(weights.blocks):
        streams = [read(graph.letter_targets(layer, letter), written) for letter in LETTERS]
        q, k, v = (
            project(block.attn, letter, normalise(block.attn_norm, stream))
            for letter, stream in zip(LETTERS, streams, strict=True)
        )
        z = attend(q, k, block.attn.scale) @ v
        written += (write(block.attn, z) + mask.heads(layer, z)).unbind(0)
        stream = read([graph.mlp_target(layer)], written)
        hidden = activate(block.mlp, normalise(block.mlp_norm, stream[0]))
        replaced, share = mask.neurons(layer, hidden)
        written.append(write_neurons(block.mlp, replaced) + share)
        inputs += [*streams, stream]
        heads.append(z)
        neurons.append(hidden)
    inputs.append(read([graph.classifier], written))
    return Trace(
        sources=tuple(written),
        inputs=tuple(inputs),
        heads=tuple(heads),
        neurons=tuple(neurons),
        logits=classify(weights, read_out(weights, inputs[-1][0])),
    )


def circuit_reader(
    weights: ViTWeights,
    circuit: Circuit,
    replaced: Float[Tensor, "sources *images tokens width"],
) -> ReadInputs:
    """How the targets of a circuit read: kept sources as written, cut ones from a table.

    Args:
        weights: The model.
        circuit: What is kept.
        replaced: What each source carries along cut edges. A row is looked up only after its
            source was written, so the rows of later blocks may still be filled in during the pass.

    Raises:
        CircuitError: The circuit or the table does not fit the model.
    """
    if circuit.read_by_all is None:
        return _edge_reader(weights, circuit.graph, circuit.kept, replaced)
    _require_sizes(weights, circuit.graph, circuit.kept, replaced)
    # Whole sources are cut: all targets of a token read the same stream.
    rows = weights.rows_of(circuit.graph)
    alive = torch.zeros(len(replaced), weights.num_tokens, 1, dtype=torch.bool)
    for kind, span in enumerate(rows):
        chosen = torch.from_numpy(circuit.read_by_all[kind :: len(rows)].copy())
        alive[:, span] = chosen[:, None, None]
    return _running_sum(weights, alive.to(weights.device), replaced)


def _edge_reader(
    weights: ViTWeights, graph: Graph, kept: NDArray[np.bool_], replaced: Tensor
) -> ReadInputs:
    """Reads by any mask: every target sums its own choice of sources."""
    _require_sizes(weights, graph, kept, replaced)
    rows = weights.rows_of(graph)
    masks = [
        torch.from_numpy(graph.of_kind(kept, kind)).to(weights.device, weights.dtype)
        for kind in range(graph.num_kinds)
    ]

    def read(targets: Sequence[int], written: Sequence[Tensor]) -> Tensor:
        # in[t] = sum_s then[s] + biases + sum_s kept[s, t] (now[s] - then[s]), so that the choice
        # of sources is one product: [targets, sources] @ [sources, images x tokens x width].
        readable = len(written)
        then = replaced[:readable]
        changes = torch.stack([now - cut for now, cut in zip(written, then, strict=True)])
        parts: list[Tensor] = []
        for mask, span in zip(masks, rows, strict=True):
            # [distinct choices, sources]: targets that read alike share one sum.
            chosen, which = mask[:readable, list(targets)].T.unique(dim=0, return_inverse=True)
            seen = changes[..., span, :]
            parts.append((chosen @ seen.flatten(1)).unflatten(1, seen.shape[1:])[which])
        return torch.cat(parts, dim=2) + (then.sum(0) + output_bias(weights, readable))

    return read


def _running_sum(
    weights: ViTWeights,
    alive: Bool[Tensor, "sources tokens 1"] | None = None,
    replaced: Float[Tensor, "sources *images tokens width"] | None = None,
    *,
    per_head: bool = False,
) -> ReadInputs:
    """Reads a stream that is the same for all targets of a token: one running sum of sources."""
    total = stream = torch.zeros((), dtype=weights.dtype, device=weights.device)
    added = 0

    def read(targets: Sequence[int], written: Sequence[Tensor]) -> Tensor:
        nonlocal total, stream, added
        # q, k and v ask in turn: only the first of them computes the stream.
        if added < len(written):
            for number in range(added, len(written)):
                value = written[number]
                if alive is not None and replaced is not None:
                    value = torch.where(alive[number], value, replaced[number])
                total = total + value
            added = len(written)
            stream = total + output_bias(weights, added)
        return stream.expand(len(targets) if per_head else 1, *stream.shape)

    return read


def _require_sizes(
    weights: ViTWeights, graph: Graph, kept: NDArray[np.bool_], replaced: Tensor
) -> None:
    own = weights.graph
    tables = len(replaced) == len(own.sources)
    if graph.unsplit != own or not tables or kept.shape != graph.edges.shape:
        raise CircuitError(
            f"kept {kept.shape} and the fill of {len(replaced)} sources do not fit a model of "
            f"{own.edges.shape} sources and targets"
        )


class PartMask:
    """What becomes of heads and neurons before they are written into the stream."""

    def __init__(
        self,
        weights: ViTWeights,
        graph: Graph,
        neurons: NDArray[np.bool_] | None,
        fill: Fill | None,
    ) -> None:
        """Check that the mask fits the model.

        Args:
            weights: The model.
            graph: Whose token kinds the mask has.
            neurons: True where a neuron is kept, shape [blocks, kinds, neurons]; None keeps all.
            fill: Values of cut neurons, and maps; None cuts nothing.

        Raises:
            CircuitError: ``neurons`` has another shape, or the fill has no values for them.
        """
        self.rows = weights.rows_of(graph)
        self.fill = fill
        self.kept: Bool[Tensor, "blocks tokens neurons"] | None = None
        if neurons is None:
            return
        blocks, hidden = len(weights.blocks), weights.num_neurons
        if neurons.shape != (blocks, len(self.rows), hidden):
            raise CircuitError(
                f"neurons has shape {neurons.shape}, this model needs "
                f"{(blocks, len(self.rows), hidden)} (blocks, kinds, neurons)"
            )
        if fill is None or fill.neurons is None:
            raise CircuitError("the circuit cuts neurons, but the fill has no values for them")
        kept = torch.ones(blocks, weights.num_tokens, hidden, dtype=torch.bool)
        for kind, span in enumerate(self.rows):
            kept[:, span] = torch.from_numpy(neurons[:, kind].copy())[:, None]
        self.kept = kept.to(weights.device)

    def heads(
        self, layer: int, z: Float[Tensor, "heads images tokens head_dim"]
    ) -> Float[Tensor, "heads images tokens width"] | float:
        """What kept heads write for the cut ones of their block."""
        if self.fill is None or self.fill.head_maps is None:
            return 0.0
        by_kind = zip(self.rows, self.fill.head_maps[layer], strict=True)
        shares = [torch.einsum("hnrd,hwd->hnrw", z[:, :, span], maps) for span, maps in by_kind]
        return torch.cat(shares, dim=2)

    def neurons(
        self, layer: int, hidden: Float[Tensor, "images tokens neurons"]
    ) -> tuple[Tensor, Float[Tensor, "images tokens width"] | float]:
        """The hidden units with cut ones replaced, and what kept ones write for the cut ones."""
        kept, fill = self.kept, self.fill
        if kept is None or fill is None or fill.neurons is None:
            return hidden, 0.0
        # Of a cut neuron's R a_kept + c, c is its value here and R a_kept comes from the maps.
        replaced = torch.where(kept[layer], hidden, fill.neurons[layer])
        if fill.neuron_maps is None:
            return replaced, 0.0
        alive, by_kind = hidden * kept[layer], zip(self.rows, fill.neuron_maps[layer], strict=True)
        return replaced, torch.cat([alive[:, span] @ maps.T for span, maps in by_kind], dim=1)
