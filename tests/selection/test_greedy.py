import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_vit

from vitcut.circuit import Circuit
from vitcut.compact.operations import count_macs
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.selection.greedy import Additive, Alive, Savings, cut_down

GRAPH = Graph(num_layers=2, num_heads=2, kinds=("cls", "patch"), readout=("cls",))
WHOLE = Graph(num_layers=2, num_heads=2)
NEURONS = 4


def scores(heads: float = 1.0, neurons: float = 1.0, graph: Graph = GRAPH, **special):
    """Equal scores but for some parts: ``heads_0_1_1=5.0`` is block 0, kind 1, head 1."""
    found = {}
    for layer in range(graph.num_layers):
        for kind in range(graph.num_kinds):
            found[layer, "heads", kind] = np.full(graph.num_heads, heads)
            found[layer, "neurons", kind] = np.full(NEURONS, neurons)
    for name, value in special.items():
        parts, layer, kind, part = name.split("_")
        found[int(layer), parts, int(kind)][int(part)] = value
    return found


def count_parts(circuit: Circuit) -> float:
    """A head of a kind 3, a neuron 1."""
    return 3.0 * num_heads(circuit).sum() + circuit.neurons.sum()


def num_heads(circuit: Circuit):
    graph = circuit.graph
    shape = (graph.num_layers, graph.num_heads + 1, graph.num_kinds)
    return circuit.kept[graph.num_kinds :].any(1).reshape(shape)[:, :-1]


def with_readers(circuit: Circuit) -> float:
    """Keys and values cost 10 and go with a head's last kind; queries cost 1 per kind."""
    heads = circuit.heads_on_path
    return 10.0 * heads.any(2).sum() + heads.sum() + circuit.neurons.sum()


def everything(graph: Graph = GRAPH) -> Alive:
    return Alive.useful(graph, NEURONS)


def cut(budget, scorer, cost=count_parts, graph: Graph = GRAPH) -> Alive:
    alive = everything(graph)
    for left in cut_down(graph, alive, scorer, cost, budget=budget):
        assert left == pytest.approx(cost(alive.circuit(graph, "mean")))
    return alive


def test_useful_parts_leave_out_what_reaches_nothing():
    alive = everything()
    assert not alive.heads[1, :, 1].any()
    assert not alive.neurons[1, 1].any()
    assert alive.heads.sum() == 6
    assert alive.neurons.sum() == 12
    assert everything(WHOLE).heads.all()


def test_cutting_a_copy_leaves_the_original():
    alive = everything()
    candidate = (((0, "heads", 1), (0,)), ((0, "neurons", 0), (1, 3)))
    other = alive.without(candidate)
    assert alive.left((0, "neurons", 0)) == (0, 1, 2, 3)
    assert other.left((0, "neurons", 0)) == (0, 2)
    assert other.left((0, "heads", 1)) == (1,)
    circuit = other.circuit(GRAPH, "mean")
    assert circuit.neurons.sum() == 10
    np.testing.assert_array_equal(num_heads(circuit), other.heads)


@given(st.integers(3, 30), st.integers(0, 100), st.sampled_from([GRAPH, WHOLE]))
def test_the_cost_is_within_the_budget_and_no_more_is_cut_than_needed(budget, seed, graph):
    random = np.random.default_rng(seed)
    found = {site: random.random(len(values)) for site, values in scores(graph=graph).items()}
    alive = everything(graph)
    costs = list(cut_down(graph, alive, Additive(found), count_parts, budget=budget))
    cost = count_parts(alive.circuit(graph, "mean"))
    assert cost <= budget
    if costs:
        assert costs == sorted(costs, reverse=True)
        assert ([24.0 if graph is WHOLE else 30.0, *costs])[-2] > budget


def test_a_budget_that_is_met_already_cuts_nothing():
    alive = everything()
    assert list(cut_down(GRAPH, alive, Additive(scores()), count_parts, budget=30)) == []
    assert alive.heads.sum() == 6


def test_the_budget_holds_under_the_ablation_of_the_cut():
    def joined_is_dearer(circuit: Circuit) -> float:
        return count_parts(circuit) + 2 * (circuit.ablation == "mean")

    alive = everything()
    for _ in cut_down(
        GRAPH, alive, Additive(scores()), joined_is_dearer, budget=20, ablation="mean"
    ):
        pass
    assert joined_is_dearer(alive.circuit(GRAPH, "mean")) <= 20


def test_the_cheapest_per_saving_goes_first():
    # A head saves 3: 0.5 per unit; neurons 1.
    alive = cut(27, Additive(scores(heads=9.0, heads_0_1_1=1.5)))
    assert alive.left((0, "heads", 1)) == (0,)
    assert alive.neurons.sum() == 12
    alive = cut(28, Additive(scores(heads=9.0, neurons_1_0_2=0.1, neurons_0_0_0=0.2)))
    assert alive.left((1, "neurons", 0)) == (0, 1, 3)
    assert alive.left((0, "neurons", 0)) == (1, 2, 3)


def test_what_saves_nothing_is_not_cut_even_if_it_costs_nothing():
    def heads_alone(circuit):
        return float(num_heads(circuit).sum())

    alive = cut(5, Additive(scores(heads=1.0, neurons=0.0)), heads_alone)
    assert alive.neurons.sum() == 12


def test_keys_and_values_go_with_their_last_reader_and_the_pair_is_seen():
    # Alone a kind of one of block 0's heads saves 1; both kinds of it together save 12.
    dear = {f"heads_1_0_{head}": 99.0 for head in range(2)}
    alive = cut(58.0 - 12, Additive(scores(heads=1.0, neurons=2.0, **dear)), with_readers)
    assert sorted(alive.heads[0].sum(1).tolist()) == [0, 2]
    assert alive.heads[1, :, 0].all()
    assert alive.neurons.sum() == 12


def test_a_whole_site_goes_where_only_that_saves():
    def per_mlp(circuit):
        return 10.0 * circuit.neurons.any(2).sum()

    alive = cut(20, Additive(scores(neurons_0_1_0=0.5)), per_mlp)
    assert alive.left((0, "neurons", 1)) == ()
    assert alive.neurons.sum() == 8


def test_a_whole_block_of_a_group_goes_where_only_that_saves():
    def per_block(circuit):
        heads = num_heads(circuit).any(1)
        return 10.0 * (heads | circuit.neurons.any(2)).sum()

    alive = cut(20, Additive(scores(heads_0_1_0=0.5)), per_block)
    assert alive.left((0, "heads", 1)) == alive.left((0, "neurons", 1)) == ()


def test_what_comes_to_reach_nothing_is_cut_with_its_last_reader():
    # The last block's heads are all that reads block 0's patches.
    alive = everything()
    cheap = {f"heads_1_0_{head}": 0.01 for head in range(2)}
    costs = cut_down(GRAPH, alive, Additive(scores(**cheap)), count_parts, budget=25)
    assert list(costs) == [27.0, 14.0]
    assert not alive.heads[0, :, 1].any()
    assert not alive.neurons[0, 1].any()


def test_the_last_head_that_sees_the_image_stays():
    for graph in (GRAPH, WHOLE):
        alive = cut(3, Additive(scores(heads=0.01, graph=graph)), graph=graph)
        assert alive.heads[:, :, 0].sum() == 1
        alive = everything(graph)
        cuts = cut_down(graph, alive, Additive(scores(graph=graph)), count_parts, budget=2.5)
        with pytest.raises(CircuitError, match=r"the budget of 2\.5 cannot be met.*, 3 is left"):
            list(cuts)
        assert alive.heads[:, :, 0].sum() == 1


def test_all_heads_may_go_where_the_classifier_reads_patches():
    graph = Graph(num_layers=2, num_heads=2, kinds=("patch",), readout=("patch",))
    alive = cut(0, Additive(scores(graph=graph)), graph=graph)
    assert not alive.heads.any()


class Changing(Additive):
    """Turns the cheapest part into the dearest when it is about to be cut."""

    def __init__(self, found) -> None:
        super().__init__(found)
        self.found, self.stale, self.settled = found, {(0, "neurons", 1)}, []

    def settle(self, site):
        self.settled.append(site)
        if site not in self.stale:
            return False
        self.stale.remove(site)
        self.found[site][0] = 100.0
        return True


def test_a_site_is_brought_up_to_date_before_it_is_cut():
    scorer = Changing(scores(heads=9.0, neurons_0_1_0=0.1, neurons_1_0_1=0.2))
    alive = cut(29, scorer)
    assert alive.left((0, "neurons", 1)) == (0, 1, 2, 3)
    assert alive.left((1, "neurons", 0)) == (0, 2, 3)
    assert scorer.settled == [(0, "neurons", 1), (1, "neurons", 0)]


WEIGHTS = random_vit(num_layers=3, num_heads=2, hidden=2)


def macs(circuit: Circuit) -> float:
    return count_macs(plan_circuit(WEIGHTS.shape, circuit))


@pytest.mark.parametrize("cost", [count_parts, with_readers])
@given(st.integers(0, 10**6), st.sampled_from(["all", "split"]))
@settings(max_examples=15)
def test_the_predicted_total_is_always_the_measured_cost(cost, seed, tokens):
    assert_savings_follow(cost, seed, tokens)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_predicted_total_is_always_the_counted_macs(seed):
    assert_savings_follow(macs, seed, "split")


def assert_savings_follow(cost, seed: int, tokens: str) -> None:
    """Random cuts down to one head, each compared with the measured cost."""
    random, graph = np.random.default_rng(seed), WEIGHTS.graph_of(tokens)
    alive = Alive.useful(graph, 2)
    savings = Savings(graph, cost, alive)
    sites = [
        (layer, parts, kind)
        for layer in range(3)
        for parts in ("heads", "neurons")
        for kind in range(graph.num_kinds)
    ]
    while alive.heads.sum() > 1:
        open_sites = [site for site in sites if alive.left(site)]
        for site in open_sites:
            if site[1] == "neurons":
                savings.of_one(site)
            savings.of(((site, alive.left(site)[-1:]),))
            savings.of(((site, alive.left(site)),))
        site = open_sites[random.integers(len(open_sites))]
        left = alive.left(site)
        candidate = ((site, left if random.random() < 0.2 else (int(random.choice(left)),)),)
        before, saved = savings.total, savings.of(candidate)
        alive.cut(candidate)
        if not alive.left(site):
            alive.keep_live(alive.circuit(graph, "mean"))
        savings.cut(candidate)
        exact = cost(alive.circuit(graph, "linear"))
        assert savings.total == pytest.approx(exact)
        if alive.left(site):
            assert before - saved == pytest.approx(exact)


def test_known_savings_are_those_of_now():
    alive = everything()
    savings = Savings(GRAPH, with_readers, alive)
    reader = (((0, "heads", 0), (1,)),)
    assert savings.of(reader) == 1
    other = (((0, "heads", 1), (1,)),)
    alive.cut(other)
    savings.cut(other)
    assert savings.of(reader) == 11


def test_savings_of_whole_sites_do_not_pile_up():
    alive = everything()
    savings, site = Savings(GRAPH, count_parts, alive), (0, "neurons", 0)
    for neuron in (0, 1, 2):
        assert savings.of(((site, alive.left(site)),)) == 4 - neuron
        assert savings.of_one(site) == 1
        alive.cut(((site, (neuron,)),))
        savings.cut(((site, (neuron,)),))
    assert [item for item in savings._known if site in dict(item)] == [((site, (3,)),)]


def with_whole_mlps(circuit: Circuit) -> float:
    """An MLP costs 10 besides, as long as it has a neuron."""
    return count_parts(circuit) + 10.0 * circuit.neurons.any(2).sum()


def test_the_last_neuron_saves_what_goes_with_it():
    alive, site = everything(), (0, "neurons", 0)
    savings = Savings(GRAPH, with_whole_mlps, alive)
    saved = []
    for neuron in range(NEURONS):
        saved.append(savings.of_one(site))
        alive.cut(((site, (neuron,)),))
        savings.cut(((site, (neuron,)),))
        assert savings.total == with_whole_mlps(alive.circuit(GRAPH, "linear"))
    assert saved == [1, 1, 1, 11]


def test_savings_are_taken_anew_once_positions_are_cut():
    def on_patches(circuit: Circuit) -> float:
        return count_parts(circuit) * (1 + 4 * circuit.positions_kept_fraction)

    alive = Alive.useful(GRAPH, NEURONS, 4)
    savings, site = Savings(GRAPH, on_patches, alive), (0, "positions", 1)
    neuron = ((0, "neurons", 0), (0,))
    assert savings.of_one(site) == 30
    assert savings.of((neuron,)) == 5
    candidate = ((site, (2,)),)
    alive.cut(candidate)
    savings.cut(candidate)
    assert savings.total == 120
    savings.settle()
    assert savings.of((neuron,)) == 4
    assert alive.left(site) == (0, 1, 3)


def test_a_neuron_that_nobody_asked_about_is_measured():
    alive = everything()
    savings = Savings(GRAPH, count_parts, alive)
    candidate = (((0, "neurons", 0), (2,)),)
    alive.cut(candidate)
    savings.cut(candidate)
    assert savings.total == 29


class Quadratic:
    """Rises that interact: the squared length of the sum of fixed vectors."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.vectors = {
            site: random.normal(size=(len(values), 6)) + 0.5 for site, values in scores().items()
        }
        self.chosen = np.zeros(6)

    def of(self, candidate):
        return sum(self.vectors[site][list(parts)].sum(0) for site, parts in candidate)

    def rises(self, site):
        vectors = self.vectors[site]
        return (vectors**2).sum(1) + 2 * vectors @ self.chosen

    def rise(self, candidate):
        found = self.of(candidate)
        return float(found @ found + 2 * found @ self.chosen)

    def mutual(self, candidates):
        found = np.stack([self.of(candidate) for candidate in candidates])
        return 2 * found @ found.T

    def cut(self, candidate):
        self.chosen = self.chosen + self.of(candidate)

    def settle(self, site):
        return False


@pytest.mark.parametrize("seed", range(8))
def test_blocks_know_what_their_parts_cost_together(seed):
    lengths = []
    for block in (1, 8):
        alive, scorer = everything(), Quadratic(seed)
        list(cut_down(GRAPH, alive, scorer, count_parts, budget=12, block=block))
        lengths.append(float(scorer.chosen @ scorer.chosen))
    # Not the same parts, where something outside became cheaper meanwhile, but hardly dearer ones.
    assert lengths[1] <= 1.25 * lengths[0]


def test_a_block_ends_where_a_part_outside_is_cheaper():
    scorer = Quadratic(0)
    for vectors in scorer.vectors.values():
        vectors[:] = 0
        vectors[:, 0] = 20
    # Neurons 0 and 1 are alike: once one is cut, cutting the other too is dearer than neuron 2.
    scorer.vectors[0, "neurons", 1][:3, :2] = [[1, 0], [1.05, 0], [0, 1.4]]
    alive, first = everything(), count_parts(everything().circuit(GRAPH, "mean"))
    list(cut_down(GRAPH, alive, scorer, count_parts, budget=first - 2, block=2))
    assert alive.left((0, "neurons", 1)) == (1, 3)
