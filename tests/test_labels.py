import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcut.errors import TaskError
from vitcut.labels import Labels

CATS = Labels(
    owner="the data",
    ids=("n1", "n2", "7", "n4", "n5"),
    names=("tabby, tabby cat", "Persian cat", "seven", "crane", "crane"),
)


@pytest.mark.parametrize(
    ("written", "position"),
    [
        ("n2", 1),
        ("7", 2),  # An id goes before a position.
        ("4", 4),
        ("tabby", 0),
        ("Tabby Cat", 0),
        ("TABBY, tabby  CAT", 0),
        ("persian_cat", 1),
        ("N2", None),
        ("5", None),
        ("04", None),
        ("-1", None),
        ("cat", None),
        ("", None),
    ],
)
def test_a_class_is_found_by_id_then_position_then_name(written, position):
    assert CATS.find(written) == position


def test_a_name_of_several_classes_is_refused_with_their_ids():
    with pytest.raises(TaskError, match=r"'Crane' is the name of 2 classes .*: n4 \(crane"):
        CATS.find("Crane")


def test_what_looks_like_a_name_or_an_id_is_suggested_as_it_is_written():
    assert CATS.nearest("tabbby")[0] == "tabby"
    assert CATS.nearest("persian")[0] == "Persian cat"
    assert CATS.nearest("n11") == ["n1"]
    assert CATS.nearest("zebra crossing") == []


def test_as_many_names_as_ids_are_expected():
    with pytest.raises(TaskError, match="2 class ids and 1 names"):
        Labels(owner="the data", ids=("a", "b"), names=("a",))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=9, unique=True))
def test_every_id_means_its_own_class_whatever_it_looks_like(ids):
    labels = Labels(owner="the data", ids=tuple(ids), names=tuple(reversed(ids)))
    assert [labels.find(item) for item in ids] == list(range(len(ids)))
