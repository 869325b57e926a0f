import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nudges import GROUPS, Nudged, alive_of, circuit_of, fitted, log_probs, random_parts
from strategies import undisturbed, vits
from tiny import random_pixels, random_vit

from vitcut.errors import CircuitError, ModelError
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import fixed_fill
from vitcut.masked.masking import full_run, masked_run
from vitcut.selection import responses
from vitcut.selection.greedy import Additive, Alive, cut_down
from vitcut.selection.joint import Joint
from vitcut.selection.responses import Objective, Site, trace_sites

CLASSES, IMAGES, TOKENS = 3, 4, 2


def trace(weights, pixels, groups, circuit, fill, *, alive, statistics, **settings):
    log_p = log_probs(full_run(weights, pixels).logits)
    statistics = None if statistics is None else dict(statistics)
    return trace_sites(
        weights,
        pixels,
        groups,
        circuit,
        fill,
        alive=alive,
        log_p=log_p,
        statistics=statistics,
        **settings,
    )


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site_of(place, alive, centred, gradients, covariance) -> Site:
    """A site whose stream is its features, and whose probes are the classes."""
    return Site(
        place,
        alive,
        centred=centred,
        gradients=gradients,
        writes=torch.eye(centred.shape[2], dtype=centred.dtype),
        expand=lambda found: found.flatten(0, 1),
        covariance=covariance,
    )


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
        kept = self.alive.repeat_interleave(self.size)
        return site_of(
            (0, "heads" if self.size > 1 else "neurons", 0),
            self.alive,
            (self.activations - self.replaced)[..., kept].to(dtype),
            self.gradients[..., kept].to(dtype),
            self.covariance[kept][:, kept] if linear else None,
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
    lost = torch.zeros(len(given.alive), dtype=torch.bool)
    lost[gone] = True
    lost = lost.repeat_interleave(given.size)
    R = given.covariance[lost][:, kept] @ torch.linalg.inv(given.covariance[kept][:, kept])
    fresh = Given(0, len(given.alive), given.size, site.alive)
    fresh.activations, fresh.replaced = given.activations, given.replaced
    fresh.covariance, fresh.gradients = given.covariance, given.gradients.clone()
    # A kept part now also writes its share in the lost ones.
    fresh.gradients[..., kept] += given.gradients[..., lost] @ R
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


def test_what_it_is_made_of_is_not_changed():
    given = Given(0, 4, 2)
    made_of = (given.alive, given.activations, given.gradients, given.covariance)
    before = [each.clone() for each in made_of]
    site = site_of((0, "heads", 0), *made_of)
    site.cut([1])
    site.refresh()
    site.responses()
    assert all(map(torch.equal, made_of, before))


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
    _, objective = trace(
        weights, pixels, GROUPS, circuit, fill, alive=alive_of(circuit), statistics=None
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
    sites, _ = trace(weights, pixels, GROUPS, circuit, fill, alive=alive, statistics=statistics)
    random = np.random.default_rng(seed)
    for site in sites:
        part = int(random.choice(torch.nonzero(site.alive).flatten().numpy()))
        nudged = Nudged(weights, circuit, fill, statistics, {site.place: [part]})
        assert_close(site.responses()[part], nudged.slope(pixels).T.flatten(), 1e-5)


def test_sites_that_are_cut_whole_are_left_out():
    weights = random_vit()
    heads, neurons = np.ones((2, 2, 2), dtype=bool), np.ones((2, 2, 5), dtype=bool)
    heads[0, :, 1] = neurons[1, 0] = False
    circuit = circuit_of(weights, heads, neurons, "zero")
    sites, _ = trace(
        weights,
        random_pixels(weights),
        GROUPS,
        circuit,
        fixed_fill("zero", weights, []),
        alive=Alive(heads=heads, neurons=neurons),
        statistics=None,
    )
    places = [site.place for site in sites]
    assert len(places) == 6
    assert (0, "heads", 1) not in places
    assert (1, "neurons", 0) not in places


def test_a_fill_without_neurons_is_refused():
    weights = random_vit()
    circuit = random_parts(weights, "mean", seed=0)
    fill = Fill(sources=fixed_fill("zero", weights, []).sources)
    with pytest.raises(CircuitError, match="no values for them"):
        trace(
            weights,
            random_pixels(weights),
            GROUPS,
            circuit,
            fill,
            alive=alive_of(circuit),
            statistics=None,
        )


def objective(seed: int = 0) -> Objective:
    p, q = (normal(seed + n, 3, 4).softmax(0).flatten() for n in (0, 1))
    return Objective(curvature=q / 8, slope=-p / 4)


def a_site(place, parts: int, *, linear: bool, seed: int) -> Site:
    size = 2 if place[1] == "heads" else 1
    mixing = normal(seed, parts * size, parts * size)
    return site_of(
        place,
        torch.ones(parts, dtype=torch.bool),
        normal(seed + 1, 4, 2, parts * size),
        normal(seed + 2, 3, 4, 2, parts * size),
        mixing @ mixing.T + 0.1 * torch.eye(parts * size) if linear else None,
    )


HEADS, NEURONS = (0, "heads", 0), (0, "neurons", 0)


def sites(*, linear: bool, seed: int = 5) -> list[Site]:
    return [
        a_site(HEADS, 3, linear=linear, seed=seed),
        a_site(NEURONS, 8, linear=linear, seed=seed + 10),
    ]


def test_the_rise_of_a_candidate_is_the_objective_of_its_summed_responses():
    found, weigh = sites(linear=True), objective()
    heads, neurons = (site.responses() for site in found)
    joint = Joint(found, weigh, refresh_fraction=0.5)
    np.testing.assert_allclose(joint.rises(NEURONS), weigh.of(neurons).numpy(), rtol=1e-12)
    both = ((HEADS, (1,)), (NEURONS, (4,)))
    assert joint.rise(both) == pytest.approx(float(weigh.of(heads[1] + neurons[4])), rel=1e-12)


@given(st.randoms(use_true_random=False), st.booleans())
def test_rises_along_the_way_add_up_to_the_objective_of_everything(random, linear):
    weigh, total = objective(), 0.0
    joint = Joint(sites(linear=linear), weigh, refresh_fraction=0)
    alone = {site.place[1]: site.responses() for site in sites(linear=linear)}
    chosen = torch.zeros(CLASSES * IMAGES, dtype=torch.float64)
    cuts = [(HEADS, 0), (HEADS, 2), *((NEURONS, n) for n in range(6))]
    random.shuffle(cuts)
    for site, part in cuts:
        rise = joint.rise(((site, (part,)),))
        assert rise == pytest.approx(float(joint.rises(site)[part]), rel=1e-9, abs=1e-12)
        joint.cut(((site, (part,)),))
        assert not joint.settle(site)
        total += rise
        chosen = chosen + alone[site[1]][part]
    assert total == pytest.approx(float(weigh.of(chosen)), rel=1e-9)


def test_once_settled_rises_are_those_of_what_is_still_kept():
    weigh, found = objective(), sites(linear=True)
    joint = Joint(found, weigh, refresh_fraction=0.25)
    joint.cut(((HEADS, (1,)),))
    first = joint.rises(NEURONS).copy()
    joint.cut(((NEURONS, (2,)),))
    assert not joint.settle(NEURONS), "one of eight is less than a quarter"
    joint.cut(((NEURONS, (5,)),))
    assert joint.settle(NEURONS)
    assert not joint.settle(NEURONS), "nothing was cut since"
    reference = sites(linear=True)
    heads, neurons = reference
    chosen = heads.responses()[1]
    neurons.cut([2, 5])
    chosen = chosen + neurons.refresh()
    responses = neurons.responses()
    expected = weigh.of(responses) + weigh.interaction(responses, chosen)
    left = [0, 1, 3, 4, 6, 7]
    np.testing.assert_allclose(joint.rises(NEURONS)[left], expected[left].numpy(), rtol=1e-9)
    assert np.abs(joint.rises(NEURONS) - first)[left].max() > 1e-3
    responses = heads.responses()
    expected = weigh.of(responses) + weigh.interaction(responses, chosen)
    np.testing.assert_allclose(joint.rises(HEADS)[[0, 2]], expected[[0, 2]].numpy(), rtol=1e-9)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("settled", [False, True])
def test_a_whole_site_costs_the_same_in_any_steps(linear, settled):
    weigh = objective()
    whole = tuple(range(8))
    expected = Joint(sites(linear=linear), weigh, refresh_fraction=0).rise(((NEURONS, whole),))
    joint = Joint(sites(linear=linear), weigh, refresh_fraction=0.1 if settled else 0)
    cost = 0.0
    for part in (3, 0):
        cost += joint.rise(((NEURONS, (part,)),))
        joint.cut(((NEURONS, (part,)),))
        joint.settle(NEURONS)
    rest = (1, 2, 4, 5, 6, 7)
    cost += joint.rise(((NEURONS, rest),))
    assert cost == pytest.approx(expected, rel=1e-9)
    joint.cut(((NEURONS, rest),))
    response = sites(linear=linear)[1].whole_response()
    np.testing.assert_allclose(joint._chosen.numpy(), response.numpy(), rtol=1e-9, atol=1e-12)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match="scores of the heads of block 0 are not finite"):
        Joint(
            sites(linear=False),
            Objective(
                curvature=torch.full((CLASSES * IMAGES,), np.nan, dtype=torch.float64),
                slope=objective().slope,
            ),
            refresh_fraction=0,
        )


def twins(weights):
    """Neurons 0 and 1 of every MLP are the same; each is as good as free while the other lives."""
    for block in weights.blocks:
        block.mlp.in_weight[1] = block.mlp.in_weight[0]
        block.mlp.in_bias[1] = block.mlp.in_bias[0]
        block.mlp.out_weight[:, 1] = block.mlp.out_weight[:, 0]
    return weights


def joint_of(weights, circuit, pixels, *, ridge=1e-6, fraction=0.01):
    fill, statistics = fitted(weights, circuit, pixels, ridge)
    alive = alive_of(circuit)
    found, weigh = trace(weights, pixels, GROUPS, circuit, fill, alive=alive, statistics=statistics)
    return Joint(found, weigh, refresh_fraction=fraction), alive


def uncut(weights, ablation):
    shape = (2, 2, 2)
    return circuit_of(
        weights, np.ones(shape, bool), np.ones((2, 2, weights.num_neurons), bool), ablation
    )


def test_of_two_twins_only_one_is_free():
    weights = twins(random_vit(hidden=4))
    joint, _ = joint_of(weights, uncut(weights, "linear"), random_pixels(weights, images=30))
    site = (0, "neurons", 1)
    before = joint.rises(site).copy()
    assert before[:2].max() < 1e-6 * before[2:].min()
    joint.cut(((site, (0,)),))
    assert joint.settle(site)
    after = joint.rises(site)
    assert after[1] > 1e4 * max(before[1], 1e-15)
    assert after[1] > 1e-3 * before[2:].min()


def test_greedy_cutting_keeps_one_twin_and_additive_scores_cut_both():
    weights = twins(random_vit(hidden=4))
    circuit, pixels = uncut(weights, "linear"), random_pixels(weights, images=30)
    joint, alive = joint_of(weights, circuit, pixels)
    rivals, both = Additive(joint.alone()), alive.copy()
    graph, start = weights.split_graph, float(alive.neurons.sum())

    def cost(circuit):
        return float(circuit.neurons.sum())

    for scorer, left in ((joint, alive), (rivals, both)):
        list(cut_down(graph, left, scorer, cost, budget=start - 4))
    # Three live MLPs have twins; the last block's patch rows reach nothing.
    places = [(0, 0), (0, 1), (1, 0)]
    assert [bool(alive.neurons[place][:2].any()) for place in places] == [True] * 3
    assert not all(both.neurons[place][:2].any() for place in places)


@pytest.mark.parametrize("ablation", ["zero", "mean", "linear"])
@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_joint_rises_of_small_cuts_are_the_exact_rise_of_the_divergence(ablation, seed):
    weights, eps = random_vit(seed, num_heads=3, hidden=6), 1e-3
    pixels = random_pixels(weights, images=10)
    circuit = uncut_of(weights, ablation)
    fill, statistics = fitted(weights, circuit, pixels, 0.1)
    joint, _ = joint_of(weights, circuit, pixels, ridge=0.1)
    cuts = [
        ((0, "heads", 1), 0),
        ((0, "neurons", 1), 2),
        ((0, "neurons", 1), 3),
        ((1, "heads", 0), 1),
    ]
    parts: dict = {}
    predicted = 0.0
    for site, part in cuts:
        joint.settle(site)
        predicted += joint.rise(((site, (part,)),))
        joint.cut(((site, (part,)),))
        parts.setdefault(site, []).append(part)
    joint.settle((0, "neurons", 1))
    nudged = Nudged(weights, circuit, fill, statistics, parts)
    # At the uncut model b vanishes and the rise is quadratic in the size of the change.
    assert nudged.kl(pixels, eps) / eps**2 == pytest.approx(predicted, rel=0.02)


def uncut_of(weights, ablation):
    heads = np.ones((2, weights.num_heads, 2), dtype=bool)
    return circuit_of(weights, heads, np.ones((2, 2, weights.num_neurons), bool), ablation)


@pytest.mark.parametrize("ablation", ["zero", "mean", "linear"])
def test_on_a_cut_model_small_cuts_rise_by_their_slope(ablation):
    weights, eps = random_vit(4, num_heads=3, hidden=6), 1e-5
    pixels, circuit = random_pixels(weights, images=10), random_parts(weights, ablation, seed=3)
    fill, statistics = fitted(weights, circuit, pixels)
    alive = alive_of(circuit)
    found, weigh = trace(weights, pixels, GROUPS, circuit, fill, alive=alive, statistics=statistics)
    for site in found:
        part = int(torch.nonzero(site.alive)[0])
        slope = float(site.responses()[part] @ weigh.slope)
        nudged = Nudged(weights, circuit, fill, statistics, {site.place: [part]})
        exact = (nudged.kl(pixels, eps) - nudged.kl(pixels, -eps)) / (2 * eps)
        assert exact == pytest.approx(slope, rel=1e-4, abs=1e-9)


def many_classes(monkeypatch, sketches: int, seed: int = 0):
    """Responses of a cut model with 12 groups: of each class exactly, and sketched."""
    weights = random_vit(3, num_classes=12, hidden=6)
    pixels, circuit = random_pixels(weights, images=6), random_parts(weights, "mean", seed=5)
    groups, fill = torch.arange(12), fixed_fill("mean", weights, [random_pixels(weights, 9)])
    log_p = full_run(weights, pixels).logits.log_softmax(-1)
    found = []
    for exact in (True, False):
        monkeypatch.setattr(responses, "_MOST_EXACT", 11 if exact else 8)
        monkeypatch.setattr(responses, "_NUM_SKETCHES", sketches)
        found.append(
            trace_sites(
                weights,
                pixels,
                groups,
                circuit,
                fill,
                alive=alive_of(circuit),
                log_p=log_p,
                statistics=None,
                seed=seed,
            )
        )
    return found


def test_sketched_classes_estimate_the_curvature_and_give_the_slope_exactly(monkeypatch):
    (exact, weigh), (sketched, guess) = many_classes(monkeypatch, sketches=4000)
    for site, other in zip(exact, sketched, strict=True):
        true, found = site.responses(), other.responses()
        assert_close(found @ guess.slope, true @ weigh.slope)
        alive = site.alive
        expected = (true.square() @ weigh.curvature)[alive]
        assert_close((found.square() @ guess.curvature)[alive], expected, 0.1)
        # Interactions too: what two parts cost together.
        assert_close(guess.mutual(found), weigh.mutual(true), 0.1 * float(expected.max()))


def test_few_sketches_are_as_far_off_as_is_said(monkeypatch):
    errors = []
    for seed in range(6):
        (exact, weigh), (sketched, guess) = many_classes(monkeypatch, sketches=7, seed=seed)
        for site, other in zip(exact, sketched, strict=True):
            by_image = (site.responses().square() * weigh.curvature).unflatten(1, (12, 6)).sum(1)
            spread = (2 / 7) ** 0.5 * by_image.norm(dim=1)
            found = other.responses().square() @ guess.curvature
            errors.append(((found - by_image.sum(1)) / spread)[site.alive])
    rms = float(torch.cat(errors).square().mean().sqrt())
    assert 0.3 < rms < 1.1


def test_float32_holds_half_of_it_and_loses_little():
    weights = random_vit(1, hidden=8)
    circuit, pixels = random_parts(weights, "linear", seed=2), random_pixels(weights, images=20)
    fill, statistics = fitted(weights, circuit, pixels)
    given = {"alive": alive_of(circuit), "statistics": statistics}
    sites, _ = trace(weights, pixels, GROUPS, circuit, fill, **given)
    low = weights.to(torch.float32)
    like = fill.like(low.patch_weight)
    rounded, _ = trace(low, pixels.float(), GROUPS, circuit, like, **given)
    for site, other in zip(sites, rounded, strict=True):
        true, found = site.responses(), other.responses()
        assert found.dtype == torch.float32
        assert not torch.equal(found.double(), true.float().double())
        assert float((found - true).square().mean().sqrt() / true.square().mean().sqrt()) < 0.01


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_what_is_believed_of_interactions_is_ledoit_and_wolfs_factor(seed):
    parts, classes, images = 5, 3, 6
    weigh = Objective(
        curvature=normal(seed, classes, images).square().flatten(),
        slope=normal(seed + 1, classes, images).flatten(),
    )
    # Something in common, so that not everything is chance.
    found = normal(seed + 2, parts, classes, images) + normal(seed + 3, parts, 1, 1)
    r = found * weigh.curvature.sqrt().unflatten(0, (classes, images))
    by_image = torch.einsum("pcn,qcn->npq", r, r)  # What each image adds to the interactions.
    slopes = (found * weigh.slope.unflatten(0, (classes, images))).sum(1).T
    off = ~torch.eye(parts, dtype=torch.bool)
    for terms, got in (
        (by_image[:, off], "kept_interaction"),
        (slopes, "kept_slope"),
    ):
        chance = images * terms.var(0)  # The variance of a sum of N terms.
        expected = 1 - float(chance.sum() / terms.sum(0).square().sum())
        shrunk = weigh.shrunk(found.flatten(1).split(2), images)
        assert getattr(shrunk, got) == pytest.approx(min(1, max(0, expected)), abs=1e-9)


def test_chance_is_not_believed_and_what_all_images_agree_on_is():
    images, parts = 50, 40
    weigh = Objective(
        curvature=torch.ones(images, dtype=torch.float64),
        slope=torch.ones(images, dtype=torch.float64),
    )
    noise = weigh.shrunk([normal(0, parts, images)], images)
    assert noise.kept_interaction < 0.2
    assert noise.kept_slope < 0.3
    same = weigh.shrunk([normal(1, parts, 1).expand(parts, images)], images)
    assert same.kept_interaction == pytest.approx(1)
    assert same.kept_slope == pytest.approx(1)
    assert weigh.shrunk([normal(2, parts, 1)], 1).kept_interaction == 1, "one image says nothing"


def test_shrunk_interactions_are_what_rises_are_made_of():
    weigh = objective()
    plain = Joint(sites(linear=False), weigh, refresh_fraction=0)
    shrunk = Joint(sites(linear=False), weigh, refresh_fraction=0, shrink_over=4)
    believed = weigh.shrunk([site.responses() for site in sites(linear=False)], 4)
    assert 0 <= believed.kept_interaction < 1
    first = ((NEURONS, (2,)),)
    before = [joint.rises(HEADS).copy() for joint in (plain, shrunk)]
    for joint in (plain, shrunk):
        joint.cut(first)
    moved = [joint.rises(HEADS) - was for joint, was in zip((plain, shrunk), before, strict=True)]
    np.testing.assert_allclose(moved[1], believed.kept_interaction * moved[0], rtol=1e-9)
    np.testing.assert_allclose(
        shrunk.mutual([first, ((HEADS, (0,)),)]),
        believed.kept_interaction * plain.mutual([first, ((HEADS, (0,)),)]),
        rtol=1e-9,
    )
