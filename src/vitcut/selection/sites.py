"""Sites: the heads, or the neurons, of a layer and token group, and what cutting some would do.

To second order on an already cut model q of the full model p, cutting the parts of a set A costs

    sum_u b_u + || sum_u r_u ||^2,  r_u[(x,y)] = sqrt(q(y|x) / 2N) s_u(x,y),
    b_u = - mean_x sum_y p(y|x) s_u(x,y),  s_u(x,y) = < grad log q(y|x), d_u(x) >

so a part's response s_u, one number per image and coarse class, is all that is needed of it. With a
linear fill d_u is what the parts that are still kept cannot predict of it. Cutting parts then
changes the others: their precision matrix is downdated and the gradients take over what the cut
parts' fill passes on (optimal brain surgeon). Which parts to cut is left to ``greedy.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.discovery.fisher import trace_gradients
from vitcut.intervention.fill import Fill
from vitcut.intervention.least_squares import SiteStatistics
from vitcut.intervention.masking import full_run
from vitcut.metrics import coarse_log_probs
from vitcut.names import SiteKey
from vitcut.progress import track
from vitcut.shapes import Bool, Float, Int, Tensor
from vitcut.vits.weights import ViTWeights

_CHUNK = 16
"""Images per forward pass with its backward passes."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Turns responses into nats."""

    curvature: Float[Tensor, "responses"]
    """q / 2N of each image and class."""
    slope: Float[Tensor, "responses"]
    """- p / N of each image and class."""

    def of(self, response: Float[Tensor, "*parts responses"]) -> Float[Tensor, "*parts"]:
        """The rise of the KL that a response stands for, in nats."""
        return response @ self.slope + response.square() @ self.curvature

    def interaction(
        self, response: Float[Tensor, "*parts responses"], chosen: Float[Tensor, "responses"]
    ) -> Float[Tensor, "*parts"]:
        """What is added to two responses' own rises when both are there."""
        return 2 * (response @ (self.curvature * chosen))


class Site:
    """The heads or neurons of one layer and token group, as far as they are not cut."""

    def __init__(
        self,
        place: SiteKey,
        alive: Bool[Tensor, "parts"],
        activations: Float[Tensor, "images tokens features"],
        gradients: Float[Tensor, "classes images tokens features"],
        statistics: SiteStatistics | None,
    ) -> None:
        """Take over the activations and gradients of all parts, cut ones included.

        Args:
            place: Where the site is.
            alive: True for the parts that are not cut yet.
            activations: z of the heads, or hidden units; centred per token here, in place.
            gradients: Of log q(y|x) by those, changed as parts are cut.
            statistics: Of other images, to predict parts from others; None leaves them the mean.
        """
        self.layer, self.kind, self.group = place
        self.alive = alive.clone()
        self._size = activations.shape[2] // len(alive)
        self._gradients = gradients
        means = activations.mean(0) if statistics is None else statistics.means
        self._centred = activations.sub_(means.to(activations.dtype))
        self._precision = None
        if statistics is not None:
            self._precision = _precision(statistics.covariance, self._features(self.alive))
        self._pending = torch.zeros_like(alive)

    def responses(self) -> Float[Tensor, "parts responses"]:
        """The response to cutting each part alone; zero for those that are cut."""
        found = self._along_gradients(self._unpredicted())
        found = found.unflatten(1, (-1, self._size)).sum(2)
        return found.T.contiguous() * self.alive[:, None]

    def whole_response(self) -> Float[Tensor, "responses"]:
        """The response to cutting all that is left: nothing is there to predict from."""
        return self._along_gradients(-self._centred * self._features(self.alive)).sum(1)

    def cut(self, parts: Sequence[int]) -> None:
        """Mark parts as cut; the others know of it after ``refresh``."""
        self.alive[list(parts)] = False
        self._pending[list(parts)] = True

    @property
    def num_pending(self) -> int:
        """Parts that were cut since the last refresh."""
        return int(self._pending.sum())

    def refresh(self) -> Float[Tensor, "responses"]:
        """Let the others take over from the parts that were cut; returns those parts' response."""
        gone, kept = self._features(self._pending), self._features(self.alive)
        self._pending[:] = False
        if self._precision is None or not bool(kept.any()):
            return self._along_gradients(-self._centred * gone).sum(1)
        precision, low = self._precision, self._centred.dtype
        within = torch.linalg.inv(precision[gone][:, gone])
        across = precision[gone] * kept
        # Everything alive predicts the parts that go; what it cannot predict changes the stream.
        error = self._centred @ (precision[:, gone] @ within).to(low)
        lost = self._gradients[..., gone].clone()
        flat = self._gradients.view(-1, self._gradients.shape[-1])
        flat.addmm_(lost.flatten(0, 2), -(within @ across).to(low))
        alive = kept[:, None] & kept
        self._precision = (precision - across.T @ within @ across) * alive
        return torch.einsum("cntf,ntf->cn", lost, -error).flatten()

    def _unpredicted(self) -> Tensor:
        """Minus the residual of each part on all others that are alive."""
        if self._precision is None:
            return -self._centred
        size, low = self._size, self._centred.dtype
        precision = self._precision
        if size == 1:
            scale = precision.diagonal().clone()
            scale[scale > 0] = 1 / scale[scale > 0]
            return -(self._centred @ (precision * scale).to(low))
        blocks = precision.unflatten(0, (-1, size))
        scaled = torch.zeros_like(precision).unflatten(0, (-1, size))
        for part in torch.nonzero(self.alive).flatten().tolist():
            own = blocks[part][:, part * size : (part + 1) * size]
            scaled[part] = torch.linalg.solve(own, blocks[part])
        return -(self._centred @ scaled.flatten(0, 1).T.to(low))

    def _along_gradients(self, change: Tensor) -> Float[Tensor, "responses features"]:
        """Gradient times change, summed over tokens."""
        # A loop: one einsum over all classes is ten times slower.
        return torch.cat([(gradient * change).sum(1) for gradient in self._gradients])

    def _features(self, parts: Bool[Tensor, "parts"]) -> Bool[Tensor, "features"]:
        return parts.repeat_interleave(self._size)


def trace_sites(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    group_of_class: Int[Tensor, "classes"],
    masked: tuple[Circuit, Fill],
    *,
    alive: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    statistics: Mapping[SiteKey, SiteStatistics] | None,
) -> tuple[list[Site], Objective]:
    """All sites of a cut model that still have parts.

    Args:
        weights: The model, in the precision to compute with.
        pixels: Normalised images; their activations and gradients are held together.
        group_of_class: The group number of each class of the model.
        masked: The circuit so far, and its fill.
        alive: Heads [blocks, heads, groups] and neurons [blocks, groups, neurons] not cut yet.
        statistics: Of each site, to predict parts from others; None leaves them the mean.
    """
    store = _Store(weights, len(pixels), int(group_of_class.max()) + 1)
    starts = range(0, len(pixels), _CHUNK)
    for start in track(starts, "gradients", len(starts), unit="batches"):
        chunk = pixels[start : start + _CHUNK]
        store.add(start, chunk, group_of_class, masked)
    sites: list[Site] = []
    rows = weights.rows_of(masked[0].graph)
    heads, neurons = (torch.from_numpy(item.copy()) for item in alive)
    for layer, (group, span) in product(range(len(weights.blocks)), enumerate(rows)):
        for kind, left in (("heads", heads[layer, :, group]), ("neurons", neurons[layer, group])):
            if bool(left.any()):
                place = (layer, kind, group)
                known = None if statistics is None else statistics[place]
                sites.append(Site(place, left, *store.take(layer, kind, span), known))
    return sites, store.objective()


class _Store:
    """Activations and gradients of all images."""

    def __init__(self, weights: ViTWeights, images: int, classes: int) -> None:
        self._weights = weights
        like, tokens = weights.patch_weight, weights.num_tokens
        width = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
        self._values: dict[tuple[int, str], Tensor] = {}
        self._gradients: dict[tuple[int, str], Tensor] = {}
        sizes = (("heads", width), ("neurons", weights.num_neurons))
        for layer, (kind, size) in product(range(len(weights.blocks)), sizes):
            self._values[layer, kind] = like.new_empty(images, tokens, size)
            self._gradients[layer, kind] = like.new_empty(classes, images, tokens, size)
        self._log_p = like.new_empty(classes, images)
        self._log_q = like.new_empty(classes, images)

    def add(
        self, start: int, pixels: Tensor, group_of_class: Tensor, masked: tuple[Circuit, Fill]
    ) -> None:
        """Run some images."""
        images = slice(start, start + len(pixels))
        with torch.no_grad():
            full = full_run(self._weights, pixels).logits
        classes = len(self._log_p)
        self._log_p[:, images] = coarse_log_probs(full, group_of_class, classes).T
        run, passes = trace_gradients(
            self._weights,
            pixels,
            group_of_class,
            lambda run: [*run.heads, *run.neurons],
            masked=masked,
        )
        blocks = len(run.heads)
        for layer in range(blocks):
            self._values[layer, "heads"][images] = _flat(run.heads[layer].detach())
            self._values[layer, "neurons"][images] = run.neurons[layer].detach()
        for y, found in enumerate(passes):
            self._log_q[y, images] = found.log_prob
            for layer in range(blocks):
                self._gradients[layer, "heads"][y, images] = _flat(found.by[layer])
                self._gradients[layer, "neurons"][y, images] = found.by[blocks + layer]

    def take(self, layer: int, kind: str, rows: slice) -> tuple[Tensor, Tensor]:
        """The activations and gradients of a site, as its own."""
        values, gradients = self._values[layer, kind], self._gradients[layer, kind]
        return values[:, rows].clone(), gradients[:, :, rows].clone()

    def objective(self) -> Objective:
        """The weights of responses."""
        images = self._log_p.shape[1]
        curvature = self._log_q.exp().flatten() / (2 * images)
        return Objective(curvature=curvature, slope=-self._log_p.exp().flatten() / images)


def _precision(covariance: Tensor, kept: Tensor) -> Tensor:
    """The inverse covariance of what is kept, zero elsewhere."""
    found = torch.zeros_like(covariance)
    found[kept[:, None] & kept] = torch.linalg.inv(covariance[kept][:, kept]).flatten()
    return found


def _flat(z: Float[Tensor, "heads images tokens head_dim"]) -> Tensor:
    return z.permute(1, 2, 0, 3).flatten(2)
