import pytest
from timm.data import ImageNetInfo

from vitcut.wordnet import imagenet_names, synsets


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


def test_every_synset_has_a_gloss_in_one_line():
    glosses = {key: synset.gloss for key, synset in synsets().items()}
    assert all(glosses.values())
    assert glosses["n02123045"] == "a cat with a grey or tawny coat mottled with black"


def _ancestors(class_id):
    above = synsets()[class_id].hypernyms
    return set(above).union(*map(_ancestors, above)) if above else set()


@pytest.mark.parametrize(
    ("class_id", "ancestor"),
    [("n02123045", "n02121808"), ("n02085620", "n02084071"), ("n01440764", "n02512053")],
)
def test_a_tabby_is_a_cat_a_chihuahua_a_dog_and_a_tench_a_fish(class_id, ancestor):
    assert ancestor in _ancestors(class_id)
