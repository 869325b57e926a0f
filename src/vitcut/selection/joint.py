"""Joint scores: how much the KL rises when parts are cut together, to second order.

For a model with output q that was already cut from the full model with output p, cutting the parts
of a set A raises the KL by

    sum_{u in A} b_u + || sum_{u in A} r_u ||^2,    r_u[(x,y)] = sqrt(q(y|x) / 2N) s_u(x,y),
    b_u = - mean_x sum_y p(y|x) s_u(x,y),           s_u(x,y) = < grad log q(y|x), d_u(x) >

so all that is needed of a part u is its response s_u: one number for each of the N images and each
coarse class. Adding u to a set A costs b_u + ||r_u||^2 + 2 < sum_{v in A} r_v, r_u >, which takes
only the sum of what was chosen, not its members.

The change d_u is what cutting u does to its activation, the fill's value minus its own. Under
``mean`` and ``zero`` that value is fixed. Under ``linear`` it is predicted from the parts that are
still kept, so cutting a part changes d of the others at its site, the heads or the neurons of one
layer and token kind (optimal brain surgeon, Hassibi and Stork 1993).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.discovery.fisher import trace_gradients
from vitcut.errors import CircuitError, ModelError
from vitcut.graph import SiteKey
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import SiteStatistics
from vitcut.masked.masking import full_run
from vitcut.metrics import coarse_log_probs
from vitcut.model.weights import ViTWeights
from vitcut.progress import track
from vitcut.selection.greedy import Alive, Candidate, by_site
from vitcut.shapes import Bool, Float, Int, Tensor

_CHUNK = 16
"""Images per forward pass and its backward passes."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Turns responses into nats."""

    # The factor q / 2N makes the second-order term of the KL, 1/2 mean_x sum_y q (sum_u s_u)^2, a
    # plain squared norm: ||sum_u r_u||^2 with r = sqrt(q / 2N) s. Only products of two r occur, so
    # s is kept, each product is weighted with q / 2N, and no square root is taken.

    curvature: Float[Tensor, "responses"]
    """q / 2N of each class and image."""
    slope: Float[Tensor, "responses"]
    """- p / N of each class and image."""

    def of(self, response: Float[Tensor, "*parts responses"]) -> Float[Tensor, "*parts"]:
        """The rise of the KL for a response, b + ||r||^2, in nats."""
        return response @ self.slope + response.square() @ self.curvature

    def interaction(
        self, response: Float[Tensor, "*parts responses"], chosen: Float[Tensor, "responses"]
    ) -> Float[Tensor, "*parts"]:
        """What two responses cost together beyond their own rises, 2 < r, r' >, in nats."""
        return 2 * (response @ (self.curvature * chosen))


class Site:
    """The heads or the neurons of one layer and token kind, and the responses to cutting them."""

    def __init__(
        self,
        place: SiteKey,
        alive: Bool[Tensor, "parts"],
        activations: Float[Tensor, "images tokens features"],
        gradients: Float[Tensor, "classes images tokens features"],
        replaced: Float[Tensor, "tokens features"],
        covariance: Float[Tensor, "features features"] | None = None,
    ) -> None:
        """Take over the activations and gradients of all parts, those already cut included.

        Args:
            place: Where the site is.
            alive: True for the parts that are not cut.
            activations: z of the heads (head_dim features per head), or hidden units (one feature
                per neuron); centred in place.
            gradients: Of log q(y|x) with respect to those; changed as parts are cut.
            replaced: What a cut part becomes where nothing predicts it.
            covariance: Positive definite; predicts parts from one another. Without it none is.
        """
        self.place = place
        self.alive = alive.to(activations.device, copy=True)
        self._size = activations.shape[2] // len(alive)
        self._gradients = gradients
        self._centred = activations.sub_(replaced.to(activations.dtype))
        # [features, features]: the inverse covariance of the features that are alive, else zero.
        self._precision = None
        if covariance is not None:
            kept = self._features(self.alive)
            self._precision = torch.zeros_like(covariance)
            inverse = torch.linalg.inv(covariance[kept][:, kept])
            self._precision[kept[:, None] & kept] = inverse.flatten()
        self._pending = torch.zeros_like(self.alive)
        # [responses, features]: the response to each feature, cut ones too, if nothing predicts it.
        self._alone: Tensor | None = None

    def responses(self) -> Float[Tensor, "parts responses"]:
        """The response to cutting each part alone; zero for parts that are cut."""
        # With P the inverse covariance of what is alive, what all others leave unexplained of part
        # u is P_uu^-1 P_u: x: one inverse gives the regressions of every part on its rest.
        size, precision = self._size, self._precision
        if precision is None:
            change = -self._centred
        elif size == 1:
            scale = precision.diagonal().clone()
            scale[scale > 0] = 1 / scale[scale > 0]
            change = -(self._centred @ (precision * scale).to(self._centred.dtype))
        else:
            blocks = precision.unflatten(0, (-1, size))
            scaled = torch.zeros_like(blocks)
            for part in torch.nonzero(self.alive).flatten().tolist():
                own = blocks[part][:, part * size : (part + 1) * size]
                scaled[part] = torch.linalg.solve(own, blocks[part])
            change = -(self._centred @ scaled.flatten(0, 1).T.to(self._centred.dtype))
        found = self._along_gradients(change).unflatten(1, (-1, size)).sum(2)
        return found.T.contiguous() * self.alive[:, None]

    def whole_response(self) -> Float[Tensor, "responses"]:
        """The response to cutting all that is left and all that was cut since the last refresh.

        Nothing of the site stays, so nothing is predicted.
        """
        if self._alone is None:
            self._alone = self._along_gradients(-self._centred)
        return self._alone @ self._features(self.alive | self._pending).to(self._alone)

    def cut(self, parts: Sequence[int]) -> None:
        """Mark parts as cut. The others take over from them only at the next ``refresh``."""
        self.alive[list(parts)] = False
        self._pending[list(parts)] = True

    @property
    def num_pending(self) -> int:
        """How many parts were cut since the last refresh."""
        return int(self._pending.sum())

    def refresh(self) -> Float[Tensor, "responses"]:
        """Let the others take over from the parts that were cut; return the response to those cuts.

        This is the update of optimal brain surgeon: the inverse covariance P of the kept parts K
        follows from the one before, with the gone parts G, by a downdate of rank |G|,

            P_KK - P_KG P_GG^-1 P_GK,    and K predicts G by R = - P_GG^-1 P_GK,

        so only the small block of G is inverted, not the covariance of a whole layer.
        """
        gone, kept = self._features(self._pending), self._features(self.alive)
        self._pending[:] = False
        self._alone = None
        if self._precision is None or not bool(kept.any()):
            return self._along_gradients(-self._centred * gone).sum(1)
        precision, low = self._precision, self._centred.dtype
        within = torch.linalg.inv(precision[gone][:, gone])
        across = precision[gone] * kept
        # Only what the kept parts cannot predict of the gone ones changes the stream.
        error = self._centred @ (precision[:, gone] @ within).to(low)
        # From here on a change of a kept part also moves what it writes for the gone ones, R times
        # the change: their gradients flow into its own.
        lost = self._gradients[..., gone].clone()
        flat = self._gradients.view(-1, self._gradients.shape[-1])
        flat.addmm_(lost.flatten(0, 2), -(within @ across).to(low))
        alive = kept[:, None] & kept
        self._precision = (precision - across.T @ within @ across) * alive
        return torch.einsum("cntf,ntf->cn", lost, -error).flatten()

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
    circuit: Circuit,
    fill: Fill,
    *,
    alive: Alive,
    statistics: Mapping[SiteKey, SiteStatistics] | None,
) -> tuple[list[Site], Objective]:
    """Run a cut model on some images, and give all of its sites that still have parts.

    Args:
        weights: The model, in the precision to compute with.
        pixels: Normalised images. Their activations and gradients are all held at once.
        group_of_class: The group number of each class of the model.
        circuit: What is kept so far.
        fill: The fill of the circuit.
        alive: The parts that are not cut.
        statistics: Under a linear fill, the statistics of each site, which predict parts from one
            another. None: cut parts get the values of the fill.
    """
    rows, like = weights.rows_of(circuit.graph), weights.patch_weight
    classes, images = int(group_of_class.max()) + 1, len(pixels)
    left = {place: p for place, p in by_site(alive.heads, alive.neurons).items() if p.any()}
    # Per site, activations [images, tokens, features] and gradients [classes, images, tokens,
    # features]: allocated once and filled chunk by chunk, so that no two copies ever exist.
    values: dict[SiteKey, Tensor] = {}
    gradients: dict[SiteKey, Tensor] = {}
    attended = weights.num_heads * weights.blocks[0].attn.q_weight.shape[1]
    for place in left:
        features = attended if place[1] == "heads" else weights.num_neurons
        shape = (images, len(range(weights.num_tokens)[rows[place[2]]]), features)
        values[place], gradients[place] = like.new_empty(shape), like.new_empty(classes, *shape)
    log_p, log_q = like.new_empty(classes, images), like.new_empty(classes, images)

    def of_site(place: SiteKey, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Tensor:
        layer, parts, kind = place
        # z [heads, images, tokens, head_dim] becomes [images, tokens, heads * head_dim].
        z = heads[layer].permute(1, 2, 0, 3).flatten(2) if parts == "heads" else neurons[layer]
        return z[:, rows[kind]]

    starts = range(0, images, _CHUNK)
    for start in track(starts, "gradients", len(starts), unit="batches"):
        chunk = pixels[start : start + _CHUNK].to(weights.device, weights.dtype)
        span = slice(start, start + len(chunk))
        with torch.no_grad():
            full = full_run(weights, chunk).logits
        log_p[:, span] = coarse_log_probs(full, group_of_class, classes).T
        run, passes = trace_gradients(
            weights,
            chunk,
            group_of_class,
            lambda run: [*run.heads, *run.neurons],
            masked=(circuit, fill),
        )
        for place, held in values.items():
            held[span] = of_site(place, run.heads, run.neurons).detach()
        blocks = len(run.heads)
        for y, found in enumerate(passes):
            log_q[y, span] = found.log_prob
            for place, held in gradients.items():
                held[y, span] = of_site(place, found.by[:blocks], found.by[blocks:])

    sites: list[Site] = []
    for place, parts in left.items():
        if statistics is None:
            predicted = (_fill_values(weights, circuit, fill, place), None)
        else:
            predicted = (statistics[place].means, statistics[place].covariance)
        here = torch.from_numpy(parts.copy())
        sites.append(Site(place, here, values[place], gradients[place], *predicted))
    curvature = log_q.exp().flatten() / (2 * images)
    return sites, Objective(curvature=curvature, slope=-log_p.exp().flatten() / images)


def _fill_values(
    weights: ViTWeights, circuit: Circuit, fill: Fill, place: SiteKey
) -> Float[Tensor, "tokens features"]:
    """What the parts of a site become under a fill without maps."""
    layer, parts, kind = place
    rows = weights.rows_of(circuit.graph)[kind]
    if parts == "neurons":
        if fill.neurons is None:
            raise CircuitError("neurons are to be cut, but the fill has no values for them")
        return fill.neurons[layer, rows]
    first = weights.graph.head_source(layer, 0)
    tables = fill.sources[first : first + weights.num_heads, rows].double()
    # The fill holds what heads write into the stream, [heads, tokens, width]. Responses are taken
    # at z, before the output projection; any z that writes the same has the same effect.
    inverse = torch.linalg.pinv(weights.blocks[layer].attn.out_weight.double())
    return torch.einsum("hdw,htw->thd", inverse, tables).flatten(1)


class Joint:
    """A scorer that counts everything cut since the gradients were taken.

    Interactions with the running sum of chosen responses are cached for every part. They grow by
    one product per cut, for all sites, as every part interacts with every other. The responses
    themselves change only within a site and only when it is settled.
    """

    def __init__(
        self, sites: Iterable[Site], objective: Objective, *, refresh_fraction: float
    ) -> None:
        """Compute the response of every part.

        Args:
            sites: The sites of the model as cut so far.
            objective: Turns responses into nats.
            refresh_fraction: The fraction of a site's parts that is cut before the others take
                over from them; 0: never.

        Raises:
            ModelError: A response is not finite.
        """
        self._objective = objective
        self._refresh_fraction = refresh_fraction
        self._sites = {site.place: site for site in sites}
        self._nothing = torch.zeros_like(objective.curvature)
        # The running sum of responses, and per site the part of it that its refresh replaces.
        self._chosen = self._nothing
        self._pending = dict.fromkeys(self._sites, self._nothing)
        self._responses: dict[SiteKey, Tensor] = {}
        self._whole: dict[SiteKey, Tensor] = {}
        self._own: dict[SiteKey, NDArray[np.float64]] = {}
        self._crossed: dict[SiteKey, Tensor] = {}
        for place in self._sites:
            self._respond(place)

    def rises(self, site: SiteKey) -> NDArray[np.float64]:
        """The rise in nats from cutting each part of a site alone, shape [parts]."""
        return self._own[site] + self._crossed[site].double().cpu().numpy()

    def alone(self) -> dict[SiteKey, NDArray[np.float64]]:
        """What each part costs in nats if nothing else is cut."""
        return dict(self._own)

    def rise(self, candidate: Candidate) -> float:
        """The rise in nats from cutting several parts together."""
        response = torch.stack([self._response(site, parts) for site, parts in candidate]).sum(0)
        crossed = self._objective.interaction(response, self._chosen)
        return float(self._objective.of(response) + crossed)

    def cut(self, candidate: Candidate) -> None:
        """Add the response of a candidate to the running sum."""
        for site, parts in candidate:
            response = self._response(site, parts)
            self._sites[site].cut(parts)
            self._whole.pop(site, None)
            self._pending[site] = self._pending[site] + response
            self._add(response)

    def settle(self, site: SiteKey) -> bool:
        """Let the parts of a site take over from those that were cut, if enough were."""
        # Until then the cut parts are summed as if each had been cut alone, predicted in part from
        # the others that are gone too. The refresh gives the response to all of them together.
        found, fraction = self._sites[site], self._refresh_fraction
        enough = fraction * (found.num_pending + int(found.alive.sum()))
        if fraction == 0 or found.num_pending < max(1.0, enough):
            return False
        self._add(found.refresh() - self._pending[site])
        self._pending[site] = self._nothing
        self._respond(site)
        return True

    def _add(self, response: Float[Tensor, "responses"]) -> None:
        self._chosen = self._chosen + response
        for site, responses in self._responses.items():
            self._crossed[site] += self._objective.interaction(responses, response)

    def _respond(self, site: SiteKey) -> None:
        """Compute the responses of a site, and all that depends on them."""
        responses = self._sites[site].responses()
        self._responses[site] = responses
        self._whole.pop(site, None)
        self._own[site] = self._objective.of(responses).double().cpu().numpy()
        if not np.isfinite(self._own[site]).all():
            layer, parts, _ = site
            raise ModelError(
                f"scores of the {parts} of block {layer} are not finite: the model's weights, "
                "activations or gradients overflow"
            )
        self._crossed[site] = self._objective.interaction(responses, self._chosen)

    def _response(self, site: SiteKey, parts: tuple[int, ...]) -> Float[Tensor, "responses"]:
        if len(parts) > 1 and len(parts) == int(self._sites[site].alive.sum()):
            if site not in self._whole:
                # Parts cut earlier can no longer be predicted from these either. The running sum
                # holds their responses already, so those are taken off.
                self._whole[site] = self._sites[site].whole_response() - self._pending[site]
            return self._whole[site]
        return self._responses[site][list(parts)].sum(0)
