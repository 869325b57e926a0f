import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nudges import GROUPS, Nudged, alive_of, circuit_of, fitted, log_probs, random_parts
from strategies import undisturbed, vits
from tiny import random_pixels, random_vit

from vitcut.errors import CircuitError
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import fixed_fill
from vitcut.masked.masking import full_run, masked_run
from vitcut.selection.sites import Objective, Site, trace_sites

CLASSES, IMAGES, TOKENS = 3, 4, 2


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Given:
    """What a site is made of, and its responses by the definition."""

    def __init__(self, seed: int, parts: int, size: int, alive=None) -> None:
        features = parts * size
        self.size = size
        self.alive = torch.ones(parts, dtype=torch.bool) if alive is None else alive
        self.activations = normal(seed, IMAGES, TOKENS, features)
        self.gradients = normal(seed + 1, CLASSES, IMAGES, TOKENS, features)
        self.replaced = normal(seed + 2, TOKENS, features)
        mixing = normal(seed + 3, features, features)
        self.covariance = mixing @ mixing.T + 0.1 * torch.eye(features)

    def site(self, *, linear: bool = True, dtype=torch.float64) -> Site:
        return Site(
            (0, "heads" if self.size > 1 else "neurons", 0),
            self.alive,
            self.activations.to(dtype, copy=True),
            self.gradients.to(dtype, copy=True),
            self.replaced,
            self.covariance if linear else None,
        )

    def response(self, parts: list[int]) -> torch.Tensor:
        """To cutting some parts: minus what the others, as far as alive, miss of them."""
        features = np.arange(len(self.replaced[0])).reshape(-1, self.size)
        gone = features[parts].flatten()
        rest = [p for p in range(len(self.alive)) if self.alive[p] and p not in parts]
        kept = features[rest].flatten()
        centred = (self.activations - self.replaced).numpy()
        change = -centred[..., gone]
        if len(kept):
            covariance = self.covariance.numpy()
            R = covariance[np.ix_(gone, kept)] @ np.linalg.inv(covariance[np.ix_(kept, kept)])
            change += centred[..., kept] @ R.T
        gradients = self.gradients.numpy()[..., gone]
        return torch.from_numpy(np.einsum("cntf,ntf->cn", gradients, change).flatten())


@st.composite
@undisturbed
def givens(draw: st.DrawFn) -> Given:
    parts, seed = draw(st.integers(2, 6)), draw(st.integers(0, 10**6))
    alive = torch.ones(parts, dtype=torch.bool)
    if parts > 3:
        alive[draw(st.integers(0, parts - 1))] = False
    return Given(seed, parts, draw(st.integers(1, 3)), alive)


def assert_close(got, expected, tol=1e-7):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


@given(givens())
def test_a_response_is_minus_what_the_others_miss_of_a_part(given):
    responses = given.site().responses()
    assert responses.shape == (len(given.alive), CLASSES * IMAGES)
    for part, alive in enumerate(given.alive.tolist()):
        expected = given.response([part]) if alive else torch.zeros_like(responses[part])
        assert_close(responses[part], expected)


@given(givens())
def test_without_a_covariance_a_part_becomes_what_replaces_it(given):
    site = given.site(linear=False)
    change = given.gradients * (given.replaced - given.activations)
    expected = change.sum(2).unflatten(-1, (-1, given.size)).sum(-1).permute(2, 0, 1).flatten(1)
    expected = expected * given.alive[:, None]
    assert_close(site.responses(), expected)
    assert_close(site.whole_response(), expected.sum(0))
    first = int(torch.nonzero(given.alive)[0])
    site.cut([first])
    assert_close(site.refresh(), expected[first])
    others = expected.clone()
    others[first] = 0
    assert_close(site.responses(), others)


@given(givens(), st.data())
def test_after_a_refresh_the_others_have_taken_over(given, data):
    alive = torch.nonzero(given.alive).flatten().tolist()
    gone = data.draw(st.lists(st.sampled_from(alive), min_size=1, unique=True))
    if len(gone) == len(alive):
        gone.pop()
    site = given.site()
    site.cut(gone)
    assert site.num_pending == len(gone)
    assert_close(site.refresh(), given.response(gone))
    assert site.num_pending == 0
    kept = site.alive.repeat_interleave(given.size)
    expected = torch.zeros_like(given.covariance)
    inverse = torch.linalg.inv(given.covariance[kept][:, kept])
    expected[kept[:, None] & kept] = inverse.flatten()
    assert_close(site._precision, expected, 1e-6)
    lost = torch.zeros(len(given.alive), dtype=torch.bool)
    lost[gone] = True
    lost = lost.repeat_interleave(given.size)
    R = given.covariance[lost][:, kept] @ inverse
    effective = given.gradients[..., kept] + given.gradients[..., lost] @ R
    assert_close(site._gradients[..., kept], effective, 1e-6)
    fresh = Given(0, len(given.alive), given.size, site.alive)
    fresh.activations, fresh.replaced = given.activations, given.replaced
    fresh.covariance, fresh.gradients = given.covariance, site._gradients
    assert_close(site.responses(), fresh.site().responses(), 1e-6)


@given(givens(), st.randoms(use_true_random=False), st.booleans())
def test_cuts_one_after_the_other_add_up_to_the_cut_at_once(given, random, everything):
    order = torch.nonzero(given.alive).flatten().tolist()
    random.shuffle(order)
    if not everything:
        order = order[: max(1, len(order) // 2)]
    site, total = given.site(), torch.zeros(CLASSES * IMAGES, dtype=torch.float64)
    for part in order:
        expected = site.responses()[part]
        site.cut([part])
        response = site.refresh()
        assert_close(response, expected, 1e-6)
        total = total + response
    assert_close(total, given.response(order), 1e-6)
    if everything:
        assert_close(total, given.site().whole_response(), 1e-6)


@given(givens())
def test_cutting_all_that_is_left_counts_what_waits_for_a_refresh(given):
    site = given.site()
    expected = site.whole_response()
    alive = torch.nonzero(given.alive).flatten().tolist()
    assert_close(expected, given.response(alive))
    site.cut(alive[:1])
    assert_close(site.whole_response(), expected)


def test_what_it_is_made_of_is_not_changed_but_for_the_activations():
    given = Given(0, 4, 2)
    site = Site(
        (0, "heads", 0),
        given.alive,
        given.activations.clone(),
        given.gradients.clone(),
        given.replaced,
        given.covariance,
    )
    covariance, replaced = given.covariance.clone(), given.replaced.clone()
    site.cut([1])
    site.refresh()
    assert given.alive.all()
    assert torch.equal(given.covariance, covariance)
    assert torch.equal(given.replaced, replaced)


def test_single_precision_is_enough_for_many_downdates():
    given = Given(3, 40, 1)
    site = given.site(dtype=torch.float32)
    order = np.random.default_rng(0).permutation(40)[:30].tolist()
    total = torch.zeros(CLASSES * IMAGES)
    for part in order:
        site.cut([part])
        total = total + site.refresh()
    expected = given.response(order).float()
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_dead_features_cost_nothing_and_change_nothing():
    given = Given(0, 5, 1)
    given.covariance[2] = given.covariance[:, 2] = 0
    given.covariance[2, 2] = 1e-9
    given.activations[..., 2] = given.replaced[:, 2]
    site = given.site()
    assert_close(site.responses()[2], torch.zeros(CLASSES * IMAGES, dtype=torch.float64))
    before = site.responses()
    site.cut([2])
    assert_close(site.refresh(), torch.zeros_like(before[2]))
    assert_close(site.responses()[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@given(st.integers(0, 10**6))
def test_the_objective_is_the_formula(seed):
    log_p, log_q = (normal(seed + n, 3, 5).log_softmax(0) for n in (0, 1))
    s_u, s_v = normal(seed + 2, 3, 5), normal(seed + 3, 3, 5)
    p, q = log_p.exp(), log_q.exp()
    objective = Objective(curvature=q.flatten() / 10, slope=-p.flatten() / 5)

    def r(s):
        return (q / 10).sqrt() * s

    def b(s):
        return -(p * s).sum(0).mean()

    assert_close(objective.of(s_u.flatten()), b(s_u) + r(s_u).square().sum())
    crossed = objective.interaction(s_u.flatten(), s_v.flatten())
    assert_close(crossed, 2 * (r(s_u) * r(s_v)).sum())
    together = b(s_u) + b(s_v) + (r(s_u) + r(s_v)).square().sum()
    assert_close(objective.of(s_u.flatten()) + objective.of(s_v.flatten()) + crossed, together)
    assert_close(objective.of((s_u + s_v).flatten()), together)
    both = torch.stack([s_u.flatten(), s_v.flatten()])
    assert_close(objective.of(both)[1], objective.of(s_v.flatten()))


def test_the_objective_of_a_cut_model_weighs_by_the_full_and_the_cut_distribution():
    weights = random_vit()
    pixels, circuit = random_pixels(weights, images=19), random_parts(weights, "mean", seed=1)
    fill = fixed_fill("mean", weights, [pixels])
    _, objective = trace_sites(
        weights, pixels, GROUPS, (circuit, fill), alive=alive_of(circuit), statistics=None
    )
    p = log_probs(full_run(weights, pixels).logits).exp()
    q = log_probs(masked_run(weights, pixels, circuit, fill).logits).exp()
    assert (p - q).abs().max() > 0.01
    assert_close(objective.curvature, q.T.flatten() / 38)
    assert_close(objective.slope, -p.T.flatten() / 19)


@given(
    weights=vits(max_layers=2),
    ablation=st.sampled_from(["zero", "mean", "linear"]),
    tokens=st.sampled_from(["all", "split"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40)
def test_responses_of_a_cut_model_are_the_slopes_of_its_log_probabilities(
    weights, ablation, tokens, seed
):
    circuit = random_parts(weights, ablation, seed=seed, tokens=tokens)
    calibration, pixels = random_pixels(weights, 12, seed=8), random_pixels(weights, 3, seed=9)
    fill, statistics = fitted(weights, circuit, calibration)
    alive = alive_of(circuit)
    sites, _ = trace_sites(
        weights, pixels, GROUPS, (circuit, fill), alive=alive, statistics=statistics
    )
    random = np.random.default_rng(seed)
    for site in sites:
        place = (site.layer, site.parts, site.kind)
        part = int(random.choice(torch.nonzero(site.alive).flatten().numpy()))
        nudged = Nudged(weights, circuit, fill, statistics, {place: [part]})
        assert_close(site.responses()[part], nudged.slope(pixels).T.flatten(), 1e-5)


def test_sites_that_are_cut_whole_are_left_out():
    weights = random_vit()
    heads, neurons = np.ones((2, 2, 2), dtype=bool), np.ones((2, 2, 5), dtype=bool)
    heads[0, :, 1] = neurons[1, 0] = False
    circuit = circuit_of(weights, heads, neurons, "zero")
    sites, _ = trace_sites(
        weights,
        random_pixels(weights),
        GROUPS,
        (circuit, fixed_fill("zero", weights, [])),
        alive=(heads, neurons),
        statistics=None,
    )
    places = [(site.layer, site.parts, site.kind) for site in sites]
    assert len(places) == 6
    assert (0, "heads", 1) not in places
    assert (1, "neurons", 0) not in places


def test_a_fill_without_neurons_is_refused():
    weights = random_vit()
    circuit = random_parts(weights, "mean", seed=0)
    fill = Fill(sources=fixed_fill("zero", weights, []).sources)
    with pytest.raises(CircuitError, match="no values for them"):
        trace_sites(
            weights,
            random_pixels(weights),
            GROUPS,
            (circuit, fill),
            alive=alive_of(circuit),
            statistics=None,
        )
