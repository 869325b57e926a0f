"""Controls: scores that know nothing of the task. A method must beat them to mean anything."""

import numpy as np
import torch

from vitcut.discovery.scores import PartScores
from vitcut.graph import Graph
from vitcut.model.weights import MlpWeights, ViTWeights
from vitcut.shapes import Float, Tensor


def random_scores(graph: Graph, num_neurons: int, *, seed: int) -> PartScores:
    """Uniform between 0 and 1, for heads and neurons of every kind."""
    random = np.random.default_rng(seed)
    blocks, kinds = graph.num_layers, graph.num_kinds
    return PartScores(
        heads=random.random((blocks, graph.num_heads, kinds)),
        neurons=random.random((blocks, kinds, num_neurons)),
        edges=None,
    )


def magnitude_scores(weights: ViTWeights, graph: Graph) -> PartScores:
    """The norms of a part's weights: value times output of a head, in times out of a neuron.

    Between in and out stands a neuron's factor in the norm over them, where there is one; gates
    are left out. The same in every token kind: weights do not know of tokens.
    """
    heads = torch.stack(
        [
            block.attn.v_weight.flatten(1).norm(dim=1)
            * block.attn.out_weight.flatten(1).norm(dim=1)
            for block in weights.blocks
        ]
    )
    neurons = torch.stack(
        [
            block.mlp.in_weight.norm(dim=1) * _what_is_written(block.mlp).norm(dim=0)
            for block in weights.blocks
        ]
    )
    kinds = graph.num_kinds
    return PartScores(
        heads=heads.double().cpu().numpy()[:, :, None].repeat(kinds, axis=2),
        neurons=neurons.double().cpu().numpy()[:, None].repeat(kinds, axis=1),
        edges=None,
    )


def _what_is_written(mlp: MlpWeights) -> Float[Tensor, "width hidden"]:
    return mlp.out_weight if mlp.norm is None else mlp.out_weight * mlp.norm.weight
