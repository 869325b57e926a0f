"""Scores of parts that are cut alone: Fisher's prediction of all at once, and exact ones.

At the uncut model the gradient of the KL is zero and its curvature is the Fisher information of the
task distribution, so cutting part u, which changes an activation by d_u, costs to second order

    score_u = 1/2 mean_x sum_y p(y|x) < grad log p(y|x), d_u(x) >^2    [nats]

(after arXiv:1801.05787, eq. 5, and arXiv:2204.09656, eq. 7; there for the loss on labels, here for
KL(full || cut) on the task distribution, all y summed instead of sampled).

Measures for studies and tests: what `vitcut cut` chooses by is the joint form in `vitcut.selection`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import fixed_fill, resample_fill
from vitcut.masked.masking import Trace, full_run, masked_run
from vitcut.masked.oracle import Examples, Oracle
from vitcut.metrics import coarse_log_probs
from vitcut.model.weights import ViTWeights
from vitcut.names import LETTERS, Ablation, Tokens
from vitcut.progress import track
from vitcut.shapes import Float, Int, Tensor

_CHUNK = 16
"""Pairs per forward pass: what is held at once."""


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """One score in nats per part of a graph; NaN where there is no such part."""

    heads: NDArray[np.float64]
    """Shape [blocks, heads, kinds]."""
    neurons: NDArray[np.float64]
    """Shape [blocks, kinds, neurons]."""
    edges: NDArray[np.float64] | None
    """Shape [sources, targets]; None where they were not asked for."""


def fisher_scores(
    weights: ViTWeights,
    examples: Examples,
    ablation: Ablation,
    *,
    tokens: Tokens = "split",
    edges: bool = False,
) -> PartScores:
    """What cutting each part alone costs, to second order, of every part at once.

    Args:
        weights: The model, in the precision to compute with.
        examples: Images, pairs and groups; under ``mean`` each image counts once, and the means
            are over the same images, as the oracle does it.
        ablation: What stands in for a cut part.
        tokens: Parts over whole tokens, or per token kind.
        edges: Whether edges are scored too; takes longer.

    Raises:
        CircuitError: The ablation is ``linear``, which depends on what else is cut.
    """
    examples = examples.for_ablation(ablation)
    pixels = examples.pixels.to(weights.device, weights.dtype)
    fill = None
    if ablation != "resample":
        fill = fixed_fill(ablation, weights, pixels.split(_CHUNK))
    scorer = _Scorer(weights, weights.graph_of(tokens), edges=edges)
    chunks = torch.arange(len(examples.clean)).split(_CHUNK)
    for chunk in track(chunks, "Fisher scores", len(chunks), unit="batches"):
        clean = torch.from_numpy(examples.clean)[chunk]
        corrupted = torch.from_numpy(examples.corrupted)[chunk]
        now = fill
        if now is None:
            with torch.no_grad():
                now = resample_fill(weights, pixels[corrupted], neurons=True)
        scorer.add(pixels[clean], examples.group_of_class, now)
    return scorer.scores(len(examples.clean))


class _Scorer:
    """Sums of squared first-order changes over images and classes."""

    def __init__(self, weights: ViTWeights, graph: Graph, *, edges: bool) -> None:
        self._weights = weights
        self._graph = graph
        self._rows = weights.rows_of(graph)
        blocks, kinds = graph.num_layers, graph.num_kinds
        zero = torch.zeros((), dtype=torch.float64, device=weights.device)
        self._heads = zero.new_zeros(blocks, graph.num_heads, kinds)
        self._neurons = zero.new_zeros(blocks, kinds, weights.num_neurons)
        self._edges = zero.new_zeros(graph.edges.shape) if edges else None

    def add(self, pixels: Tensor, group_of_class: Tensor, fill: Fill) -> None:
        """Add the part of some images."""
        graph = self._weights.graph
        blocks = range(graph.num_layers)

        def choose(run: Trace) -> list[Tensor]:
            # All heads of a block add to one stream: its gradient is that of any of them.
            streams = [run.sources[graph.head_source(layer, 0)] for layer in blocks]
            inputs = run.inputs if self._edges is not None else ()
            return [*run.heads, *run.neurons, *streams, *inputs]

        run, passes = trace_gradients(
            self._weights, pixels, group_of_class, choose, per_head=self._edges is not None
        )
        changes = pixels.new_zeros(0)
        if self._edges is not None:
            pairs = zip(fill.sources, run.sources, strict=True)
            changes = torch.stack([(then - now).detach() for then, now in pairs])
        for found in passes:
            share = found.log_prob.exp() / 2
            heads, neurons, streams, inputs = _parts(found.by, len(blocks))
            for layer in blocks:
                first = graph.head_source(layer, 0)
                tables = fill.sources[first : first + graph.num_heads]
                z = run.heads[layer].detach()
                self._add_heads(layer, share, streams[layer], tables, heads[layer] * z)
                values = fill.neurons
                if values is not None:
                    change = neurons[layer] * (values[layer] - run.neurons[layer].detach())
                    self._add_neurons(layer, share, change)
            if inputs:
                self._add_edges(share, inputs, changes)

    def scores(self, pairs: int) -> PartScores:
        """The means over the pairs that were added."""
        edges = None
        if self._edges is not None:
            edges = (self._edges / pairs).cpu().numpy()
            edges[~self._graph.edges] = np.nan
        return PartScores(
            heads=(self._heads / pairs).cpu().numpy(),
            neurons=(self._neurons / pairs).cpu().numpy(),
            edges=edges,
        )

    def _add_heads(
        self, layer: int, share: Tensor, stream: Tensor, tables: Tensor, own: Tensor
    ) -> None:
        """<gradient, ablated - clean>: the ablated value at the stream, the clean one at z."""
        equation = "nkw,hkw->nh" if tables.ndim == 3 else "nkw,hnkw->nh"
        for kind, rows in enumerate(self._rows):
            ablated = torch.einsum(equation, stream[:, rows], tables[..., rows, :])
            change = ablated - own[:, :, rows].sum((2, 3)).T
            self._heads[layer, :, kind] += share.double() @ change.double().square()

    def _add_neurons(self, layer: int, share: Tensor, change: Tensor) -> None:
        for kind, rows in enumerate(self._rows):
            total = change[:, rows].sum(1).double()
            self._neurons[layer, kind] += share.double() @ total.square()

    def _add_edges(self, share: Tensor, inputs: Sequence[Tensor], changes: Tensor) -> None:
        graph, own = self._graph, self._weights.graph
        reads = [
            targets
            for layer in range(own.num_layers)
            for targets in (
                *(own.letter_targets(layer, letter) for letter in LETTERS),
                [own.mlp_target(layer)],
            )
        ]
        for targets, gradient in zip([*reads, [own.classifier]], inputs, strict=True):
            written = changes[: own.num_written(targets[0])]
            for kind, rows in enumerate(self._rows):
                found = [graph.target_of_kind(target, kind) for target in targets]
                numbers = [number for number in found if number is not None]
                if numbers and self._edges is not None:
                    change = torch.einsum(
                        "tnkw,snkw->nst", gradient[:, :, rows], written[:, :, rows]
                    )
                    total = torch.einsum("n,nst->st", share.double(), change.double().square())
                    sources = slice(kind, len(written) * graph.num_kinds, graph.num_kinds)
                    self._edges[sources, numbers] += total


def _parts(
    by: Sequence[Tensor], blocks: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    return by[:blocks], by[blocks : 2 * blocks], by[2 * blocks : 3 * blocks], by[3 * blocks :]


def exact_edges(oracle: Oracle, edges: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The mean KL(full || circuit) of cutting one edge and nothing else, for every edge.

    Args:
        oracle: Measures on its pairs, tokens and under its ablation; one masked forward per edge.
        edges: Which edges to measure, shape [sources, targets]; all of them if None.

    Returns:
        Scores in nats, shape [sources, targets]; NaN where nothing was measured.

    Raises:
        CircuitError: ``edges`` has another shape, or marks what is no edge of the oracle's graph.
    """
    graph = oracle.graph
    chosen = graph.edges if edges is None else edges
    _require_shape("edges", chosen, graph.edges.shape, "(sources, targets)")
    if (chosen & ~graph.edges).any():
        source, target = np.argwhere(chosen & ~graph.edges)[0]
        raise CircuitError(
            f"{graph.sources[source].name} -> {graph.targets[target].name} is no edge of the "
            "oracle's graph: choose from graph.edges"
        )

    def without(edge: tuple[int, ...]) -> float:
        kept = graph.edges.copy()
        kept[edge] = False
        return oracle.kl(kept)

    return _measured(chosen, without, "edges")


def exact_heads(oracle: Oracle, heads: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The mean KL(full || circuit) of cutting one head in one token kind and nothing else.

    A head is cut with all the edges that it writes to. It writes to a whole token kind, or to all
    tokens where the oracle's graph has no kinds.

    Args:
        oracle: Measures on its pairs, tokens and under its ablation; one masked forward per head.
        heads: Which heads to measure, shape [blocks, heads, kinds]; all of them if None.

    Returns:
        Scores in nats, shape [blocks, heads, kinds]; NaN where nothing was measured.

    Raises:
        CircuitError: ``heads`` has another shape.
    """
    graph = oracle.graph
    shape = (graph.num_layers, graph.num_heads, graph.num_kinds)
    chosen = np.ones(shape, dtype=np.bool_) if heads is None else heads
    _require_shape("heads", chosen, shape, "(blocks, heads, kinds)")

    def without(head: tuple[int, ...]) -> float:
        kept = graph.edges.copy()
        kept[graph.head_source(*head)] = False
        return oracle.kl(kept)

    return _measured(chosen, without, "heads")


def exact_neurons(oracle: Oracle, neurons: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean KL(full || circuit) of cutting one neuron in one token kind and nothing else.

    Args:
        oracle: Measures on its pairs, tokens and under its ablation; one masked forward per neuron.
        neurons: Which neurons to measure, shape [blocks, kinds, neurons].

    Returns:
        Scores in nats, shape [blocks, kinds, neurons]; NaN where nothing was measured.

    Raises:
        CircuitError: ``neurons`` has another shape.
    """
    graph = oracle.graph
    shape = (graph.num_layers, graph.num_kinds, *neurons.shape[2:3])
    _require_shape("neurons", neurons, shape, "(blocks, kinds, neurons)")

    def without(neuron: tuple[int, ...]) -> float:
        kept = np.ones_like(neurons)
        kept[neuron] = False
        return oracle.kl(graph.edges, kept)

    return _measured(neurons, without, "neurons")


def _measured(
    chosen: NDArray[np.bool_], without: Callable[[tuple[int, ...]], float], unit: str
) -> NDArray[np.float64]:
    """What ``without`` gives for each chosen part."""
    scores = np.full(chosen.shape, np.nan)
    todo = [tuple(part) for part in np.argwhere(chosen).tolist()]
    for part in track(todo, f"cutting {unit} one at a time", len(todo), unit=unit):
        scores[part] = without(part)
    return scores


def _require_shape(
    name: str, chosen: NDArray[np.bool_], shape: tuple[int, ...], words: str
) -> None:
    if chosen.shape != shape:
        raise CircuitError(f"{name} must have shape {shape} {words}, got {chosen.shape}")


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of log q(y|x) for one y, where q is the task distribution of a model."""

    log_prob: Float[Tensor, "images"]
    """log q(y|x)."""
    by: tuple[Float[Tensor, "..."], ...]
    """One per tensor that was asked for, of its shape."""


def trace_gradients(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    group_of_class: Int[Tensor, "classes"],
    choose: Callable[[Trace], Sequence[Tensor]],
    *,
    masked: tuple[Circuit, Fill] | None = None,
    per_head: bool = False,
) -> tuple[Trace, Iterator[Gradients]]:
    """Trace a model once, then make one backward pass per coarse class.

    Args:
        weights: The model.
        pixels: Normalised images.
        group_of_class: The group number of each class of the model.
        choose: Picks the tensors of the forward pass whose gradients are wanted.
        masked: The circuit and fill of the masked model; the uncut model if None.
        per_head: Give each head of the uncut model its own inputs.

    Returns:
        The forward pass, and the gradients for y = 0, 1, ... in turn, computed as they are asked
        for.
    """
    with torch.enable_grad():
        # The pixels are the only leaf; without one autograd would not record the pass.
        leaf = pixels.detach().requires_grad_()
        if masked is None:
            run = full_run(weights, leaf, per_head=per_head)
        else:
            run = masked_run(weights, leaf, *masked)
        log_probs = coarse_log_probs(run.logits, group_of_class, int(group_of_class.max()) + 1)
        # Images do not see each other: the gradient of the sum holds that of every image.
        sums = log_probs.sum(0).unbind()
    wanted, values = list(choose(run)), log_probs.detach()

    def backward() -> Iterator[Gradients]:
        for y, total in enumerate(sums):
            found = torch.autograd.grad(
                total,
                wanted,
                retain_graph=y < len(sums) - 1,
                allow_unused=True,
                materialize_grads=True,
            )
            yield Gradients(log_prob=values[:, y], by=found)

    return run, backward()
