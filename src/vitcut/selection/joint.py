"""Joint scores: the rise of the KL from cutting parts of a model together, on the running sum.

What the responses of parts are is left to ``sites.py``, choosing to ``greedy.py``.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.errors import ModelError
from vitcut.graph import SiteKey
from vitcut.selection.greedy import Candidate
from vitcut.selection.sites import Objective, Site
from vitcut.shapes import Tensor


class Joint:
    """Rises given everything that was cut since the gradients were taken."""

    def __init__(
        self, sites: Iterable[Site], objective: Objective, *, refresh_fraction: float
    ) -> None:
        """Compute every part's response.

        Args:
            sites: Of the model as cut so far.
            objective: Turns responses into nats.
            refresh_fraction: Of a site's parts, how many are cut before the others take over (OBS);
                0: never.

        Raises:
            ModelError: A response is not finite.
        """
        self._objective = objective
        self._refresh_fraction = refresh_fraction
        self._sites = {(site.layer, site.parts, site.kind): site for site in sites}
        self._nothing = torch.zeros_like(objective.curvature)
        self._chosen = self._nothing
        self._pending = dict.fromkeys(self._sites, self._nothing)
        self._responses: dict[SiteKey, Tensor] = {}
        self._whole: dict[SiteKey, Tensor] = {}
        self._own: dict[SiteKey, NDArray[np.float64]] = {}
        self._crossed: dict[SiteKey, Tensor] = {}
        for key in self._sites:
            self._respond(key)

    def rises(self, site: SiteKey) -> NDArray[np.float64]:
        """In nats, of cutting each part of a site alone; shape [parts]."""
        return self._own[site] + self._crossed[site].double().cpu().numpy()

    def alone(self) -> dict[SiteKey, NDArray[np.float64]]:
        """In nats, what each part costs if nothing else is cut."""
        return dict(self._own)

    def rise(self, candidate: Candidate) -> float:
        """In nats, of cutting several parts."""
        response = torch.stack([self._response(site, parts) for site, parts in candidate]).sum(0)
        crossed = self._objective.interaction(response, self._chosen)
        return float(self._objective.of(response) + crossed)

    def cut(self, candidate: Candidate) -> None:
        """Add the candidate's response to what was cut so far."""
        for site, parts in candidate:
            response = self._response(site, parts)
            self._sites[site].cut(parts)
            self._whole.pop(site, None)
            self._pending[site] = self._pending[site] + response
            self._add(response)

    def settle(self, site: SiteKey) -> bool:
        """Let a site's parts take over from those that were cut, if enough were."""
        found, fraction = self._sites[site], self._refresh_fraction
        enough = fraction * (found.num_pending + int(found.alive.sum()))
        if fraction == 0 or found.num_pending < max(1.0, enough):
            return False
        self._add(self._sites[site].refresh() - self._pending[site])
        self._pending[site] = self._nothing
        self._respond(site)
        return True

    def _add(self, response: Tensor) -> None:
        self._chosen = self._chosen + response
        for site, responses in self._responses.items():
            self._crossed[site] += self._objective.interaction(responses, response)

    def _respond(self, site: SiteKey) -> None:
        responses = self._sites[site].responses()
        self._responses[site] = responses
        self._whole.pop(site, None)
        self._own[site] = self._objective.of(responses).double().cpu().numpy()
        if not np.isfinite(self._own[site]).all():
            layer, kind, _ = site
            raise ModelError(
                f"scores of the {kind} of block {layer} are not finite: the model's weights, "
                "activations or gradients overflow"
            )
        self._crossed[site] = self._objective.interaction(responses, self._chosen)

    def _response(self, site: SiteKey, parts: tuple[int, ...]) -> Tensor:
        if len(parts) > 1 and len(parts) == int(self._sites[site].alive.sum()):
            if site not in self._whole:
                # Parts that were cut before no longer have these to be predicted from.
                self._whole[site] = self._sites[site].whole_response() - self._pending[site]
            return self._whole[site]
        return self._responses[site][list(parts)].sum(0)
