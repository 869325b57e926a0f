import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data import ImageNetInfo

from vitcut.errors import ConfigError, TaskError
from vitcut.task import load_task
from vitcut.wordnet import imagenet_names, suggest_groups, synsets


def test_the_table_has_imagenets_classes_in_the_order_of_its_logits():
    info = ImageNetInfo()
    ids = [str(info.index_to_label_name(at)) for at in range(1000)]
    assert list(imagenet_names()) == ids
    names = [info.label_name_to_description(class_id).casefold() for class_id in ids]
    assert [name.casefold() for name in imagenet_names().values()] == names


def test_every_ancestor_is_in_the_table_and_only_the_entity_has_none():
    table = synsets()
    assert {above for synset in table.values() for above in synset.hypernyms} <= table.keys()
    assert [key for key, synset in table.items() if not synset.hypernyms] == ["n00001740"]
    assert len(table) == 1860


def _ancestors(class_id):
    above = synsets()[class_id].hypernyms
    return set(above).union(*map(_ancestors, above)) if above else set()


@pytest.mark.parametrize(
    ("class_id", "ancestor"),
    [("n02123045", "n02121808"), ("n02085620", "n02084071"), ("n01440764", "n02512053")],
)
def test_a_tabby_is_a_cat_a_chihuahua_a_dog_and_a_tench_a_fish(class_id, ancestor):
    assert ancestor in _ancestors(class_id)


@given(
    chosen=st.sets(st.sampled_from(sorted(imagenet_names())), min_size=2, max_size=40),
    data=st.data(),
)
def test_suggested_groups_are_as_many_as_asked_and_part_the_classes(chosen, data):
    count = data.draw(st.integers(2, len(chosen)))
    groups = suggest_groups(chosen, count)
    assert len(groups) == count
    assert all(groups.values())
    assert sorted(member for members in groups.values() for member in members) == sorted(chosen)


def test_groups_bear_the_names_of_what_their_classes_have_in_common():
    groups = suggest_groups(load_task("animals").class_ids, 6)
    assert {"carnivore", "other mammal", "insect", "other vertebrate"} <= groups.keys()
    for name, members in groups.items():
        top = name.removeprefix("other ")
        for member in members:
            lines = {synsets()[key].names.split(",")[0] for key in _ancestors(member)}
            assert top in lines


def test_what_is_not_imagenets_or_too_many_groups_is_refused():
    with pytest.raises(TaskError, match="1 classes are not ImageNet-1k's, first 'cat'"):
        suggest_groups(["n01440764", "cat"], 2)
    with pytest.raises(TaskError, match="first 'n00001740'"):
        suggest_groups(["n00001740", "n01440764"], 2)
    for count in (1, 3):
        with pytest.raises(ConfigError, match=f"groups must be between 2 and 2, .* got {count}"):
            suggest_groups(["n01440764", "n01443537"], count)


def test_groups_of_the_same_name_are_told_apart():
    crane_and_crane = ("n02012849", "n03126707")
    groups = suggest_groups(crane_and_crane, 2)
    assert groups == {"crane": ("n02012849",), "crane (n03126707)": ("n03126707",)}
