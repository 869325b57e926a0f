import json
from dataclasses import replace

import numpy as np
import pytest
from nudges import GROUPS, fitted
from tiny import random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.discovery.controls import magnitude_scores
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.masked.fitting import Fitter
from vitcut.masked.masking import full_run, masked_run
from vitcut.masked.oracle import Examples, Oracle
from vitcut.selection.greedy import Alive, by_site
from vitcut.selection.rounds import Selection, geometric, smallest_cost
from vitcut.selection.settings import Budget

WEIGHTS = random_vit(2, num_layers=2, num_heads=3, hidden=6)
PIXELS = random_pixels(WEIGHTS, images=12)


def num_features(circuit: Circuit) -> float:
    """Kept features: 3 for a head of a kind, 1 for a neuron."""
    return 3.0 * circuit.heads_on_path.sum() + circuit.neurons.sum()


def selection(ablation="mean", cost=num_features, **config) -> Selection:
    return Selection(
        WEIGHTS,
        Budget(**config),
        ablation=ablation,
        pixels=PIXELS[:8],
        group_of_class=GROUPS,
        fitter=Fitter(WEIGHTS, lambda: PIXELS, ridge=0.1, memory_gib=64.0),
        cost=cost,
    )


def divergence(circuit: Circuit) -> float:
    images = np.arange(len(PIXELS))
    examples = Examples(pixels=PIXELS, clean=images, corrupted=images, group_of_class=GROUPS)
    ablation = "zero" if circuit.ablation == "zero" else "mean"
    oracle = Oracle(WEIGHTS, examples, ablation, tokens=circuit.graph.tokens)
    return oracle.kl(circuit.kept, circuit.neurons)


@pytest.mark.parametrize("ablation", ["zero", "mean", "linear"])
@pytest.mark.parametrize("tokens", ["all", "split"])
def test_rounds_meet_their_budgets_one_inside_the_other(ablation, tokens):
    found = selection(ablation, tokens=tokens)
    before, start = found.circuit, found.cost()
    for budget in geometric(start, 12, 3):
        found.cut_to(budget)
        circuit = found.circuit
        assert found.cost() == num_features(circuit) <= budget
        assert circuit.ablation == ablation
        assert not (circuit.kept & ~before.kept).any()
        assert not (circuit.neurons & ~before.neurons).any()
        before = circuit
    assert circuit.num_heads_kept > 0
    fill, _ = fitted(WEIGHTS, circuit, PIXELS)
    got = masked_run(WEIGHTS, PIXELS, circuit, fill).logits
    assert got.std(0).max() > 1e-3, "what is left still sees the image"


def num_numbers(circuit: Circuit) -> float:
    """The features of all tokens: a class token, and the patches that are kept."""
    return num_features(circuit) * (1 + 4 * circuit.positions_kept_fraction)


def test_positions_compete_with_heads_and_neurons():
    found = selection("linear", cost=num_numbers)
    start, before = found.cost(), np.ones(4, dtype=bool)
    for budget in geometric(start, start / 8, 3):
        found.cut_to(budget)
        assert found.cost() == num_numbers(found.circuit) <= budget
        kept = before if found.circuit.positions is None else found.circuit.positions
        assert not (kept & ~before).any(), "a position that is gone stays away"
        before = kept
    assert 1 <= before.sum() < 4
    fixed = selection("linear", cost=num_numbers, positions=False)
    fixed.cut_to(start / 2)
    assert fixed.circuit.positions is None


def test_one_position_is_left_whatever_the_budget():
    def num_patches(circuit: Circuit) -> float:
        return 4 * circuit.positions_kept_fraction

    found = selection(cost=num_patches)
    assert found.smallest == 1
    found.cut_to(1)
    assert found.circuit.positions.sum() == 1


@pytest.mark.parametrize(
    "config",
    [
        {"ablation": "linear", "cost": num_numbers},
        {"ablation": "mean"},
        {"ablation": "linear"},
        {"ablation": "linear", "refresh_fraction": 0.0},
        {"ablation": "linear", "refresh_fraction": 1.0},
        {"ablation": "mean", "joint": False},
        {"ablation": "mean", "scores": "random", "joint": False, "seed": 3},
        {"ablation": "mean", "scores": "magnitude", "joint": False},
    ],
    ids=lambda config: json.dumps(config, default=lambda cost: cost.__name__),
)
def test_a_resumed_selection_goes_on_as_the_one_that_was_interrupted(config, tmp_path):
    first, again = selection(**config), selection(**config)
    budget = first.cost()
    first.cut_to(0.7 * budget)
    again.cut_to(0.7 * budget)
    assert first.circuit == again.circuit
    first.circuit.save(tmp_path / "circuit.json")
    first.cut_to(0.5 * budget)
    resumed = selection(**config)
    resumed.resume(Circuit.load(tmp_path / "circuit.json"))
    assert resumed.circuit == again.circuit
    resumed.cut_to(0.5 * budget)
    assert resumed.circuit == first.circuit


def test_random_scores_choose_by_their_seed():
    config = {"scores": "random", "joint": False}
    one, other = (selection(seed=seed, **config) for seed in (1, 2))
    one.cut_to(25)
    other.cut_to(25)
    assert one.circuit != other.circuit


def test_fisher_scores_cost_less_divergence_than_the_controls():
    found = selection()
    found.cut_to(27)
    rivals = []
    for seed in range(5):
        rival = selection(scores="random", joint=False, seed=seed)
        rival.cut_to(27)
        rivals.append(divergence(rival.circuit))
    assert divergence(found.circuit) < 0.7 * np.median(rivals)


def test_a_budget_below_the_smallest_model_is_refused_and_cuts_nothing():
    found = selection()
    before = found.circuit
    assert found.smallest == 3
    with pytest.raises(CircuitError, match="the smallest model that still sees the image costs 3"):
        found.cut_to(2.9)
    assert found.circuit == before


def test_the_smallest_budget_leaves_one_head():
    found = selection(scores="random", joint=False)
    found.cut_to(found.smallest)
    assert found.cost() == found.smallest
    assert found.circuit.num_heads_kept == 1


def test_a_round_that_fails_changes_nothing():
    def stuck(circuit):
        """Nothing can be saved, but the smallest model is cheap."""
        return 1.0 if circuit.neurons.sum() == 0 and circuit.num_heads_kept == 1 else 9.0

    found = selection(cost=stuck)
    before = found.circuit
    with pytest.raises(CircuitError, match=r"the budget of 5 cannot be met.*9 is left"):
        found.cut_to(5)
    assert found.circuit == before


def test_a_budget_that_is_met_already_changes_nothing():
    found = selection()
    before = found.circuit
    found.cut_to(found.cost())
    assert found.circuit == before


def test_the_model_is_left_as_it_was():
    before = full_run(WEIGHTS, PIXELS).logits
    found = selection("linear")
    found.cut_to(20)
    assert (full_run(WEIGHTS, PIXELS).logits == before).all()


@pytest.mark.parametrize("tokens", ["all", "split"])
def test_a_circuit_of_another_graph_is_not_resumed(tokens):
    found = selection(tokens=tokens)
    other = selection(tokens="all" if tokens == "split" else "split").circuit
    for circuit in (
        other,
        Circuit.full(Graph(num_layers=3, num_heads=3)),
        replace(found.circuit, neurons=found.circuit.neurons[..., :4]),
        replace(found.circuit, positions=np.array([True, False])),
    ):
        with pytest.raises(CircuitError, match="than this selection of 2 blocks"):
            found.resume(circuit)


def test_what_reaches_nothing_is_cut_from_the_start():
    circuit = selection().circuit
    assert circuit.heads_on_path.sum() == 9
    assert circuit.neurons.sum() == 18
    alive = Alive.useful(WEIGHTS.split_graph, 6)
    np.testing.assert_array_equal(alive.heads, circuit.heads_on_path)


def test_the_smallest_cost_is_that_of_the_cheapest_single_head():
    def cost(circuit):
        heads = circuit.heads_on_path
        assert heads.sum() == 1
        assert circuit.neurons.sum() == 0
        return 5.0 + float(heads[0].any())

    assert smallest_cost(WEIGHTS.split_graph, 6, cost) == 5
    assert smallest_cost(WEIGHTS.graph, 6, cost) == 5


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_model_that_reads_patches_sees_the_image_with_everything_cut(num_read):
    features = {"num_read": num_read, "patch_readout": "mean"}

    def cost(circuit):
        assert circuit.heads_on_path.sum() == circuit.neurons.sum() == 0
        return 3.0

    assert smallest_cost(random_vit(**features).split_graph, 6, cost) == 3


def test_scores_by_site_are_the_scores_by_part():
    graph = WEIGHTS.split_graph
    scores = magnitude_scores(WEIGHTS, graph)
    found = by_site(scores.heads, scores.neurons)
    assert len(found) == 8
    alive = Alive.useful(graph, 6)
    for (layer, parts, kind), values in found.items():
        table = scores.heads[layer, :, kind] if parts == "heads" else scores.neurons[layer, kind]
        np.testing.assert_array_equal(values, table)
        assert len(values) == len(alive.at((layer, parts, kind)))


def test_geometric_budgets_fall_by_equal_ratios_and_end_exactly():
    budgets = list(geometric(1000.0, 10.0, 4))
    ratios = np.array([*budgets]) / np.array([1000.0, *budgets[:-1]])
    np.testing.assert_allclose(ratios, 100**-0.25)
    assert budgets[-1] == pytest.approx(10.0, rel=1e-15)
    assert list(geometric(8.0, 2.0, 1)) == [2.0]
