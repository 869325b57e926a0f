"""The law of the compiler, checked on every cut: compact(x) == masked(x)."""

from dataclasses import dataclass

import torch

from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.errors import ExactnessError
from vitcut.masked.fill import Fill
from vitcut.masked.masking import masked_run
from vitcut.model.tracing import tolerance
from vitcut.model.weights import ViTWeights
from vitcut.shapes import Float, Tensor

_CHUNK = 16
"""Images per masked forward, which holds every source of every image."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """How far a compact model is from the masked one."""

    max_abs_diff: float
    """Largest difference of two logits."""
    tolerance: float
    """Largest difference that rounding explains."""
    images: int
    """How many images were compared."""


@torch.no_grad()
def verify(
    compact: CompactViT,
    weights: ViTWeights,
    circuit: Circuit,
    fill: Fill,
    pixels: Float[Tensor, "images channels y x"],
) -> Exactness:
    """Compare a compact model with the masked model that it was compiled from.

    Args:
        compact: The compact model; its precision sets the tolerance.
        weights: The model.
        circuit: The circuit.
        fill: What stands in for cut parts.
        pixels: Normalised images.

    Raises:
        ExactnessError: They differ by more than rounding explains, or there are no images.
    """
    if len(pixels) == 0:
        raise ExactnessError("a compact model is verified on at least 1 image, got 0")
    parameter = next(compact.parameters())
    expected: list[Tensor] = []
    got: list[Tensor] = []
    for chunk in pixels.to(weights.device, weights.dtype).split(_CHUNK):
        run = masked_run(weights, chunk, circuit, fill.like(weights.patch_weight))
        expected.append(run.logits.cpu())
        got.append(compact(chunk.to(parameter.device, parameter.dtype)).cpu())
    return _compare(torch.cat(got), torch.cat(expected))


def _compare(got: Tensor, expected: Tensor) -> Exactness:
    difference = float((got - expected).abs().max())
    allowed = tolerance(got.dtype, expected)
    if not difference <= allowed:
        raise ExactnessError(
            f"the compact model's logits differ from the masked model's by {difference:.3g}, at "
            f"most {allowed:.3g} was expected: it was not saved; please report this circuit"
        )
    return Exactness(max_abs_diff=difference, tolerance=allowed, images=len(got))
