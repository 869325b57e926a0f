from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vitcut.errors import TaskError
from vitcut.labels import Labels
from vitcut.task import (
    Task,
    TaskClass,
    all_classes_task,
    load_task,
    parse_task,
    shipped_tasks,
)
from vitcut.wordnet import imagenet_labels


def _expect_refusal(text, match):
    with pytest.raises(TaskError, match=match) as caught:
        parse_task(text, origin="labels.yaml")
    assert "\n" not in str(caught.value)


def test_animals_has_58_classes_in_6_groups_numbered_by_sorted_id():
    task = load_task("animals")
    assert task.groups == ("aquatic", "reptiles", "arthropods", "birds", "mammals", "marine_life")
    assert len(task.classes) == 58
    assert list(task.class_ids) == sorted(task.class_ids)
    assert (task.class_ids[0], task.class_names[0]) == ("n01443537", "goldfish")
    assert task.excluded == {"n01768244": "trilobite"}
    assert "n01768244" not in task.class_ids


def test_group_numbers_follow_the_order_of_the_label_file():
    task = parse_task("groups: {z: {b: bee}, a: {c: cat, a: ant}}", origin="labels.yaml")
    assert task.groups == ("z", "a")
    assert task.class_names == ("ant", "bee", "cat")
    assert task.group_of_class.tolist() == [1, 0, 1]


def test_a_task_without_a_name_is_named_after_its_file(tmp_path):
    path = tmp_path / "pets.yml"
    path.write_text("groups: {cats: {a: tabby}, dogs: {b: pug}}")
    assert load_task(path).name == "pets"


@pytest.mark.parametrize("name", shipped_tasks())
def test_the_content_of_a_task_gives_the_task_back(name):
    task = load_task(name)
    assert parse_task(yaml.safe_dump(task.to_dict(), sort_keys=False), origin="x.yaml") == task


def test_a_class_in_two_groups_is_refused():
    _expect_refusal("groups: {a: {n1: cat}, b: {n1: cat}}", r"class n1 is in 2 groups: a, b")


@pytest.mark.parametrize("twice", ["{a: {n1: cat, n1: dog}, b: {n2: owl}}", "{a: {}, a: {}}"])
def test_an_entry_listed_twice_is_refused(twice):
    _expect_refusal(f"groups: {twice}", "is listed twice")


@pytest.mark.parametrize("empty", ["{}", ""])
def test_an_empty_group_is_refused(empty):
    _expect_refusal(
        f"groups: {{a: {{n1: cat}}, b: {empty}}}", "group 'b' is empty|expected 'groups"
    )


@pytest.mark.parametrize("groups", ["{a: {n1: cat}}", "{}"])
def test_fewer_than_two_groups_are_refused(groups):
    _expect_refusal(f"groups: {groups}", "needs at least 2 groups, got [01]")


@pytest.mark.parametrize("text", ["groups: {a: [", "a: b: c", "\0", "? [1, 2]\n: 3\n? {a: b}\n: 4"])
def test_what_is_no_yaml_is_refused(text):
    _expect_refusal(text, "labels.yaml is not valid YAML")


@pytest.mark.parametrize(
    "text", ["", "hello", "3", "[1, 2]", "name: x", "groups: 3", "groups: [n1, n2]"]
)
def test_what_is_no_label_file_is_refused(text):
    _expect_refusal(text, "labels.yaml is not a label file: expected 'groups")


def test_excluded_ids_without_a_reason_are_refused():
    _expect_refusal("groups: {a: {n1: cat}, b: {n2: owl}}\nexcluded: [n3]", "expected 'excluded")


def test_an_unknown_name_lists_the_shipped_tasks():
    with pytest.raises(TaskError, match=r"no task named 'animal'.*animals, cats-dogs, drawn"):
        load_task("animal")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_label_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "labels.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TaskError, match=r"cannot read the label file .*labels\.yaml"):
        load_task(path)


def test_a_task_built_by_hand_is_checked_too():
    with pytest.raises(TaskError, match="group 'b' is empty"):
        Task(name="x", classes=(TaskClass(id="1", name="cat", group="a"),), groups=("a", "b"))


def test_a_group_is_listed_once():
    with pytest.raises(TaskError, match="lists group 'a' 2 times"):
        Task(name="x", classes=(TaskClass(id="1", name="cat", group="a"),), groups=("a", "a"))


@pytest.mark.parametrize("class_id", ["007", "010", "no", "1_0", "12:30", "null"])
def test_a_class_id_is_taken_as_it_is_written(class_id):
    task = parse_task(f"groups: {{a: {{{class_id}: cat}}, b: {{z: owl}}}}", origin="labels.yaml")
    assert task.class_ids == (class_id, "z")


def test_a_class_without_a_name_is_called_by_its_id():
    task = parse_task("groups: {a: {n1: }, b: {n2: owl}}", origin="labels.yaml")
    assert task.class_names == ("n1", "owl")


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("1", "a"), ("2", "c"), ("3", "b")], "class in group 'c', expected one of a, b"),
        ([("2", "a"), ("1", "b")], "not sorted by id"),
    ],
)
def test_classes_built_by_hand_are_sorted_and_of_a_listed_group(members, match):
    classes = tuple(TaskClass(id=i, name=i, group=group) for i, group in members)
    with pytest.raises(TaskError, match=match):
        Task(name="x", classes=classes, groups=("a", "b"))


LABELS = Labels(
    owner="the data",
    ids=("n2", "n1", "n4", "n3"),
    names=("tabby, tabby cat", "owl", "pug", "seal"),
)


def _among(text, labels=LABELS):
    return parse_task(text, origin="labels.yaml").among(labels)


@pytest.mark.parametrize("cats", ["{n2: kitty}", "[n2]", "['0']", "[Tabby]", "[tabby cat]"])
def test_a_class_is_named_by_its_id_its_position_or_its_name(cats):
    task = _among(f"groups: {{cats: {cats}, dogs: [pug], owls: {{'1': }}}}")
    assert task.class_ids == ("n1", "n2", "n4")
    assert task.class_names[::2] == ("owl", "pug")
    assert task.class_names[1] == ("kitty" if "kitty" in cats else "tabby, tabby cat")
    assert task.group_of_class.tolist() == [2, 0, 1]


def test_what_is_not_named_is_ignored_unless_a_rest_collects_it():
    text = "groups: {cats: [tabby], dogs: [pug]}\nexcluded: {n3: drawn}"
    for ignored in (text, f"{text}\nrest: ignore"):
        assert _among(ignored).class_ids == ("n2", "n4")
    task = _among(f"{text}\nrest: others")
    assert task.groups == ("cats", "dogs", "others")
    assert task.class_ids == ("n1", "n2", "n4")
    assert task.group_of_class.tolist() == [2, 0, 1]


def test_the_rest_may_join_a_group_of_the_label_file():
    task = _among("groups: {others: [owl], cats: [tabby]}\nrest: others")
    assert task.groups == ("others", "cats")
    assert task.group_of_class.tolist() == [0, 1, 0, 0]


def test_one_class_stands_against_the_rest():
    task = _among("one: tabby")
    assert task.groups == ("tabby", "other")
    assert task.group_of_class.tolist() == [1, 0, 1, 1]
    assert task == _among("groups: {tabby: [tabby]}\nrest: other")


@pytest.mark.parametrize("classes", ["[n2, pug]", "{n2: n2, pug: pug}", "{n2: , pug: }"])
def test_classes_without_groups_are_a_group_each(classes):
    task = _among(f"classes: {classes}")
    assert task.groups == ("n2", "pug")
    assert task.group_of_class.tolist() == [0, 1]


def test_a_group_of_one_class_bears_its_name():
    assert _among("classes: {n2: cat, n4: dog}").groups == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "classes: [tabbby, pug]",
            r"names 1 classes that the data lacks: tabbby; .*such as tabby",
        ),
        ("classes: [x, y]", r"names 2 classes .*: x, y; the data has 4 classes, such as n2, n1"),
        ("classes: ['4', pug]", r"lacks: 4; .*position \(0 to 3\)"),
        ("classes: [tabby, n2]", r"names class n2 twice, as '\w+' in group '\w+' and in group"),
        ("groups: {a: [n2], b: [n1, n4, n3]}\nrest: other", r"leaves none for 'other'"),
    ],
)
def test_what_the_labels_do_not_have_is_told_in_one_line(text, match):
    with pytest.raises(TaskError, match=match) as caught:
        _among(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("groups: {a: [n1], b: [n2]}\nrests: c", "unknown entry 'rests', did you mean 'rest'"),
        ("groups: {a: [n1], b: [n2]}\nzebra: c", "unknown entry 'zebra', expected name, source"),
        ("classes: [n1, n2]\ngroups: {a: [n1], b: [n2]}", "has 'groups' and 'classes': expected"),
        ("one: [n1]", r"'one' must be a class, got \['n1'\]"),
        ("one: ", "'one' must be a class, got ''"),
        ("one: n1\nrest: ignore", "needs at least 2 groups, got 1"),
        ("classes: n1", r"expected 'classes: \[class, ...\]'"),
        ("classes: {1: cat, 2: cat}", "2 classes are called 'cat'"),
        ("classes: [n1, n1]", "2 classes are called 'n1'"),
        ("groups: {a: [[n1]], b: [n2]}", "expected 'groups"),
        ("groups: {a: {n1: [cat]}, b: [n2]}", "expected 'groups"),
        ("groups: {a: [n1], b: [n2]}\nrest: [c]", r"'rest' must be a group's name or 'ignore'"),
        ("groups: {a: [n1], b: [n2]}\nrest: ", "'rest' must be a group's name or 'ignore', got ''"),
    ],
)
def test_what_a_label_file_may_not_say_is_refused(text, match):
    _expect_refusal(text, match)


names = st.text("ab1,", min_size=1, max_size=3)


@given(data=st.data(), ids=st.lists(names, min_size=3, max_size=6, unique=True))
def test_a_task_among_its_labels_is_what_it_was_and_comes_back_from_its_label_file(data, ids):
    labels = Labels(owner="x", ids=tuple(ids), names=tuple(data.draw(names) for _ in ids))
    chosen = data.draw(st.lists(st.sampled_from(ids), min_size=2, max_size=len(ids), unique=True))
    rest = data.draw(st.sampled_from(["ignore", "other"] if len(chosen) < len(ids) else ["ignore"]))
    content = {"classes": dict.fromkeys(chosen, ""), "rest": rest}
    written = parse_task(yaml.safe_dump(content), origin="x.yaml")
    task = written.among(labels)
    assert set(task.class_ids) == set(ids if rest == "other" else chosen)
    assert task.among(labels) == task
    for either in (written, task):
        text = yaml.safe_dump(either.to_dict(), sort_keys=False)
        assert parse_task(text, origin="x.yaml") == either


@pytest.mark.parametrize("cat", ["n02121808", "[domestic cat]", "Domestic_Cat", "{n02121808: x}"])
def test_a_wordnet_ancestor_stands_for_all_classes_below_it(cat):
    task = _among(f"groups: {{cat: {cat}, dog: domestic dog}}", imagenet_labels())
    assert task.groups == ("cat", "dog")
    assert [(task.group_of_class == group).sum() for group in (0, 1)] == [5, 118]
    assert task.class_ids[task.class_names.index("tabby, tabby cat")] == "n02123045"
    assert task.among(imagenet_labels()) == task


def test_an_ancestor_means_the_classes_that_there_are_and_are_not_excluded():
    labels = Labels(
        owner="the data",
        ids=("n02123394", "n02123045", "n02085620"),
        names=("n02123394", "n02123045", "rat dog"),
    )
    text = "groups: {cat: domestic cat, dog: dog}"
    assert _among(text, labels).class_ids == ("n02085620", "n02123045", "n02123394")
    # The names are those of the labels, or WordNet's where they have none.
    assert _among(text, labels).class_names == ("rat dog", "tabby, tabby cat", "Persian cat")
    fewer = f"{text}\nexcluded: {{n02123045: too many}}"
    assert _among(fewer, labels).class_ids == ("n02085620", "n02123394")
    # A class of that name comes first.
    named = replace(labels, names=("n02123394", "dog", "n02085620"))
    assert _among("groups: {a: dog, b: n02085620}", named).class_ids == ("n02085620", "n02123045")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "groups: {cat: cat, dog: dog}",
            r"2 ancestors .*n02127808 \(big cat, cat: 6 .*: write the id",
        ),
        (
            "groups: {cat: domestic cat, feline: feline}",
            r"names class n02\d+ twice, as '[\w ]+' in group '\w+' and in .*: name it once",
        ),
        ("groups: {a: dog, b: unicorn}", "names 1 classes that ImageNet-1k lacks: unicorn"),
    ],
)
def test_ancestors_that_leave_a_class_in_doubt_are_refused(text, match):
    with pytest.raises(TaskError, match=match) as caught:
        _among(text, imagenet_labels())
    assert "\n" not in str(caught.value)


def test_an_ancestor_without_any_class_is_refused():
    with pytest.raises(TaskError, match=r"the data has no class below WordNet's n02121808 \(dom"):
        _among("groups: {cat: domestic cat, dog: pug}")


DATA = Labels(owner="the data", ids=("Cat", "dog", "kitten"), names=("Cat", "dog", "kitten"))
COARSE = "groups: {dog: [n4], cat: [n2, n1]}"


def _for_data(text, data=DATA):
    return _among(text).for_data(data)


@pytest.mark.parametrize(
    ("more", "folders", "group_of_label"),
    [
        ("", {"dog": ("dog",), "cat": ("Cat",)}, [1, 0]),
        ("folders: {cat: kitten}", {"dog": ("dog",), "cat": ("kitten",)}, [0, 1]),
        ("folders: {cat: [kitten, Cat]}", {"dog": ("dog",), "cat": ("kitten", "Cat")}, [1, 0, 1]),
    ],
)
def test_images_of_whole_groups_are_found_by_the_groups_name_or_as_listed(
    more, folders, group_of_label
):
    task = _for_data(f"{COARSE}\n{more}")
    assert task.folders == folders
    assert task.label_ids == tuple(sorted(own for owns in folders.values() for own in owns))
    assert task.group_of_label.tolist() == group_of_label
    assert task.group_of_class.tolist() == [1, 1, 0]
    assert task.for_data(DATA) == task
    again = parse_task(yaml.safe_dump(task.to_dict(), sort_keys=False), origin="x.yaml")
    assert again == task


def test_where_the_data_has_the_fine_classes_folders_of_a_groups_name_change_nothing():
    ids = ("cat", "dog", "n1", "n2", "n4")
    task = _for_data(COARSE, Labels(owner="the data", ids=ids, names=ids))
    assert task == _among(COARSE)
    assert task.folders == {}
    assert (task.label_ids, task.group_of_label.tolist()) == (task.class_ids, [1, 1, 0])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (COARSE.replace("dog", "wolf"), "lacks a folder of that name for group 'wolf', it has Cat"),
        (f"{COARSE}\nfolders: {{cat: cat}}", "lacks the folder 'cat' for group 'cat', it has Cat"),
        (f"{COARSE}\nfolders: {{cat: dog}}", "folder 'dog' is listed 2 times: dog, cat"),
        (f"{COARSE}\nfolders: {{owl: dog}}", "has folders for 'owl', expected one of dog, cat"),
        (f"{COARSE}\nfolders: [cat]", "expected 'folders: {group: .folder"),
        (f"{COARSE}\nrest: other", "lacks a folder of that name for group 'other'"),
        (
            "groups: {a: [n4], b: [n1]}",
            "names 2 classes that the data lacks: .*list them: 'folders",
        ),
    ],
)
def test_folders_that_are_not_there_or_in_two_groups_are_refused(text, match):
    with pytest.raises(TaskError, match=match) as caught:
        _for_data(text)
    assert "\n" not in str(caught.value)


def test_two_folders_of_one_name_and_a_mixture_of_folders_and_classes_are_refused():
    ids = ("Cat", "CAT", "dog")
    with pytest.raises(TaskError, match="2 classes of the data have the name of group 'cat'"):
        _for_data(COARSE, Labels(owner="the data", ids=ids, names=ids))
    ids = ("cat", "dog", "n4")
    with pytest.raises(TaskError, match=r"lacks: n1, n2; .*whole groups, list them"):
        _for_data(COARSE, Labels(owner="the data", ids=ids, names=ids))


def test_all_classes_are_a_group_each_in_the_order_of_their_ids():
    labels = Labels(
        owner="x", ids=("n3", "n1", "n4", "n2"), names=("crane", "tabby, cat", "crane", "pug")
    )
    task = all_classes_task(labels)
    assert task.name == "all"
    assert task.class_ids == ("n1", "n2", "n3", "n4")
    assert task.class_names == ("tabby, cat", "pug", "crane", "crane")
    assert task.groups == ("tabby, cat", "pug", "crane (n3)", "crane (n4)")
    assert task.group_of_class.tolist() == [0, 1, 2, 3]
    assert (task.rest, task.excluded) == (None, {})


def test_one_class_alone_is_no_task():
    with pytest.raises(TaskError, match="needs at least 2 groups, got 1"):
        all_classes_task(Labels(owner="x", ids=("n1",), names=("cat",)))


@given(
    ids=st.lists(st.text("ab1", min_size=1, max_size=3), min_size=2, max_size=6, unique=True),
    data=st.data(),
)
def test_the_task_of_all_classes_is_what_its_labels_and_its_label_file_say(ids, data):
    labels = Labels(owner="x", ids=tuple(ids), names=tuple(data.draw(names) for _ in ids))
    task = all_classes_task(labels)
    assert len(task.groups) == len(ids)
    assert task.among(labels) == task
    assert parse_task(yaml.safe_dump(task.to_dict(), sort_keys=False), origin="x.yaml") == task


@pytest.mark.parametrize("tabby", ["n02123045", "tabby", "281", "Tabby_Cat"])
def test_what_is_excluded_is_found_like_every_class(tabby):
    text = f"groups: {{cat: domestic cat, dog: dog}}\nexcluded: {{{tabby}: striped}}"
    task = _among(text, imagenet_labels())
    cats = [item.id for item in task.classes if item.group == "cat"]
    assert len(cats) == 4
    assert "n02123045" not in cats
