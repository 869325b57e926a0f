"""Sites: the heads, or the neurons, of a layer and token kind, and what cutting some would do.

To second order on an already cut model q of the full model p, cutting the parts of a set A costs

    sum_u b_u + || sum_u r_u ||^2,  r_u[(x,y)] = sqrt(q(y|x) / 2N) s_u(x,y),
    b_u = - mean_x sum_y p(y|x) s_u(x,y),  s_u(x,y) = < grad log q(y|x), d_u(x) >

so a part's response s_u, one number per image and coarse class, is all that is needed of it. Under
``mean`` or ``zero`` ablation d_u is the fill's value minus the part's; with a linear fill it is
what the parts that are still kept cannot predict of it. Cutting parts then changes the others:
their precision matrix is downdated and the gradients take over what the cut parts' fill passes on
(optimal brain surgeon). Which parts to cut is left to ``greedy.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.discovery.fisher import trace_gradients
from vitcut.errors import CircuitError
from vitcut.graph import Graph, SiteKey
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import SiteStatistics
from vitcut.masked.masking import full_run
from vitcut.metrics import coarse_log_probs
from vitcut.model.weights import ViTWeights
from vitcut.progress import track
from vitcut.shapes import Bool, Float, Int, Tensor

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
    """The heads or neurons of one layer and token kind, as far as they are not cut."""

    def __init__(
        self,
        place: SiteKey,
        alive: Bool[Tensor, "parts"],
        activations: Float[Tensor, "images tokens features"],
        gradients: Float[Tensor, "classes images tokens features"],
        replaced: Float[Tensor, "tokens features"],
        covariance: Float[Tensor, "features features"] | None = None,
    ) -> None:
        """Take over the activations and gradients of all parts, cut ones included.

        Args:
            place: Where the site is.
            alive: True for the parts that are not cut yet.
            activations: z of the heads, or hidden units; centred here, in place.
            gradients: Of log q(y|x) by those, changed as parts are cut.
            replaced: What a cut part becomes where nothing predicts it.
            covariance: Positive definite, to predict parts from others; None predicts nothing.
        """
        self.layer, self.parts, self.kind = place
        self.alive = alive.to(activations.device, copy=True)
        self._size = activations.shape[2] // len(alive)
        self._gradients = gradients
        self._centred = activations.sub_(replaced.to(activations.dtype))
        self._precision = None
        if covariance is not None:
            self._precision = _precision(covariance, self._features(self.alive))
        self._pending = torch.zeros_like(self.alive)
        self._alone: Tensor | None = None
        """The response to each feature, cut ones included, where nothing predicts it."""

    def responses(self) -> Float[Tensor, "parts responses"]:
        """The response to cutting each part alone; zero for those that are cut."""
        found = self._along_gradients(self._unpredicted())
        found = found.unflatten(1, (-1, self._size)).sum(2)
        return found.T.contiguous() * self.alive[:, None]

    def whole_response(self) -> Float[Tensor, "responses"]:
        """The response to cutting all that is left, and what was cut since the last refresh.

        Nothing is there to predict from.
        """
        if self._alone is None:
            self._alone = self._along_gradients(-self._centred)
        return self._alone @ self._features(self.alive | self._pending).to(self._alone)

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
        self._alone = None
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
        alive: Heads [blocks, heads, kinds] and neurons [blocks, kinds, neurons] not cut yet.
        statistics: Of each site under a linear fill, to predict parts from others; None where cut
            parts get the values of the fill.
    """
    graph = masked[0].graph
    heads, neurons = (torch.from_numpy(item.copy()) for item in alive)
    left: dict[SiteKey, Tensor] = {}
    for layer, kind in product(range(graph.num_layers), range(graph.num_kinds)):
        left[layer, "heads", kind] = heads[layer, :, kind]
        left[layer, "neurons", kind] = neurons[layer, kind]
    left = {place: parts for place, parts in left.items() if bool(parts.any())}
    store = _Store(weights, graph, list(left), (int(group_of_class.max()) + 1, len(pixels)))
    starts = range(0, len(pixels), _CHUNK)
    for start in track(starts, "gradients", len(starts), unit="batches"):
        chunk = pixels[start : start + _CHUNK].to(weights.device, weights.dtype)
        store.add(start, chunk, group_of_class, masked)
    sites: list[Site] = []
    for place, parts in left.items():
        if statistics is None:
            predicted = (_fill_values(weights, graph, masked[1], place), None)
        else:
            predicted = (statistics[place].means, statistics[place].covariance)
        sites.append(Site(place, parts, *store.take(place), *predicted))
    return sites, store.objective()


def _fill_values(
    weights: ViTWeights, graph: Graph, fill: Fill, place: SiteKey
) -> Float[Tensor, "tokens features"]:
    """What a fill without maps makes of the parts of a site."""
    layer, parts, kind = place
    rows = weights.rows_of(graph)[kind]
    if parts == "neurons":
        if fill.neurons is None:
            raise CircuitError("neurons are to be cut, the fill has no values for them")
        return fill.neurons[layer, rows]
    first = weights.graph.head_source(layer, 0)
    tables = fill.sources[first : first + weights.num_heads, rows].double()
    # The fill holds what heads write; any z that writes it has the same effect.
    inverse = torch.linalg.pinv(weights.blocks[layer].attn.out_weight.double())
    return torch.einsum("hdw,htw->thd", inverse, tables).flatten(1)


class _Store:
    """Activations and gradients of some sites, of all images."""

    def __init__(
        self, weights: ViTWeights, graph: Graph, places: Sequence[SiteKey], size: tuple[int, int]
    ) -> None:
        classes, images = size
        self._weights = weights
        self._rows = weights.rows_of(graph)
        like, tokens = weights.patch_weight, range(weights.num_tokens)
        width = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
        self._values: dict[SiteKey, Tensor] = {}
        self._gradients: dict[SiteKey, Tensor] = {}
        for place in places:
            features = width if place[1] == "heads" else weights.num_neurons
            shape = (images, len(tokens[self._rows[place[2]]]), features)
            self._values[place] = like.new_empty(shape)
            self._gradients[place] = like.new_empty(classes, *shape)
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
        for place, values in self._values.items():
            values[images] = self._of(place, run.heads, run.neurons).detach()
        for y, found in enumerate(passes):
            self._log_q[y, images] = found.log_prob
            for place, gradients in self._gradients.items():
                gradients[y, images] = self._of(place, found.by[:blocks], found.by[blocks:])

    def _of(self, place: SiteKey, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Tensor:
        layer, parts, kind = place
        values = _flat(heads[layer]) if parts == "heads" else neurons[layer]
        return values[:, self._rows[kind]]

    def take(self, place: SiteKey) -> tuple[Tensor, Tensor]:
        """Hand over the activations and gradients of a site."""
        return self._values.pop(place), self._gradients.pop(place)

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
