"""What stands in for the cut parts of a circuit, from the calibration images of a cut."""

from collections.abc import Mapping
from functools import cached_property

from vitcut.circuit import Circuit
from vitcut.compiler.settings import CutSettings
from vitcut.masked.fill import Fill, zero_fill
from vitcut.masked.fitting import Fit, SiteStatistics, fit_fill, mean_fill
from vitcut.masked.masking import run_gib
from vitcut.names import SiteKey
from vitcut.pipeline.subject import Subject
from vitcut.progress import track
from vitcut.settings import require_memory
from vitcut.shapes import Float, Tensor

_BATCH = 32


class Fills:
    """The fills of a model's circuits; what they share is computed once."""

    def __init__(self, subject: Subject, config: CutSettings) -> None:
        self._subject = subject
        self._config = config
        self._last: Fit | None = None

    @cached_property
    def pixels(self) -> Float[Tensor, "images channels y x"]:
        """The normalised calibration images."""
        images = self._subject.calibration(self._config.images, seed=self._config.seed)
        return self._subject.normalise(images.all())

    @cached_property
    def means(self) -> Fill:
        """The means of the uncut model, summed in float64."""
        weights = self._subject.weights
        batches = self.pixels.split(_BATCH)
        return mean_fill(
            weights,
            (
                batch.to(weights.device, weights.dtype)
                for batch in track(batches, "averaging", len(batches), unit="batches")
            ),
        )

    def of(self, circuit: Circuit) -> Fill:
        """The fill of a circuit under its ablation."""
        return self.with_statistics(circuit)[0]

    def with_statistics(
        self, circuit: Circuit
    ) -> tuple[Fill, Mapping[SiteKey, SiteStatistics] | None]:
        """The fill of a circuit, and the statistics that it was fitted to where it is linear."""
        weights = self._subject.weights
        if circuit.ablation == "zero":
            return zero_fill(weights), None
        if circuit.ablation == "mean":
            return self.means, None
        if self._last is None or self._last.fill.circuit != circuit.fingerprint:
            pixels = self.pixels.to(weights.device, weights.dtype)
            require_memory(
                f"a fit to {len(pixels)} images",
                needed_gib=run_gib(weights, len(pixels)),
                memory_gib=self._config.memory_gib,
            )
            self._last = fit_fill(weights, circuit, pixels, self.means, ridge=self._config.ridge)
        return self._last.fill, self._last.statistics
