"""What stands in for cut parts: zeros, per-token means, or another image's values."""

from collections.abc import Iterable

import torch

from vitcut.errors import CircuitError
from vitcut.masked.fill import Fill
from vitcut.masked.masking import full_run
from vitcut.model.weights import ViTWeights
from vitcut.names import Ablation
from vitcut.shapes import Float, Tensor


def zero_fill(weights: ViTWeights) -> Fill:
    """Zeros for every source, neuron and token."""
    shape = (len(weights.graph.sources), weights.num_tokens, weights.width)
    hidden = (len(weights.blocks), weights.num_tokens, weights.num_neurons)
    sources, neurons = (
        torch.zeros(size, dtype=weights.dtype, device=weights.device) for size in (shape, hidden)
    )
    return Fill(sources=sources, neurons=neurons)


@torch.no_grad()
def mean_fill(
    weights: ViTWeights, batches: Iterable[Float[Tensor, "_images channels y x"]]
) -> Fill:
    """What each source writes, and each neuron is, at each token, averaged over images.

    Args:
        weights: The model; sums are taken in float64 whatever its precision.
        batches: Normalised calibration images.

    Returns:
        The means, in the precision of ``weights``.

    Raises:
        CircuitError: There are no images.
    """
    zero = torch.zeros((), dtype=torch.float64, device=weights.device)
    sources, neurons = [zero] * len(weights.graph.sources), [zero] * len(weights.blocks)
    count = 0
    for pixels in batches:
        run = full_run(weights, pixels)
        for total, values in ((sources, run.sources), (neurons, run.neurons)):
            total[:] = [
                before + value.double().sum(0) for before, value in zip(total, values, strict=True)
            ]
        count += len(pixels)
    if count == 0:
        raise CircuitError("mean ablation needs at least 1 calibration image, got 0")
    means = Fill(sources=torch.stack(sources) / count, neurons=torch.stack(neurons) / count)
    return means.like(weights.patch_weight)


@torch.no_grad()
def resample_fill(
    weights: ViTWeights, corrupted: Float[Tensor, "images channels y x"], *, neurons: bool = False
) -> Fill:
    """The values of corrupted images, one for each.

    Args:
        weights: The model.
        corrupted: Normalised images.
        neurons: Whether the circuit cuts neurons.
    """
    run = full_run(weights, corrupted)
    hidden = torch.stack(run.neurons) if neurons else None
    return Fill(sources=torch.stack(run.sources), neurons=hidden)


def fixed_fill(
    ablation: Ablation,
    weights: ViTWeights,
    batches: Iterable[Float[Tensor, "_images channels y x"]],
) -> Fill:
    """What an ablation puts in the place of every part, the same for all images and circuits.

    Raises:
        CircuitError: There is no such fill: ``resample`` differs by image, ``linear`` by circuit.
    """
    if ablation == "zero":
        return zero_fill(weights)
    if ablation == "mean":
        return mean_fill(weights, batches)
    raise CircuitError(
        f"there is no fill for every circuit under {ablation!r} ablation: choose mean or zero, or "
        "fit a linear fill to the circuit"
    )
