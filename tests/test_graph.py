import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcut.errors import CircuitError
from vitcut.graph import Graph
from vitcut.names import LETTERS

SPLIT = Graph(num_layers=6, num_heads=8, kinds=("cls", "patch"), readout=("cls",))

plain = st.builds(Graph, num_layers=st.integers(1, 5), num_heads=st.integers(1, 5))
splits = st.builds(
    Graph,
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    kinds=st.just(("cls", "register", "patch")),
    readout=st.sampled_from([("cls",), ("patch",), ("cls", "patch")]),
)
graphs = plain | splits


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


def test_a_split_graph_has_the_published_counts():
    assert SPLIT.num_edges == 7201
    assert SPLIT.num_edges - SPLIT.num_useful_edges == 422
    assert SPLIT.unsplit.num_useful_edges == SPLIT.unsplit.num_edges == 3628


@given(graphs)
def test_names_are_unique_and_tell_the_numbers(graph):
    sources = [source.name for source in graph.sources]
    targets = [target.name for target in graph.targets]
    assert len(graph.source_numbers) == len(sources)
    assert len(graph.target_numbers) == len(targets)
    assert [graph.source_numbers[name] for name in sources] == list(range(len(sources)))
    assert [graph.target_numbers[name] for name in targets] == list(range(len(targets)))

    for kind in range(graph.num_kinds):
        suffix = f".{graph.kinds[kind]}" if graph.kinds else ""
        assert sources[kind] == f"embed{suffix}"
        for layer in range(graph.num_layers):
            mlp = f"mlp.{layer}{suffix}"
            assert sources[graph.mlp_source(layer, kind)] == mlp
            assert targets[graph.mlp_target(layer, kind)] == mlp
            for head in range(graph.num_heads):
                name = f"attn.{layer}.{head}"
                assert sources[graph.head_source(layer, head, kind)] == f"{name}{suffix}"
                for letter in LETTERS:
                    number = graph.head_target(layer, head, letter, kind)
                    assert targets[number] == f"{name}.{letter}{suffix}"
                    assert graph.letter_targets(layer, letter, kind)[head] == number

    read_out = [f"classifier.{kind}" for kind in graph.readout] or ["classifier"]
    assert [targets[number] for number in graph.classifiers] == read_out
    assert graph.classifier == graph.classifiers[0]


@given(graphs)
def test_targets_of_the_unsplit_graph_are_found_by_kind(graph):
    whole = graph.unsplit.targets
    for kind in range(graph.num_kinds):
        suffix = f".{graph.kinds[kind]}" if graph.kinds else ""
        for number, target in enumerate(whole):
            expected = graph.target_numbers.get(target.name + suffix)
            assert graph.target_of_kind(number, kind) == expected


@given(graphs)
def test_sources_of_and_targets_of_are_inverse(graph):
    for source in range(len(graph.sources)):
        assert all(source in graph.sources_of(target) for target in graph.targets_of(source))
    for target in range(len(graph.targets)):
        assert all(target in graph.targets_of(source) for source in graph.sources_of(target))
    assert all(graph.targets_of(source) == () for source in range(graph.num_kinds))
    assert all(graph.sources_of(target) == () for target in graph.classifiers)


@given(graphs)
def test_queries_feed_their_own_kind_keys_and_values_all_kinds(graph):
    for number, target in enumerate(graph.targets):
        fed = [graph.sources[source].kind for source in graph.sources_of(number)]
        kinds = (graph.kinds or [None]) if target.role in {"k", "v"} else [target.kind]
        assert fed == ([] if target.role == "classifier" else [*kinds])


@given(graphs)
def test_a_target_reads_exactly_the_sources_of_its_kind_written_before_it(graph):
    """Attention of a block is read, then written; then its MLP; then the next block."""

    def written(source):
        return (source.layer, {"embed": 1, "head": 0, "mlp": 1}[source.role])

    def read(target):
        return (target.layer, 1 if target.role == "mlp" else 0)

    expected = [
        [written(s) < read(t) and s.kind == t.kind for t in graph.targets] for s in graph.sources
    ]
    np.testing.assert_array_equal(graph.edges, expected)
    assert graph.num_edges == np.sum(expected)
    for target in range(len(graph.targets)):
        assert list(graph.readable(target)) == list(np.flatnonzero(graph.edges[:, target]))


@given(splits)
def test_the_edges_of_a_kind_are_those_of_the_unsplit_graph(graph):
    whole = graph.unsplit
    for kind, name in enumerate(graph.kinds):
        expected = whole.edges.copy()
        expected[:, whole.classifier] &= name in graph.readout
        np.testing.assert_array_equal(graph.of_kind(graph.edges, kind), expected)


def test_edges_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        Graph(num_layers=1, num_heads=1).edges[0, 0] = False


def test_what_is_structurally_dead_is_what_only_the_last_blocks_patches_read():
    dead = np.flatnonzero((SPLIT.edges & ~SPLIT.useful_edges).any(axis=0))
    names = {SPLIT.targets[target].name for target in dead}
    assert names == {f"attn.5.{head}.q.patch" for head in range(8)} | {"mlp.5.patch"}


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


def test_acdc_visits_the_kinds_of_a_target_in_their_order():
    order = [SPLIT.targets[target].name for target in SPLIT.backward_order()]
    assert order[:4] == ["classifier.cls", "mlp.5.cls", "mlp.5.patch", "attn.5.7.v.cls"]


@pytest.mark.parametrize(("num_layers", "num_heads"), [(0, 1), (1, 0), (-1, 4)])
def test_a_graph_without_blocks_or_heads_is_refused(num_layers, num_heads):
    with pytest.raises(CircuitError, match="at least 1 block and 1 head"):
        Graph(num_layers=num_layers, num_heads=num_heads)


@pytest.mark.parametrize(
    ("kinds", "readout", "message"),
    [
        (("patch", "cls"), ("cls",), "in this order"),
        (("cls", "cls"), ("cls",), "must be distinct kinds from cls, register, patch"),
        (("patch",), ("cls",), "readout must be distinct kinds from patch"),
        (("cls", "patch"), (), "both be empty"),
    ],
)
def test_impossible_kinds_are_refused(kinds, readout, message):
    with pytest.raises(CircuitError, match=message):
        Graph(num_layers=1, num_heads=1, kinds=kinds, readout=readout)
