import pytest
import yaml

from vitcut.errors import TaskError
from vitcut.task import Task, TaskClass, load_task, parse_task, shipped_tasks


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
    "text", ["", "hello", "3", "[1, 2]", "name: x", "groups: 3", "groups: {a: n1, b: n2}"]
)
def test_what_is_no_label_file_is_refused(text):
    _expect_refusal(text, "labels.yaml is no label file: expected 'groups")


def test_excluded_ids_without_a_reason_are_refused():
    _expect_refusal("groups: {a: {n1: cat}, b: {n2: owl}}\nexcluded: [n3]", "expected 'excluded")


def test_an_unknown_name_lists_the_shipped_tasks():
    with pytest.raises(TaskError, match=r"no task named 'animal'.*animals, drawn"):
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
        ([("1", "a"), ("2", "c"), ("3", "b")], "class of group 'c', expected one of a, b"),
        ([("2", "a"), ("1", "b")], "not in the order of their ids"),
    ],
)
def test_classes_built_by_hand_are_sorted_and_of_a_listed_group(members, match):
    classes = tuple(TaskClass(id=i, name=i, group=group) for i, group in members)
    with pytest.raises(TaskError, match=match):
        Task(name="x", classes=classes, groups=("a", "b"))
