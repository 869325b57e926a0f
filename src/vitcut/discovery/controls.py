"""Controls: scores that do not look at the task. A method has to beat them to mean anything."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.graph import Graph
from vitcut.model.weights import ViTWeights
from vitcut.shapes import Float, Tensor


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """One score per head and neuron of a graph."""

    heads: NDArray[np.float64]
    """Shape [blocks, heads, kinds]."""
    neurons: NDArray[np.float64]
    """Shape [blocks, kinds, neurons]."""


def random_scores(graph: Graph, num_neurons: int, *, seed: int) -> PartScores:
    """Uniform between 0 and 1, for heads and neurons of every kind."""
    random = np.random.default_rng(seed)
    blocks, kinds = graph.num_layers, graph.num_kinds
    return PartScores(
        heads=random.random((blocks, graph.num_heads, kinds)),
        neurons=random.random((blocks, kinds, num_neurons)),
    )


def magnitude_scores(weights: ViTWeights, graph: Graph) -> PartScores:
    """The norms of a part's weights: value times output of a head, in times out of a neuron.

    Weights do not depend on tokens, so a part scores the same in every token kind. Gates are
    ignored.
    """
    heads: list[Float[Tensor, "heads"]] = []
    neurons: list[Float[Tensor, "neurons"]] = []
    for block in weights.blocks:
        attn, mlp = block.attn, block.mlp
        heads.append(attn.v_weight.flatten(1).norm(dim=1) * attn.out_weight.flatten(1).norm(dim=1))
        # With a norm between the two layers, a neuron reaches the output through its factor.
        out = mlp.out_weight if mlp.norm is None else mlp.out_weight * mlp.norm.weight
        neurons.append(mlp.in_weight.norm(dim=1) * out.norm(dim=0))
    kinds = graph.num_kinds
    return PartScores(
        heads=torch.stack(heads).double().cpu().numpy()[:, :, None].repeat(kinds, axis=2),
        neurons=torch.stack(neurons).double().cpu().numpy()[:, None].repeat(kinds, axis=1),
    )
