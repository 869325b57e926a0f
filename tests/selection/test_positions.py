from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nudges import GROUPS, alive_of, fitted, log_probs, random_parts
from strategies import vits
from tiny import random_pixels

from vitcut.masked.part_model import Attended, PartModel
from vitcut.selection.responses import trace_sites


class Moved(Attended):
    """What heads mix, moved by a fraction of what the absence of patches would do."""

    @property
    def z(self):
        def mix(there):
            pattern = self.pattern * there
            return (pattern / pattern.sum(-1, keepdim=True)) @ self.values

        change = (mix(self.after) - mix(self.before)) * self.after[self.rows, None]
        return super().z + self.eps * change.transpose(1, 2).flatten(2)


class Leaving(PartModel):
    """A model in which patches have gone from one set to another, to a small degree."""

    def __init__(self, weights, circuit, fill, before, after):
        super().__init__(weights, circuit, fill)
        prefix = torch.ones(weights.num_prefix, dtype=torch.float64)
        self.before, self.after = (torch.cat([prefix, x.double()]) for x in (before, after))
        self.prefix, self.eps = weights.num_prefix, 0.0

    def _attend(self, layer, streams):
        found = super()._attend(layer, streams)
        for kind, rows in enumerate(self.rows):
            if found[kind] is not None:
                found[kind] = Moved(*found[kind])
                found[kind].before, found[kind].after = self.before, self.after
                found[kind].rows, found[kind].eps = rows, self.eps
        return found

    def log_q(self, pixels, eps):
        self.eps = eps
        before, after = (
            x[self.prefix :] / x[self.prefix :].sum() for x in (self.before, self.after)
        )
        pool = (torch.ones_like(after) / len(after) + eps * (after - before)).log()
        return log_probs(self.run(pixels, log_weights=pool.expand(len(pixels), -1)).logits)

    def slope(self, pixels, step=1e-5):
        return ((self.log_q(pixels, step) - self.log_q(pixels, -step)) / (2 * step)).T.flatten()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@given(weights=vits(max_layers=2), tokens=st.sampled_from(["all", "split"]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_responses_of_positions_are_the_slopes_of_their_absence(weights, tokens, data):
    seed = data.draw(st.integers(0, 10**6))
    random = np.random.default_rng(seed)
    positions = random.random(len(weights.positions)) < 0.7
    positions[-1] = True
    circuit = random_parts(weights, "linear", seed=seed, tokens=tokens)
    circuit = replace(circuit, positions=positions)
    fill, statistics = fitted(weights, circuit, random_pixels(weights, 12, seed=8))
    pixels, alive = random_pixels(weights, 3, seed=9), alive_of(circuit)
    alive.positions = positions
    full = log_probs(PartModel(weights, circuit, fill).run(pixels).logits)
    sites, _ = trace_sites(
        weights, pixels, GROUPS, circuit, fill, alive=alive, log_p=full, statistics=statistics
    )
    site = sites[0]
    assert site.place == (0, "positions", circuit.graph.num_kinds - 1)
    kept = np.flatnonzero(positions)
    there = torch.ones(len(kept), dtype=torch.bool)

    def slope(before, after):
        return Leaving(weights, circuit, fill, before, after).slope(pixels)

    def check_next():
        found = site.responses()
        for place, part in enumerate(kept):
            if not there[place] or there.sum() == 1:
                continue
            without = there.clone()
            without[place] = False
            close(found[part], slope(there, without))
        assert not found[~site.alive].any()

    check_next()
    gone = random.random(len(kept)) < 0.5
    gone[-1] = False
    site.cut(kept[gone].tolist())
    assert site.num_pending == gone.sum()
    there = torch.from_numpy(~gone)
    close(site.refresh(), slope(torch.ones_like(there), there))
    assert site.num_pending == 0
    check_next()
