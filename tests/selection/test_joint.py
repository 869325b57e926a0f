import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nudges import GROUPS, Nudged, alive_of, circuit_of, fitted, random_parts
from tiny import random_pixels, random_vit

from vitcut.errors import ModelError
from vitcut.selection.greedy import Additive, Alive, cut_down
from vitcut.selection.joint import Joint
from vitcut.selection.sites import Objective, Site, trace_sites

RESPONSES = 3 * 4
"""Of three classes and four images."""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(seed: int = 0) -> Objective:
    p, q = (normal(seed + n, 3, 4).softmax(0).flatten() for n in (0, 1))
    return Objective(curvature=q / 8, slope=-p / 4)


def a_site(place, parts: int, *, linear: bool, seed: int) -> Site:
    size = 2 if place[1] == "heads" else 1
    mixing = normal(seed, parts * size, parts * size)
    return Site(
        place,
        torch.ones(parts, dtype=torch.bool),
        normal(seed + 1, 4, 2, parts * size),
        normal(seed + 2, 3, 4, 2, parts * size),
        normal(seed + 3, 2, parts * size),
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
    alone = {site.parts: site.responses() for site in sites(linear=linear)}
    chosen = torch.zeros(RESPONSES, dtype=torch.float64)
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
                curvature=torch.full((RESPONSES,), np.nan, dtype=torch.float64),
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
    found, weigh = trace_sites(
        weights, pixels, GROUPS, (circuit, fill), alive=alive, statistics=statistics
    )
    return Joint(found, weigh, refresh_fraction=fraction), Alive(heads=alive[0], neurons=alive[1])


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
    found, weigh = trace_sites(
        weights, pixels, GROUPS, (circuit, fill), alive=alive, statistics=statistics
    )
    for site in found:
        part = int(torch.nonzero(site.alive)[0])
        slope = float(site.responses()[part] @ weigh.slope)
        place = (site.layer, site.parts, site.kind)
        nudged = Nudged(weights, circuit, fill, statistics, {place: [part]})
        exact = (nudged.kl(pixels, eps) - nudged.kl(pixels, -eps)) / (2 * eps)
        assert exact == pytest.approx(slope, rel=1e-4, abs=1e-9)
