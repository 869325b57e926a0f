"""The masked model: what a circuit means, computed part by part with no shortcut.

Discovery and the compiler are fast; both are tested against this file.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.masked.fill import Fill
from vitcut.model.forward import (
    activate,
    attend,
    embed,
    normalise,
    output_bias,
    project,
    read_out,
    readout_features,
    write,
    write_neurons,
)
from vitcut.model.weights import ViTWeights
from vitcut.names import LETTERS
from vitcut.shapes import Bool, Float, Tensor


@runtime_checkable
class Stream(Protocol):
    """The residual stream of one pass: sources write into it in order, targets read from it."""

    def add(self, written: Sequence[Float[Tensor, "images tokens width"]]) -> None:
        """Append what the next sources of the unsplit graph wrote."""
        ...

    def read(self, targets: Sequence[int]) -> Float[Tensor, "#targets images tokens width"]:
        """What targets of the unsplit graph read of the sources so far, before their LayerNorm.

        A single input if all of them read the same.
        """
        ...


class Step(NamedTuple):
    """Where a pass stands: just computed, not yet masked and written."""

    parts: Literal["embed", "heads", "neurons", "features", "logits"]
    layer: int
    values: Tensor
    """The embedding; z of the heads, [heads, images, tokens, head_dim]; hidden units, [images,
    tokens, neurons]; what the classifier reads, [images, features]; logits."""


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


def full_run(
    weights: ViTWeights, pixels: Float[Tensor, "images channels y x"], *, per_head: bool = False
) -> Trace:
    """Run the uncut model and keep what each of its parts computes.

    Args:
        weights: The model.
        pixels: Normalised images.
        per_head: Give each head its own inputs, so that their gradients can be told apart; slower.
    """
    stream = _RunningSum(weights, per_head=per_head)
    return run_parts(weights, pixels, stream, PartMask(weights, weights.graph, None, None))


def masked_run(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    circuit: Circuit,
    fill: Fill,
) -> Trace:
    """Run the model in which cut parts are replaced by a fill.

    A target's input, before its LayerNorm, is the sum of what its kept sources write now, the
    fill's values of its cut sources, and the output biases before it. A cut neuron has the fill's
    value; the maps of a fill add to what kept heads and neurons write. A fill may bring a
    classifier of its own. A cut position is absent: it has no token, so that attention, and a
    classifier that pools patches, spread over the others.

    Args:
        weights: The model.
        pixels: Normalised images.
        circuit: What is kept, over whole tokens or per token kind.
        fill: One value for all images (mean, zero, linear), or one per image (resample).

    Raises:
        CircuitError: Circuit or fill do not fit the model.
    """
    weights, fill = fill.applied(weights, circuit)
    mask = PartMask(weights, circuit.graph, circuit.neurons, fill)
    return run_parts(weights, pixels, circuit_stream(weights, circuit, fill.sources), mask)


def masked_forward(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    circuit: Circuit,
    fill: Fill,
) -> Float[Tensor, "images classes"]:
    """Logits of the masked model (see ``masked_run``), without keeping what leads to them.

    Raises:
        CircuitError: Circuit or fill do not fit the model.
    """
    weights, fill = fill.applied(weights, circuit)
    mask = PartMask(weights, circuit.graph, circuit.neurons, fill)
    stream = circuit_stream(weights, circuit, fill.sources)
    [last] = deque(walk(weights, pixels, stream, mask), maxlen=1)
    return last.values


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
    weights, mask = fill.refitted(weights), PartMask(weights, graph, neurons, fill)
    return run_parts(weights, pixels, _EdgeSums(weights, graph, kept, fill.sources), mask).logits


def run_parts(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    stream: Stream,
    mask: "PartMask",
) -> Trace:
    """Run a masked model, and keep what each of its parts computes.

    Args:
        weights: The model.
        pixels: Normalised images.
        stream: Decides what the targets read.
        mask: What becomes of heads and neurons before they are written.
    """
    recorder = _Recorder(stream)
    steps = list(walk(weights, pixels, recorder, mask))
    return Trace(
        sources=tuple(recorder.sources),
        inputs=tuple(recorder.inputs),
        heads=tuple(step.values for step in steps if step.parts == "heads"),
        neurons=tuple(step.values for step in steps if step.parts == "neurons"),
        logits=steps[-1].values,
    )


def walk(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    stream: Stream,
    mask: "PartMask",
) -> Iterator[Step]:
    """The forward pass behind all masked models, stopping before each write into the stream.

    Several passes can walk in step, so that a mask is fitted to the values of all of them before
    any goes on. Between two stops a pass holds the stream and what it has just computed.

    Args:
        weights: The model.
        pixels: Normalised images.
        stream: Decides what the targets read.
        mask: What becomes of heads and neurons; asked after the pass stopped with their values.
    """
    graph, embedded = weights.graph, embed(weights, pixels)
    yield Step("embed", 0, embedded)
    stream.add([embedded])
    del embedded
    for layer, block in enumerate(weights.blocks):
        q, k, v = (
            project(
                block.attn,
                letter,
                normalise(block.attn_norm, stream.read(graph.letter_targets(layer, letter))),
            )
            for letter in LETTERS
        )
        z = attend(q, k, block.attn.scale) @ v
        del q, k, v
        yield Step("heads", layer, z)
        stream.add((write(block.attn, z) + mask.heads(layer, z)).unbind(0))
        del z
        [normed] = normalise(block.mlp_norm, stream.read([graph.mlp_target(layer)]))
        hidden = activate(block.mlp, normed)
        del normed
        yield Step("neurons", layer, hidden)
        replaced, share = mask.neurons(layer, hidden)
        stream.add([write_neurons(block.mlp, replaced) + share])
        del hidden, replaced, share
    [last] = stream.read([graph.classifier])
    features = readout_features(weights, read_out(weights, last))
    yield Step("features", len(weights.blocks), features)
    logits = F.linear(features, weights.head_weight, weights.head_bias)
    yield Step("logits", len(weights.blocks), logits)


class _Recorder:
    """Notes what passes through a stream."""

    def __init__(self, stream: Stream) -> None:
        self.sources: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self._stream = stream

    def add(self, written: Sequence[Tensor]) -> None:
        self.sources += written
        self._stream.add(written)

    def read(self, targets: Sequence[int]) -> Tensor:
        self.inputs.append(self._stream.read(targets))
        return self.inputs[-1]


def circuit_stream(
    weights: ViTWeights,
    circuit: Circuit,
    replaced: Float[Tensor, "sources *images tokens width"],
) -> Stream:
    """What the targets of a circuit read: kept sources as written, cut ones from a table.

    Args:
        weights: The model.
        circuit: What is kept.
        replaced: What each source carries along cut edges. A row is looked up only when its source
            is added or later, so the rows of later blocks may still be filled in during the pass.

    Raises:
        CircuitError: The circuit or the table does not fit the model.
    """
    if circuit.read_by_all is None:
        return _EdgeSums(weights, circuit.graph, circuit.kept, replaced)
    _require_sizes(weights, circuit.graph, circuit.kept, replaced)
    # Whole sources are cut: all targets of a token read the same stream.
    rows = weights.rows_of(circuit.graph)
    alive = torch.zeros(len(replaced), weights.num_tokens, 1, dtype=torch.bool)
    for kind, span in enumerate(rows):
        chosen = torch.from_numpy(circuit.read_by_all[kind :: len(rows)].copy())
        alive[:, span] = chosen[:, None, None]
    return _RunningSum(weights, alive.to(weights.device), replaced)


class _EdgeSums:
    """A stream under any mask: every target sums its own choice of sources, all of them held."""

    def __init__(
        self, weights: ViTWeights, graph: Graph, kept: NDArray[np.bool_], replaced: Tensor
    ) -> None:
        _require_sizes(weights, graph, kept, replaced)
        self._weights, self._replaced = weights, replaced
        self._masks = [
            torch.from_numpy(graph.of_kind(kept, kind)).to(weights.device, weights.dtype)
            for kind in range(graph.num_kinds)
        ]
        self._rows = weights.rows_of(graph)
        self._written: list[Tensor] = []

    def add(self, written: Sequence[Tensor]) -> None:
        self._written += written

    def read(self, targets: Sequence[int]) -> Tensor:
        # in[t] = sum_s then[s] + biases + sum_s kept[s, t] (now[s] - then[s]), so that the choice
        # of sources is one product: [targets, sources] @ [sources, images x tokens x width].
        readable = len(self._written)
        then = self._replaced[:readable]
        changes = torch.stack([now - cut for now, cut in zip(self._written, then, strict=True)])
        parts: list[Tensor] = []
        for mask, span in zip(self._masks, self._rows, strict=True):
            # [distinct choices, sources]: targets that read alike share one sum.
            chosen, which = mask[:readable, list(targets)].T.unique(dim=0, return_inverse=True)
            seen = changes[..., span, :]
            parts.append((chosen @ seen.flatten(1)).unflatten(1, seen.shape[1:])[which])
        return torch.cat(parts, dim=2) + (then.sum(0) + output_bias(self._weights, readable))


class _RunningSum:
    """A stream that is the same for all targets of a token: one sum, whatever the depth."""

    def __init__(
        self,
        weights: ViTWeights,
        alive: Bool[Tensor, "sources tokens 1"] | None = None,
        replaced: Float[Tensor, "sources *images tokens width"] | None = None,
        *,
        per_head: bool = False,
    ) -> None:
        self._weights, self._alive, self._replaced = weights, alive, replaced
        self._per_head = per_head
        self._total = torch.zeros((), dtype=weights.dtype, device=weights.device)
        self._added = 0
        self._now: Tensor | None = None

    def add(self, written: Sequence[Tensor]) -> None:
        for number, value in enumerate(written, start=self._added):
            kept = value
            if self._alive is not None and self._replaced is not None:
                kept = torch.where(self._alive[number], value, self._replaced[number])
            self._total = self._total + kept
        self._added += len(written)
        self._now = None

    def read(self, targets: Sequence[int]) -> Tensor:
        # q, k and v ask in turn: only the first of them adds the biases.
        if self._now is None:
            self._now = self._total + output_bias(self._weights, self._added)
        return self._now.expand(len(targets) if self._per_head else 1, *self._now.shape)


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
