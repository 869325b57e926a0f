from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.names import LETTERS

graphs = st.builds(Graph, num_layers=st.integers(1, 5), num_heads=st.integers(1, 5))


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "counts"),
    [
        pytest.param(6, 8, (55, 151, 3_628), id="reference"),
        pytest.param(12, 12, (157, 445, 32_491), id="ViT-B/16"),
        pytest.param(12, 3, (49, 121, 2_845), id="DeiT-Ti"),
    ],
)
def test_the_graph_has_the_published_counts(num_layers, num_heads, counts):
    graph = Graph(num_layers=num_layers, num_heads=num_heads)
    assert (len(graph.sources), len(graph.targets), graph.num_edges) == counts


@given(graphs)
def test_numbers_follow_from_names_and_places(graph):
    sources = [source.name for source in graph.sources]
    targets = [target.name for target in graph.targets]
    assert len(set(sources)) == len(sources)
    assert len(set(targets)) == len(targets)
    assert graph.source_numbers == {name: i for i, name in enumerate(sources)}
    assert graph.target_numbers == {name: i for i, name in enumerate(targets)}
    assert targets[graph.classifier] == "classifier"
    for layer in range(graph.num_layers):
        assert sources[graph.mlp_source(layer)] == f"mlp.{layer}"
        assert targets[graph.mlp_target(layer)] == f"mlp.{layer}"
        for head in range(graph.num_heads):
            assert sources[graph.head_source(layer, head)] == f"attn.{layer}.{head}"
            for letter in ("q", "k", "v"):
                number = graph.head_target(layer, head, letter)
                assert targets[number] == f"attn.{layer}.{head}.{letter}"
                assert graph.letter_targets(layer, letter)[head] == number


@given(graphs)
def test_source_of_and_targets_of_are_inverse(graph):
    for source in range(len(graph.sources)):
        assert all(source in graph.sources_of(target) for target in graph.targets_of(source))
    for target in range(graph.classifier):
        assert all(target in graph.targets_of(source) for source in graph.sources_of(target))
    assert graph.targets_of(0) == ()


def test_the_classifier_feeds_no_source():
    graph = Graph(num_layers=1, num_heads=1)
    assert graph.sources_of(graph.classifier) == ()


@given(graphs)
def test_a_target_reads_exactly_the_sources_written_before_it(graph):
    """Attention of a block is read, then written; then its MLP; then the next block."""

    def written(source):
        return (source.layer, {"embed": 1, "head": 0, "mlp": 1}[source.role])

    def read(target):
        return (target.layer, 1 if target.role == "mlp" else 0)

    expected = [[written(s) < read(t) for t in graph.targets] for s in graph.sources]
    np.testing.assert_array_equal(graph.edges, expected)
    assert graph.num_edges == np.sum(expected)
    for target in range(len(graph.targets)):
        assert len(graph.readable(target)) == graph.edges[:, target].sum()


def test_edges_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        Graph(num_layers=1, num_heads=1).edges[0, 0] = False


@given(graphs)
def test_backward_order_visits_every_target_once(graph):
    assert sorted(graph.backward_order()) == list(range(len(graph.targets)))


def test_backward_order_is_that_of_acdc():
    graph = Graph(num_layers=2, num_heads=2)
    assert [graph.targets[number].name for number in graph.backward_order()] == [
        "classifier",
        *("mlp.1", "attn.1.1.v", "attn.1.0.v", "attn.1.1.k", "attn.1.0.k"),
        *("attn.1.1.q", "attn.1.0.q"),
        *("mlp.0", "attn.0.1.v", "attn.0.0.v", "attn.0.1.k", "attn.0.0.k"),
        *("attn.0.1.q", "attn.0.0.q"),
    ]


@pytest.mark.parametrize(("num_layers", "num_heads"), [(0, 1), (1, 0), (-1, 4)])
def test_a_graph_without_blocks_or_heads_is_refused(num_layers, num_heads):
    with pytest.raises(CircuitError, match="at least 1 block and 1 head"):
        Graph(num_layers=num_layers, num_heads=num_heads)


SPLIT = Graph(num_layers=6, num_heads=8, kinds=("cls", "patch"), readout=("cls",))


def test_a_split_graph_has_the_published_counts():
    assert SPLIT.num_edges == 7201
    assert SPLIT.num_edges - SPLIT.num_useful_edges == 422
    assert SPLIT.unsplit.num_useful_edges == SPLIT.unsplit.num_edges == 3628


def test_what_is_structurally_dead_is_what_only_the_last_blocks_patches_read():
    dead = np.flatnonzero((SPLIT.edges & ~SPLIT.useful_edges).any(axis=0))
    names = {SPLIT.targets[target].name for target in dead}
    assert names == {f"attn.5.{head}.q.patch" for head in range(8)} | {"mlp.5.patch"}


splits = st.builds(
    Graph,
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    kinds=st.just(("cls", "register", "patch")),
    readout=st.sampled_from([("cls",), ("patch",), ("cls", "patch")]),
)


@given(splits)
def test_edges_join_parts_of_one_group_in_the_order_of_the_unsplit_graph(graph):
    whole = graph.unsplit
    for kind, name in enumerate(graph.kinds):
        expected = whole.edges.copy()
        expected[:, whole.classifier] &= name in graph.readout
        np.testing.assert_array_equal(graph.of_kind(graph.edges, kind), expected)
    pairs = np.argwhere(graph.edges)
    assert all(graph.sources[s].kind == graph.targets[t].kind for s, t in pairs)


@given(splits)
def test_queries_feed_their_own_group_keys_and_values_all(graph):
    for number, target in enumerate(graph.targets):
        fed = [graph.sources[source] for source in graph.sources_of(number)]
        everyone = target.role in {"k", "v"}
        kinds = graph.kinds if everyone else [target.kind]
        assert [item.kind for item in fed] == ([] if target.role == "classifier" else [*kinds])
        assert all(number in graph.targets_of(s) for s in graph.sources_of(number))
    for number in range(len(graph.sources)):
        assert all(number in graph.sources_of(target) for target in graph.targets_of(number))


@given(splits)
def test_split_names_tell_the_numbers(graph):
    for layer, kind in product(range(graph.num_layers), range(graph.num_kinds)):
        suffix = graph.kinds[kind]
        assert graph.source_numbers[f"mlp.{layer}.{suffix}"] == graph.mlp_source(layer, kind)
        assert graph.target_numbers[f"mlp.{layer}.{suffix}"] == graph.mlp_target(layer, kind)
        name = f"attn.{layer}.0"
        assert graph.source_numbers[f"{name}.{suffix}"] == graph.head_source(layer, 0, kind)
        for letter in LETTERS:
            number = graph.head_target(layer, 0, letter, kind)
            assert graph.target_numbers[f"{name}.{letter}.{suffix}"] == number
    assert [graph.targets[t].kind for t in graph.classifiers] == list(graph.readout)


def test_acdc_visits_a_targets_groups_in_their_order():
    order = [SPLIT.targets[target].name for target in SPLIT.backward_order()]
    assert order[:4] == ["classifier.cls", "mlp.5.cls", "mlp.5.patch", "attn.5.7.v.cls"]
    assert sorted(order) == sorted(SPLIT.target_numbers)


@pytest.mark.parametrize(
    ("kinds", "readout", "message"),
    [
        (("patch", "cls"), ("cls",), "in this order"),
        (("cls", "cls"), ("cls",), "must be distinct kinds from cls, register, patch"),
        (("patch",), ("cls",), "readout must be distinct kinds from patch"),
        (("cls", "patch"), (), "both be empty"),
    ],
)
def test_impossible_groups_are_refused(kinds, readout, message):
    with pytest.raises(CircuitError, match=message):
        Graph(num_layers=1, num_heads=1, kinds=kinds, readout=readout)
