"""Make fills from calibration images: means, another image's values, linear predictions.

A linear fill predicts cut heads and neurons from those that are kept beside them. For the heads
(then the neurons) of a layer and token kind, a_cut[t] := R a_kept[t] + c[t] with
c[t] = mean_cut[t] - R mean_kept[t], and R by ridge regression on activations centred per token. All
statistics come from the model as cut so far: earlier layers are filled before later ones are
fitted. With R = 0 it is the mean. Last, the classifier is fitted to the full model's logits, by
ridge regression around its own weights: that mends, for nothing, what all cuts together do to the
logits, such as a shift towards groups of many classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import SiteKey
from vitcut.masked.fill import Fill, zero_fill
from vitcut.masked.masking import PartMask, circuit_stream, full_run, walk
from vitcut.model.forward import forward
from vitcut.model.weights import ViTWeights
from vitcut.names import Ablation
from vitcut.progress import track
from vitcut.settings import require_memory
from vitcut.shapes import Bool, Float, Tensor

_BATCH = 32
"""Images per forward pass of a linear fit."""
_MEANS_BATCH = 8
"""Images per forward pass where means are taken: every source of each is held."""

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""What cross-validation chooses from, as fractions of the mean variance."""

_HEAD_RIDGES = (1e-2, 1e-1, 1.0, 10.0)
"""The same for the classifier, which is fitted to fewer samples: one per image."""

_ROUNDING = 1e-10
"""Variance, as a fraction of the mean square, that may come from the precision of a pass."""

_LEAST_TO_VALIDATE = 4
"""Images: two in each half, since one alone has no variance around its own mean."""

_SAMPLES_PER_FEATURE = 100
"""Tokens times images that a covariance is taken over; more would hardly change it."""


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """The activations of a site (the heads or neurons of a layer and token kind), as float64."""

    means: Float[Tensor, "tokens features"]
    covariance: Float[Tensor, "features features"]
    """Around the mean of each token, over images and tokens, with the ridge on its diagonal."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fill, and the statistics that it was fitted to."""

    fill: Fill
    statistics: Mapping[SiteKey, SiteStatistics] | None = None
    """Of every site; None unless the fill is linear."""


class Fitter:
    """The fills of a model's circuits under mean, zero or linear ablation.

    Means are computed once for all circuits, and the last linear fit is kept: asking again for the
    same circuit costs nothing.
    """

    def __init__(
        self,
        weights: ViTWeights,
        pixels: Callable[[], Float[Tensor, "images channels y x"]],
        *,
        ridge: float | None,
        memory_gib: float,
    ) -> None:
        """Nothing is read or computed until a fill needs it.

        Args:
            weights: The model.
            pixels: Returns the normalised calibration images; called for every fit, so that they
                take no memory in between.
            ridge: See ``fit_fill``.
            memory_gib: Most memory that the process may have during a linear fit, in GiB.
        """
        self._weights = weights
        self._read_pixels = pixels
        self._ridge = ridge
        self._memory_gib = memory_gib
        self._last: Fit | None = None
        self._logits: Tensor | None = None
        """The uncut model's on the calibration images, the same for every fit."""

    @cached_property
    def means(self) -> Fill:
        """The means of the uncut model, summed in float64."""
        weights, pixels = self._weights, self._read_pixels()
        require_memory(
            f"means over {len(pixels)} images",
            needed_gib=_trace_gib(weights, min(_MEANS_BATCH, len(pixels))),
            memory_gib=self._memory_gib,
        )
        batches = pixels.split(_MEANS_BATCH)
        tracked = track(batches, "averaging", len(batches), unit="batches")
        return mean_fill(weights, (x.to(weights.device, weights.dtype) for x in tracked))

    def fit(self, circuit: Circuit) -> Fit:
        """The fill of a circuit under its ablation.

        Raises:
            CircuitError: The circuit is under ``resample`` ablation, or there are too few images.
            ConfigError: A linear fit would not fit into the allowed memory.
        """
        weights = self._weights.at(circuit.positions)
        if circuit.ablation == "zero":
            return Fit(fill=zero_fill(weights))
        if circuit.ablation == "mean":
            return Fit(fill=self.means.on(weights))
        if self._last is None or self._last.fill.circuit != circuit.fingerprint:
            self._last = None  # Frees its statistics before the next ones are taken.
            pixels = self._read_pixels()
            require_memory(
                f"a fit to {len(pixels)} images",
                needed_gib=fit_gib(weights, circuit, len(pixels)),
                memory_gib=self._memory_gib,
            )
            means = self.means if circuit.read_by_all is None else None
            if self._logits is None:
                batches = pixels.split(_BATCH)
                tracked = track(batches, "running the whole model", len(batches), unit="batches")
                self._logits = _full_logits(self._weights, tracked)
            self._last = fit_fill(
                self._weights, circuit, pixels, means, logits=self._logits, ridge=self._ridge
            )
        return self._last

    def take(self, circuit: Circuit) -> Fit:
        """The same, not kept: whoever asks may free the statistics."""
        found = self.fit(circuit)
        self._last = None
        return found


def _trace_gib(weights: ViTWeights, images: int) -> float:
    """Memory that a ``Trace`` of this many images takes, in GiB."""
    blocks, width = len(weights.blocks), weights.width
    attended = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
    # Every source, the inputs of attention, MLP and classifier, z of the heads, hidden units.
    per_token = (len(weights.graph.sources) + 2 * blocks + 1) * width
    per_token += blocks * (attended + weights.num_neurons)
    size = torch.finfo(weights.dtype).bits / 8
    return images * weights.num_tokens * per_token * size / 2**30


def fit_gib(weights: ViTWeights, circuit: Circuit, images: int) -> float:
    """Memory that a linear fit takes beside the images, in GiB."""
    width, hidden = weights.width, weights.num_neurons
    attended = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
    # Between two steps of the pass: the stream, its sum with the biases, what is being fitted.
    # Where edges are cut, the stream is every source, and the changes of all of them.
    streams = 2 if circuit.read_by_all is not None else 3 * len(weights.graph.sources)
    held = images * weights.num_tokens * (streams * width + attended + hidden)
    squares = (attended**2 + hidden**2) * circuit.graph.num_kinds * len(weights.blocks)
    maps = (attended + hidden) * width * circuit.graph.num_kinds * len(weights.blocks)
    size = torch.finfo(weights.dtype).bits / 8
    return ((held + maps) * size + squares * 8) / 2**30


@torch.no_grad()
def mean_fill(
    weights: ViTWeights, batches: Iterable[Float[Tensor, "_images channels y x"]]
) -> Fill:
    """Average what each source writes, and each neuron is, at each token over images.

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
        sources = [a + b.double().sum(0) for a, b in zip(sources, run.sources, strict=True)]
        neurons = [a + b.double().sum(0) for a, b in zip(neurons, run.neurons, strict=True)]
        count += len(pixels)
    if count == 0:
        raise CircuitError("mean ablation needs at least 1 calibration image, got 0")
    means = Fill(sources=torch.stack(sources) / count, neurons=torch.stack(neurons) / count)
    return means.like(weights.patch_weight)


@torch.no_grad()
def resample_fill(
    weights: ViTWeights, corrupted: Float[Tensor, "images channels y x"], *, neurons: bool = False
) -> Fill:
    """Take the values of corrupted images, one per image.

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
    """Make the fill of an ablation that is the same for all images and circuits.

    Raises:
        CircuitError: There is none: ``resample`` differs by image, ``linear`` by circuit.
    """
    if ablation == "zero":
        return zero_fill(weights)
    if ablation == "mean":
        return mean_fill(weights, batches)
    raise CircuitError(
        f"no single fill serves every circuit under {ablation!r} ablation: choose mean or zero, or "
        "fit a linear fill to the circuit"
    )


@torch.no_grad()
def fit_fill(
    weights: ViTWeights,
    circuit: Circuit,
    pixels: Float[Tensor, "images channels y x"],
    means: Fill | None = None,
    *,
    logits: Float[Tensor, "images classes"] | None = None,
    ridge: float | None = None,
) -> Fit:
    """Fit the linear fill of a circuit, in one pass over the calibration images.

    Args:
        weights: The model, in the precision of the pass; the regressions are in float64.
        circuit: What is kept, under ``linear`` ablation.
        pixels: Normalised calibration images.
        means: The full model's means: what an edge carries that is cut while its source lives. A
            circuit that cuts whole sources does without.
        logits: The full model's logits on these images; computed if None.
        ridge: Added to the covariance's diagonal, as a fraction of its mean; chosen for each site
            and for the classifier by two-fold cross-validation if None.

    Returns:
        The fill, bound to the circuit and in the precision of the weights, with its statistics.

    Raises:
        CircuitError: The circuit is not under ``linear`` ablation, there are too few images, or
            means are needed and not given.
    """
    if circuit.ablation != "linear":
        raise CircuitError(
            f"a linear fill is fitted to a circuit under linear ablation, got {circuit.ablation}"
        )
    if len(pixels) < 2:
        raise CircuitError(f"a linear fill needs at least 2 calibration images, got {len(pixels)}")
    if means is None and circuit.read_by_all is None:
        raise CircuitError("the circuit cuts single edges: give the means of the full model")
    batches = pixels.split(_BATCH)
    if logits is None:
        logits = _full_logits(weights, batches)
    weights = weights.at(circuit.positions)
    means = None if means is None else means.on(weights)
    mask = _FittingMask(weights, circuit, means, logits, ridge)
    # The passes of all batches walk in step: each site is fitted to all images, then masked.
    walks = [
        walk(
            weights,
            batch.to(weights.device, weights.dtype),
            circuit_stream(weights, circuit, mask.tables),
            mask,
        )
        for batch in batches
    ]
    total = 2 * len(weights.blocks) + 3
    for steps in track(zip(*walks, strict=True), "fitting", total, unit="sites"):
        mask.fit(steps[0].parts, steps[0].layer, [step.values for step in steps])
    return Fit(fill=mask.fill, statistics=mask.statistics)


@torch.no_grad()
def _full_logits(
    weights: ViTWeights, batches: Iterable[Float[Tensor, "_images channels y x"]]
) -> Float[Tensor, "images classes"]:
    like = weights.patch_weight
    return torch.cat([forward(weights, x.to(like.device, like.dtype)) for x in batches])


class _FittingMask(PartMask):
    """A mask whose fill is fitted site by site, just before the passes are masked there.

    The passes look at ``tables``, but only at the rows of sources that were written: those are
    final by then.
    """

    def __init__(
        self,
        weights: ViTWeights,
        circuit: Circuit,
        means: Fill | None,
        logits: Float[Tensor, "images classes"],
        ridge: float | None,
    ) -> None:
        like, kinds = weights.patch_weight, circuit.graph.num_kinds
        blocks, hidden, width = len(weights.blocks), weights.num_neurons, weights.width
        heads, head_dim = weights.blocks[0].attn.q_weight.shape[:2]
        if means is None:
            shape = len(weights.graph.sources), weights.num_tokens, width
            self.tables = like.new_zeros(shape)
        else:
            self.tables = means.sources.to(like.device, like.dtype, copy=True)
        self.values = like.new_zeros(blocks, weights.num_tokens, hidden)
        self.head_maps = like.new_zeros(blocks, kinds, heads, width, head_dim)
        self.neuron_maps = like.new_zeros(blocks, kinds, width, hidden)
        self.statistics: dict[SiteKey, SiteStatistics] = {}
        self.head_weight, self.head_bias = weights.head_weight.clone(), weights.head_bias.clone()
        self.weights, self.logits, self.ridge = weights, logits, ridge
        self.live_heads, self.live_mlps = circuit.graph.by_block(circuit.live_sources)
        self.fill = Fill(
            sources=self.tables,
            neurons=self.values,
            head_maps=self.head_maps,
            neuron_maps=self.neuron_maps,
            head_weight=self.head_weight,
            head_bias=self.head_bias,
            circuit=circuit.fingerprint,
        )
        super().__init__(weights, circuit.graph, circuit.neurons, self.fill)

    def fit(self, parts: str, layer: int, values: Sequence[Tensor]) -> None:
        """Fit what a step of all passes is about: ``values`` has one tensor per batch."""
        if parts == "embed":
            images = sum(map(len, values))
            self.tables[0] = sum(value.double().sum(0) for value in values) / images
        elif parts == "heads":
            self._fit_heads(layer, values)
        elif parts == "neurons":
            self._fit_neurons(layer, values)
        elif parts == "features":
            self._fit_classifier(torch.cat(list(values)).double())

    def _fit_heads(
        self, layer: int, z: Sequence[Float[Tensor, "heads _images tokens head_dim"]]
    ) -> None:
        graph, head_dim = self.weights.graph, z[0].shape[3]
        out = self.weights.blocks[layer].attn.out_weight.double()
        heads = len(out)
        attention = slice(graph.head_source(layer, 0), graph.mlp_source(layer))
        for kind, span in enumerate(self.rows):
            flat = [batch[:, :, span].permute(1, 2, 0, 3).flatten(2) for batch in z]
            site = site_statistics(flat, self.ridge)
            self.statistics[layer, "heads", kind] = site
            alive = torch.from_numpy(self.live_heads[layer, :, kind].copy()).to(out.device)
            regression, constants = _predict(site, alive.repeat_interleave(head_dim))
            # The maps W R, [heads, width, head_dim].
            maps = (out.permute(1, 0, 2).flatten(1) @ regression).unflatten(1, (heads, head_dim))
            self.head_maps[layer, kind] = maps = maps.transpose(0, 1)
            # A map is part of what its head writes, so a cut edge of a live head, which carries
            # the full model's mean, carries the map's mean too. A dead head adds its W c to every
            # target.
            means, constants = (x.unflatten(1, (heads, head_dim)) for x in (site.means, constants))
            carried = self.tables[attention, span] + torch.einsum("hwd,thd->htw", maps, means)
            constant = torch.einsum("hwd,thd->htw", out, constants)
            self.tables[attention, span] = torch.where(alive[:, None, None], carried, constant).to(
                self.tables
            )

    def _fit_neurons(
        self, layer: int, hidden: Sequence[Float[Tensor, "_images tokens neurons"]]
    ) -> None:
        out = self.weights.blocks[layer].mlp.out_weight.double()
        for kind, span in enumerate(self.rows):
            site = site_statistics([batch[:, span] for batch in hidden], self.ridge)
            self.statistics[layer, "neurons", kind] = site
            kept = torch.ones(out.shape[1], dtype=torch.bool, device=out.device)
            if self.kept is not None:
                kept = self.kept[layer, span][0]  # The same for all tokens of a kind.
            regression, constants = _predict(site, kept)
            self.neuron_maps[layer, kind], self.values[layer, span] = out @ regression, constants
            # A dead MLP is cut whole: it leaves the mean of the model as cut so far.
            if not self.live_mlps[layer, kind]:
                mlp = self.weights.graph.mlp_source(layer)
                self.tables[mlp, span] = (site.means @ out.T).to(self.tables.dtype)

    def _fit_classifier(self, features: Float[Tensor, "images features"]) -> None:
        """W := W + D' and b := b + mean(E) - D' mean(F), with D the ridge regression of E on F.

        E is what the model's own classifier misses of the full model's logits.
        """
        weight, bias = self.weights.head_weight.double(), self.weights.head_bias.double()
        missed = self.logits.double() - (features @ weight.T + bias)
        ridge, halves = self.ridge, [slice(0, None, 2), slice(1, None, 2)]
        if ridge is None:
            ridge = _HEAD_RIDGES[-1]
            if len(features) >= _LEAST_TO_VALIDATE:
                errors = [
                    sum(
                        float((missed[other] - found.predict(features[other])).square().sum())
                        for own, other in (halves, halves[::-1])
                        for found in [_Ridge.fit(features[own], missed[own], choice)]
                    )
                    for choice in _HEAD_RIDGES
                ]
                ridge = _HEAD_RIDGES[int(np.argmin(errors))]
        found = _Ridge.fit(features, missed, ridge)
        self.head_weight += found.slope.T.to(self.head_weight)
        self.head_bias += found.intercept.to(self.head_bias)


class _Ridge(NamedTuple):
    """A regression of several values on features, penalised but for its intercept."""

    slope: Float[Tensor, "features values"]
    intercept: Float[Tensor, "values"]

    @classmethod
    def fit(
        cls,
        features: Float[Tensor, "samples features"],
        values: Float[Tensor, "samples values"],
        ridge: float,
    ) -> "_Ridge":
        centre, level = features.mean(0), values.mean(0)
        apart = features - centre
        covariance = add_ridge(apart.T @ apart / len(apart), ridge)
        # Features that differ by rounding alone say nothing.
        covariance += _ROUNDING * features.square().mean() * torch.eye(len(covariance)).to(features)
        slope = torch.linalg.solve(covariance, apart.T @ (values - level) / len(apart))
        return cls(slope, level - centre @ slope)

    def predict(
        self, features: Float[Tensor, "samples features"]
    ) -> Float[Tensor, "samples values"]:
        return features @ self.slope + self.intercept


def _predict(
    site: SiteStatistics, kept: Bool[Tensor, "features"]
) -> tuple[Float[Tensor, "features features"], Float[Tensor, "tokens features"]]:
    """The regression R of a site's cut features, and c[t] = mean_cut[t] - R mean_kept[t]."""
    regression = regress(site.covariance, kept)
    return regression, site.means * ~kept - site.means @ regression.T


def regress(
    covariance: Float[Tensor, "features features"], kept: Bool[Tensor, "features"]
) -> Float[Tensor, "features features"]:
    """The regression of cut features on kept ones: rows of cut, columns of kept, else zero."""
    regression = torch.zeros_like(covariance)
    if bool(kept.any()) and not bool(kept.all()):
        within, across = covariance[kept][:, kept], covariance[~kept][:, kept]
        # R = C_cut,kept C_kept,kept^-1, from a solve because C is symmetric.
        regression[~kept[:, None] & kept] = torch.linalg.solve(within, across.T).T.flatten()
    return regression


def site_statistics(
    features: Sequence[Float[Tensor, "_images tokens features"]], ridge: float | None
) -> SiteStatistics:
    """Means and covariance of a site's activations.

    Args:
        features: Activations, in batches of images.
        ridge: As a fraction of the mean variance. None chooses the ridge with which each half of
            the images best predicts every feature of the other half from all other features; with
            too few images to halve, the largest choice.
    """
    images = sum(map(len, features))
    tokens, size = features[0].shape[1:]
    # Within a batch sums and products are in the precision of the pass, across batches in float64.
    means = torch.stack([batch.sum(0).double() for batch in features]).sum(0) / images
    # Every step-th image is enough for the covariance where there are many tokens.
    step = max(
        1, min(images * tokens // (_SAMPLES_PER_FEATURE * size), images // _LEAST_TO_VALIDATE)
    )
    # Second moments by halves: together the covariance, apart what cross-validation compares.
    moments, sums, counts = means.new_zeros(2, size, size), means.new_zeros(2, *means.shape), [0, 0]
    first = 0
    for batch in features:
        chosen = torch.arange(-first % step, len(batch), step, device=batch.device)
        parity = (first + chosen) // step % 2
        for half in (0, 1):
            some = batch[chosen[parity == half]] - means.to(batch.dtype)
            flat = some.flatten(0, 1)
            moments[half] += flat.T @ flat
            sums[half] += some.sum(0)
            counts[half] += len(some)
        first += len(batch)
    covariance = moments.sum(0) / (sum(counts) * tokens)
    if ridge is None:
        ridge = _RIDGES[-1]
        if sum(counts) >= _LEAST_TO_VALIDATE:
            # Each half is centred on its own means, so that it knows nothing of the other one.
            own: list[Tensor] = []
            for moment, total, count in zip(moments, sums, counts, strict=True):
                off = total / count
                moved = (moment / count - off.T @ off) / tokens
                own.append(moved.to(features[0].dtype))
            errors = [
                sum(_error(add_ridge(one, choice), other) for one, other in (own, own[::-1]))
                for choice in _RIDGES
            ]
            ridge = _RIDGES[int(np.argmin(errors))]
    return SiteStatistics(means=means, covariance=add_ridge(covariance, ridge))


def add_ridge(
    covariance: Float[Tensor, "features features"], ridge: float
) -> Float[Tensor, "features features"]:
    """Add a fraction of the mean variance to the diagonal of a covariance."""
    # Where nothing varies, the floor is just large enough for the inverse to be finite.
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny ** 0.5)
    return covariance + ridge * scale * torch.eye(len(covariance)).to(covariance)


def _error(
    fitted: Float[Tensor, "features features"], unseen: Float[Tensor, "features features"]
) -> float:
    """The summed variance, under another covariance, of what each feature's others miss of it."""
    # Row i of the scaled precision matrix is the residual of feature i regressed on all others.
    precision = torch.linalg.inv(fitted)
    residual = precision / precision.diagonal()[:, None]
    return float(((residual @ unseen) * residual).sum())
