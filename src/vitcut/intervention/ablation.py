"""What cut edges carry: zeros, per-token means, or another image's values."""

from collections.abc import Iterable

import torch

from vitcut.errors import CircuitError
from vitcut.intervention.masking import full_run
from vitcut.names import Ablation
from vitcut.shapes import Float, Tensor
from vitcut.vits.weights import ViTWeights


def zero_table(weights: ViTWeights) -> Float[Tensor, "sources tokens width"]:
    """Zeros for every source and token."""
    shape = (len(weights.graph.sources), weights.num_tokens, weights.width)
    return torch.zeros(shape, dtype=weights.dtype, device=weights.device)


@torch.no_grad()
def mean_table(
    weights: ViTWeights, batches: Iterable[Float[Tensor, "_images channels y x"]]
) -> Float[Tensor, "sources tokens width"]:
    """What each source writes at each token, averaged over images.

    Args:
        weights: The model; sums are taken in float64 whatever its precision.
        batches: Normalised calibration images.

    Returns:
        The means, in the precision of ``weights``.

    Raises:
        CircuitError: There are no images.
    """
    total = zero_table(weights).double()
    count = 0
    for pixels in batches:
        written = full_run(weights, pixels).sources
        for number, values in enumerate(written):
            total[number] += values.double().sum(0)
        count += len(pixels)
    if count == 0:
        raise CircuitError("mean ablation needs at least 1 calibration image, got 0")
    return (total / count).to(weights.dtype)


def fixed_table(
    ablation: Ablation,
    weights: ViTWeights,
    batches: Iterable[Float[Tensor, "_images channels y x"]],
) -> Float[Tensor, "sources tokens width"]:
    """The table that an ablation puts in the place of every source, the same for all images.

    Raises:
        CircuitError: The ablation is ``resample``, which has no such table.
    """
    if ablation == "zero":
        return zero_table(weights)
    if ablation == "mean":
        return mean_table(weights, batches)
    raise CircuitError(
        f"a circuit under {ablation!r} ablation cannot be compiled, its cut edges differ by image: "
        "choose mean or zero"
    )
