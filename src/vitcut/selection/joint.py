"""Joint scores: how much the KL rises when parts are cut together, to second order.

For a model with output q that was already cut from the full model with output p, cutting the parts
of a set A raises the KL by

    sum_{u in A} b_u + || sum_{u in A} r_u ||^2,    r_u[(x,y)] = sqrt(q(y|x) / 2N) s_u(x,y),
    b_u = - mean_x sum_y p(y|x) s_u(x,y),           s_u(x,y) = < grad log q(y|x), d_u(x) >

so all that is needed of a part u is its response s_u: one number for each of the N images and each
coarse class. Adding u to a set A costs b_u + ||r_u||^2 + 2 < sum_{v in A} r_v, r_u >, which takes
only the sum of what was chosen, not its members.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.errors import ModelError
from vitcut.graph import SiteKey
from vitcut.selection.greedy import Candidate
from vitcut.selection.positions import PositionSite
from vitcut.selection.responses import Objective, Site
from vitcut.shapes import Float, Tensor

_POSITIONS_REFRESHED = 1 / 16
"""The fraction of the positions that is cut before the others take over their shares of attention.
Positions are few and change one another much: with 32 of the small model's 64 gone, KL is .028 with
this, .057 without."""


class Joint:
    """A scorer that counts everything cut since the gradients were taken.

    Every part interacts with every other, but only with the running sum of chosen responses: one
    product per site, made when its rises are asked for and cuts were made since. The responses
    themselves change only within a site and only when it is settled.
    """

    def __init__(
        self,
        sites: Iterable[Site | PositionSite],
        objective: Objective,
        *,
        refresh_fraction: float,
        shrink_over: int | None = None,
    ) -> None:
        """Compute the response of every part.

        Args:
            sites: The sites of the model as cut so far.
            objective: Turns responses into nats.
            refresh_fraction: The fraction of a site's parts that is cut before the others take
                over from them; 0: never.
            shrink_over: The number of images, to shrink interactions and slopes by what is chance;
                None takes them as they are.

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
        # Interactions with the running sum; None where cuts were made since.
        self._crossed: dict[SiteKey, NDArray[np.float64] | None] = {}
        for place in self._sites:
            self._respond(place)
        if shrink_over is not None and self._responses:
            self._objective = objective.shrunk(self._responses.values(), shrink_over)
            self._own = {place: self._alone(place) for place in self._sites}

    def rises(self, site: SiteKey) -> NDArray[np.float64]:
        """The rise in nats from cutting each part of a site alone, shape [parts]."""
        crossed = self._crossed[site]
        if crossed is None:
            found = self._objective.interaction(self._responses[site], self._chosen)
            self._crossed[site] = crossed = found.double().cpu().numpy()
        return self._own[site] + crossed

    def alone(self) -> dict[SiteKey, NDArray[np.float64]]:
        """What each part costs in nats if nothing else is cut."""
        return dict(self._own)

    def rise(self, candidate: Candidate) -> float:
        """The rise in nats from cutting several parts together."""
        response = torch.stack([self._response(site, parts) for site, parts in candidate]).sum(0)
        crossed = self._objective.interaction(response, self._chosen)
        return float(self._objective.of(response) + crossed)

    def mutual(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """How much more every two of some candidates cost together than one by one, in nats."""
        responses = torch.stack(
            [
                torch.stack([self._response(site, parts) for site, parts in candidate]).sum(0)
                for candidate in candidates
            ]
        )
        return self._objective.mutual(responses).double().cpu().numpy()

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
        if isinstance(found, PositionSite):
            fraction = _POSITIONS_REFRESHED
        enough = fraction * (found.num_pending + int(found.alive.sum()))
        if fraction == 0 or found.num_pending < max(1.0, enough):
            return False
        self._add(found.refresh() - self._pending[site])
        self._pending[site] = self._nothing
        self._respond(site)
        return True

    def _add(self, response: Float[Tensor, "responses"]) -> None:
        self._chosen = self._chosen + response
        self._crossed = dict.fromkeys(self._crossed)

    def _respond(self, site: SiteKey) -> None:
        """Compute the responses of a site, and all that depends on them."""
        responses = self._sites[site].responses()
        self._responses[site] = responses
        self._whole.pop(site, None)
        self._own[site] = self._alone(site)
        if not np.isfinite(self._own[site]).all():
            layer, parts, _ = site
            raise ModelError(
                f"scores of the {parts} of block {layer} are not finite: the model's weights, "
                "activations or gradients overflow"
            )
        self._crossed[site] = None

    def _alone(self, site: SiteKey) -> NDArray[np.float64]:
        """What each part of a site costs if nothing else is cut."""
        return self._objective.of(self._responses[site]).double().cpu().numpy()

    def _response(self, site: SiteKey, parts: tuple[int, ...]) -> Float[Tensor, "responses"]:
        found = self._sites[site]
        if isinstance(found, Site) and 1 < len(parts) == int(found.alive.sum()):
            if site not in self._whole:
                # Parts cut earlier can no longer be predicted from these either. The running sum
                # holds their responses already, so those are taken off.
                self._whole[site] = found.whole_response() - self._pending[site]
            return self._whole[site]
        return self._responses[site][list(parts)].sum(0)
