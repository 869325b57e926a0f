"""The masked model: what a circuit means, computed part by part with no shortcut.

Speed is left to discovery and the compiler; both are tested against this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.errors import CircuitError
from vitcut.intervention.forward import (
    attend,
    classify,
    embed,
    normalise,
    output_bias,
    project,
    run_mlp,
    write,
)
from vitcut.names import LETTERS
from vitcut.shapes import Float, Tensor
from vitcut.vits.weights import ViTWeights

ReadInputs = Callable[
    [Sequence[int], Sequence[Tensor]], Float[Tensor, "targets images tokens width"]
]
"""Numbers of targets that read alike, and the sources written so far -> those targets' inputs."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One forward pass, part by part."""

    sources: tuple[Float[Tensor, "images tokens width"], ...]
    """What each source wrote, in the graph's order."""
    logits: Float[Tensor, "images classes"]


def full_run(weights: ViTWeights, pixels: Float[Tensor, "images channels y x"]) -> Run:
    """The uncut model, and what each of its sources writes."""

    def read(targets: Sequence[int], written: Sequence[Tensor]) -> Tensor:
        total = torch.stack(tuple(written)).sum(0) + output_bias(weights, len(written))
        return total.expand(len(targets), *total.shape)

    return _run(weights, pixels, read)


def masked_logits(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    kept: NDArray[np.bool_],
    ablated: Float[Tensor, "sources *images tokens width"],
) -> Float[Tensor, "images classes"]:
    """Logits of the model in which cut edges carry ablated values.

    A target's input, before its LayerNorm, is the sum of what its kept sources write now, the
    ablated values of its cut sources, and the output biases before it.

    Args:
        weights: The model.
        pixels: Normalised images.
        kept: True where an edge is kept, shape [sources, targets].
        ablated: What each source writes along cut edges: one table for all images (mean, zero), or
            one per image (resample).

    Raises:
        CircuitError: ``kept`` or ``ablated`` does not fit the model.
    """
    if kept.shape != weights.graph.edges.shape or len(ablated) != len(kept):
        raise CircuitError(
            f"kept {kept.shape} and ablated {tuple(ablated.shape)} do not fit a model of "
            f"{weights.graph.edges.shape} sources and targets"
        )
    mask = torch.from_numpy(kept.copy()).to(weights.device, weights.dtype)

    def read(targets: Sequence[int], written: Sequence[Tensor]) -> Tensor:
        readable = len(written)
        replaced = ablated[:readable]
        changes = torch.stack([now - then for now, then in zip(written, replaced, strict=True)])
        chosen = mask[:readable, list(targets)].T
        inputs = (chosen @ changes.flatten(1)).unflatten(1, changes.shape[1:])
        return inputs + (replaced.sum(0) + output_bias(weights, readable))

    return _run(weights, pixels, read).logits


def _run(weights: ViTWeights, pixels: Tensor, read: ReadInputs) -> Run:
    graph = weights.graph
    written = [embed(weights, pixels)]
    for layer, block in enumerate(weights.blocks):
        attn = block.attn
        q, k, v = (
            project(
                attn,
                letter,
                normalise(block.attn_norm, read(graph.letter_targets(layer, letter), written)),
            )
            for letter in LETTERS
        )
        written += write(attn, attend(q, k, attn.scale) @ v).unbind(0)
        stream = read([graph.mlp_target(layer)], written)[0]
        written.append(run_mlp(block.mlp, normalise(block.mlp_norm, stream)))
    logits = classify(weights, read([graph.classifier], written)[0, :, 0])
    return Run(sources=tuple(written), logits=logits)
