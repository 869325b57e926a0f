"""The reference measurement: mean KL of a circuit, in float64, by full masked forwards.

Every decision of a faster method must equal the one that these numbers give.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.errors import CircuitError, ModelError
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import fixed_fill, resample_fill
from vitcut.masked.masking import full_run, masked_logits
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.model.weights import ViTWeights
from vitcut.names import Ablation, Tokens
from vitcut.shapes import Float, Int, Tensor

PAIRS_AT_A_TIME = 16
"""Pairs per masked forward. Fixed, so that every run sums in the same order."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a discovery method measures on: images, their pairing and the task's groups."""

    pixels: Float[Tensor, "images channels y x"]
    """Normalised calibration images."""
    clean: NDArray[np.int64]
    """Number of the clean image of each pair, shape [pairs]."""
    corrupted: NDArray[np.int64]
    """Number of the corrupted image of each pair, shape [pairs]; only ``resample`` reads it."""
    group_of_class: Int[Tensor, "classes"]
    """The group number of each class of the model."""

    @property
    def num_groups(self) -> int:
        """Coarse groups of the task."""
        return int(self.group_of_class.max()) + 1

    def for_ablation(self, ablation: Ablation) -> "Examples":
        """The same examples, with each image once if the ablation does not read the pairing."""
        if ablation == "resample":
            return self
        images = np.arange(len(self.pixels))
        return replace(self, clean=images, corrupted=images)


class Oracle:
    """Mean KL(full || circuit) on the task distribution over all pairs.

    Attributes:
        ablation: What stands in for cut parts.
        graph: The graph that measured circuits are over.
        examples: The pairs that are averaged over.
        fill: The ablated values in float64; None under ``resample``, where they differ by pair.
        full_log_probs: Task distribution of the uncut model, shape [images, groups], float64.
        calls: How many circuits were measured.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: ViTWeights,
        examples: Examples,
        ablation: Ablation,
        *,
        tokens: Tokens = "all",
    ) -> None:
        """Measure the full model once.

        Args:
            weights: The model, in any precision.
            examples: Images, pairs and groups.
            ablation: What stands in for cut parts.
            tokens: Whether circuits are over whole tokens or per token kind.

        Raises:
            CircuitError: There are no pairs, or the ablation differs by circuit.
        """
        self.ablation = ablation
        self.graph = weights.graph_of(tokens)
        self.examples = examples.for_ablation(ablation)
        self.calls = 0
        if len(self.examples.clean) == 0:
            raise CircuitError("there are no pairs of clean and corrupted images to measure on")
        self._weights = weights.to(torch.float64)
        self._pixels = examples.pixels.to(self._weights.device, torch.float64)
        chunks = self._pixels.split(PAIRS_AT_A_TIME)
        self.fill: Fill | None = None
        if ablation != "resample":
            self.fill = fixed_fill(ablation, self._weights, chunks)
        self.full_log_probs = torch.cat(
            [self._log_probs(full_run(self._weights, chunk).logits) for chunk in chunks]
        )
        self._last: tuple[bytes, float] | None = None

    @torch.no_grad()
    def kl_per_pair(
        self, kept: NDArray[np.bool_], neurons: NDArray[np.bool_] | None = None
    ) -> Float[Tensor, "pairs"]:
        """KL(full || circuit) of every pair, in nats.

        Args:
            kept: True where an edge is kept, shape [sources, targets].
            neurons: True where a neuron is kept, shape [blocks, kinds, neurons]; None keeps all.
        """
        self.calls += 1
        clean, corrupted = map(torch.from_numpy, (self.examples.clean, self.examples.corrupted))
        found: list[Tensor] = []
        for pairs in torch.arange(len(clean)).split(PAIRS_AT_A_TIME):
            fill = self.fill
            if fill is None:
                pixels = self._pixels[corrupted[pairs]]
                fill = resample_fill(self._weights, pixels, neurons=neurons is not None)
            pixels = self._pixels[clean[pairs]]
            logits = masked_logits(
                self._weights, pixels, kept, fill, graph=self.graph, neurons=neurons
            )
            full = self.full_log_probs[clean[pairs]]
            found.append(kl_divergence(full, self._log_probs(logits)))
        return torch.cat(found)

    def kl(self, kept: NDArray[np.bool_], neurons: NDArray[np.bool_] | None = None) -> float:
        """Mean KL(full || circuit) in nats, summed exactly in the order of the pairs.

        Args:
            kept: True where an edge is kept, shape [sources, targets].
            neurons: True where a neuron is kept, shape [blocks, kinds, neurons]; None keeps all.

        Raises:
            ModelError: The model's output under this circuit is not finite.
        """
        # ACDC asks for a circuit again when the next edge is tested.
        mask = kept.tobytes() + (b"" if neurons is None else neurons.tobytes())
        if self._last is None or self._last[0] != mask:
            values = self.kl_per_pair(kept, neurons).tolist()
            mean = math.fsum(values) / len(values)
            if not math.isfinite(mean):
                raise ModelError(
                    f"the KL divergence of a circuit is {mean}, expected a finite number: the "
                    "model's weights or activations overflow"
                )
            self._last = (mask, mean)
        return self._last[1]

    def _log_probs(self, logits: Float[Tensor, "images classes"]) -> Float[Tensor, "images groups"]:
        return coarse_log_probs(logits, self.examples.group_of_class, self.examples.num_groups)
