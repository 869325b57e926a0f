"""Linear fills: cut heads and neurons are predicted from those that are kept beside them.

For the heads (then the neurons) of a layer and token kind, a_cut[t] := R a_kept[t] + c[t] with
c[t] = mean_cut[t] - R mean_kept[t], and R by ridge regression on activations centred per token. All
statistics come from the model that is cut already: earlier layers are filled before later ones are
fitted. R = 0 is the mean.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import SiteKey
from vitcut.masked.fill import Fill
from vitcut.masked.masking import PartMask, masked_run
from vitcut.model.weights import ViTWeights
from vitcut.shapes import Bool, Float, Tensor

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""What cross-validation chooses from, as fractions of the mean variance."""

_LEAST_TO_VALIDATE = 4
"""Images: two in each half, since one alone has no variance around its own mean."""

_SAMPLES_PER_FEATURE = 100
"""Tokens times images that a covariance is taken over; more would not change it."""


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """The activations of a site, the heads or neurons of a layer and token kind; float64."""

    means: Float[Tensor, "tokens features"]
    covariance: Float[Tensor, "features features"]
    """Around the means of each token, over images and tokens, with the ridge on its diagonal."""


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """A linear fill, and the statistics that it was fitted to."""

    fill: Fill
    """Bound to the circuit, in the precision of the weights."""
    sites: dict[SiteKey, SiteStatistics]


@torch.no_grad()
def fit_fill(
    weights: ViTWeights,
    circuit: Circuit,
    pixels: Float[Tensor, "images channels y x"],
    means: Fill,
    *,
    ridge: float | None = None,
) -> LinearFit:
    """Fit the linear fill of a circuit, in one pass over all calibration images together.

    Args:
        weights: The model, in the precision of the pass; the regressions are in float64.
        circuit: What is kept, under ``linear`` ablation.
        pixels: Normalised calibration images.
        means: The full model's means: what an edge carries that is cut while its source lives.
        ridge: Added to the covariance's diagonal, as a fraction of its mean; chosen for each site
            by two-fold cross-validation if None.

    Raises:
        CircuitError: The circuit is not under ``linear`` ablation, or there are too few images.
    """
    if circuit.ablation != "linear":
        raise CircuitError(
            f"a linear fill is fitted to a circuit under linear ablation, got {circuit.ablation}"
        )
    if len(pixels) < 2:
        raise CircuitError(f"a linear fill needs at least 2 calibration images, got {len(pixels)}")
    fitter = _Fitter(weights, circuit, means, ridge)
    masked_run(weights, pixels, circuit, fitter.fill, mask=fitter)
    return LinearFit(fill=replace(fitter.fill, circuit=circuit.fingerprint), sites=fitter.sites)


class _Fitter(PartMask):
    """Sees the heads and neurons of each block as they are computed, and fits their fill first."""

    def __init__(
        self, weights: ViTWeights, circuit: Circuit, means: Fill, ridge: float | None
    ) -> None:
        graph, like = circuit.graph, weights.patch_weight
        blocks, kinds = graph.num_layers, graph.num_kinds
        head_dim = weights.blocks[0].attn.q_weight.shape[1]
        self._sources = means.sources.to(like.device, like.dtype, copy=True)
        self._neurons = like.new_zeros(blocks, weights.num_tokens, weights.num_neurons)
        self._head_maps = like.new_zeros(blocks, kinds, graph.num_heads, weights.width, head_dim)
        self._neuron_maps = like.new_zeros(blocks, kinds, weights.width, weights.num_neurons)
        self.fill = Fill(
            sources=self._sources,
            neurons=self._neurons,
            head_maps=self._head_maps,
            neuron_maps=self._neuron_maps,
        )
        self.sites: dict[SiteKey, SiteStatistics] = {}
        super().__init__(weights, graph, circuit.neurons, self.fill)
        self._weights = weights
        self._circuit = circuit
        self._ridge = ridge
        live = graph.by_block(circuit.live_sources)
        self._live_heads, self._live_mlps = (torch.from_numpy(part.copy()) for part in live)

    def heads(self, layer: int, z: Tensor) -> Tensor | float:
        """Fit the heads of a block, then give what kept heads write for cut ones."""
        out = self._weights.blocks[layer].attn.out_weight.double()
        first, (heads, _, _, head_dim) = self._weights.graph.head_source(layer, 0), z.shape
        for kind, rows in enumerate(self.rows):
            alive = self._live_heads[layer, :, kind]
            features = z[:, :, rows].permute(1, 2, 0, 3).flatten(2)
            kept = alive.repeat_interleave(head_dim).to(z.device)
            site = site_statistics(features, self._ridge)
            self.sites[layer, "heads", kind] = site
            means, regression = site.means, regress(site.covariance, kept)
            maps = out.permute(1, 0, 2).flatten(1) @ regression
            by_head = maps.unflatten(1, (heads, head_dim)).transpose(0, 1)
            self._head_maps[layer, kind] = by_head
            constants = (means * ~kept - means @ regression.T).unflatten(1, (heads, head_dim))
            # A map is part of what its head writes: where that edge is cut, so is the map.
            carried = torch.einsum("hwd,thd->htw", by_head, means.unflatten(1, (heads, head_dim)))
            written = torch.einsum("hwd,thd->htw", out, constants)
            for head in range(heads):
                table = self._sources[first + head, rows]
                table.copy_(table + carried[head] if alive[head] else written[head])
        return super().heads(layer, z)

    def neurons(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | float]:
        """Fit the neurons of a block, then replace the cut ones."""
        mlp, graph = self._weights.blocks[layer].mlp, self._weights.graph
        out = mlp.out_weight.double()
        for kind, rows in enumerate(self.rows):
            kept = torch.ones(hidden.shape[2], dtype=torch.bool, device=hidden.device)
            if self._circuit.neurons is not None:
                kept = torch.from_numpy(self._circuit.neurons[layer, kind].copy()).to(kept.device)
            site = site_statistics(hidden[:, rows], self._ridge)
            self.sites[layer, "neurons", kind] = site
            means, regression = site.means, regress(site.covariance, kept)
            self._neuron_maps[layer, kind] = out @ regression
            self._neurons[layer, rows] = (means * ~kept - means @ regression.T).to(hidden.dtype)
            if not self._live_mlps[layer, kind]:
                self._sources[graph.mlp_source(layer), rows] = (means @ out.T).to(hidden.dtype)
        return super().neurons(layer, hidden)


def regress(
    covariance: Float[Tensor, "features features"], kept: Bool[Tensor, "features"]
) -> Float[Tensor, "features features"]:
    """The regression of cut features on kept ones: rows of cut, columns of kept, else zero."""
    regression = torch.zeros_like(covariance)
    if bool(kept.any()) and not bool(kept.all()):
        within, across = covariance[kept][:, kept], covariance[~kept][:, kept]
        regression[~kept[:, None] & kept] = torch.linalg.solve(within, across.T).T.flatten()
    return regression


def site_statistics(
    features: Float[Tensor, "images tokens features"], ridge: float | None
) -> SiteStatistics:
    """Means and covariance of a site's activations.

    Args:
        features: Activations.
        ridge: As a fraction of the mean variance; None chooses the one with which either half of
            the images predicts every feature of the other half best from all others.
            With fewer images than can be halved it is the largest choice.
    """
    means = features.double().mean(0)
    images, tokens, size = features.shape
    step = min(images * tokens // (_SAMPLES_PER_FEATURE * size), images // _LEAST_TO_VALIDATE)
    centred = features[:: max(1, step)].double() - means
    halves = centred[::2], centred[1::2]
    moments = [half.flatten(0, 1).T @ half.flatten(0, 1) for half in halves]
    covariance = (moments[0] + moments[1]) / (centred.shape[0] * tokens)
    if ridge is None:
        ridge = _RIDGES[-1]
        if len(centred) >= _LEAST_TO_VALIDATE:
            ridge = _validated_ridge(
                [_around_own_mean(*pair) for pair in zip(halves, moments, strict=True)]
            )
    return SiteStatistics(means=means, covariance=add_ridge(covariance, ridge))


def _around_own_mean(half: Tensor, moment: Tensor) -> Tensor:
    """The covariance of half of the images, which knows nothing of the other half."""
    off = half.mean(0)
    return (moment / len(half) - off.T @ off) / half.shape[1]


def _validated_ridge(halves: list[Tensor]) -> float:
    errors = [
        sum(_error(add_ridge(own, ridge), other) for own, other in (halves, halves[::-1]))
        for ridge in _RIDGES
    ]
    return _RIDGES[int(np.argmin(errors))]


def add_ridge(
    covariance: Float[Tensor, "features features"], ridge: float
) -> Float[Tensor, "features features"]:
    """A covariance with a fraction of its mean variance added to the diagonal."""
    # A site where nothing varies: a floor, large enough for its inverse to be finite.
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny ** 0.5)
    return covariance + ridge * scale * torch.eye(len(covariance)).to(covariance)


def _error(fitted: Tensor, unseen: Tensor) -> float:
    """The summed variance, under another covariance, of what each feature's others miss of it."""
    precision = torch.linalg.inv(fitted)
    residual = precision / precision.diagonal()[:, None]
    return float(((residual @ unseen) * residual).sum())
