import pytest
import timm
import torch
from data_samples import write_parquet
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vitcut
from vitcut.cli import main
from vitcut.errors import ConfigError, TaskError
from vitcut.groupings import propose, suggest
from vitcut.labels import Labels
from vitcut.task import load_task
from vitcut.wordnet import imagenet_labels, imagenet_names, synsets


def _members(task):
    return {
        group: tuple(item.id for item in task.classes if item.group == group)
        for group in task.groups
    }


@given(
    chosen=st.sets(st.sampled_from(sorted(imagenet_names())), min_size=2, max_size=40),
    others=st.sets(st.text("xyz", min_size=1), max_size=3),
    data=st.data(),
)
def test_suggested_groups_are_as_many_as_asked_and_part_the_known_classes(chosen, others, data):
    count = data.draw(st.integers(2, len(chosen)))
    task = suggest(data.draw(st.permutations([*chosen, *others])), count, "mine")
    assert task.name == "mine"
    assert len(task.groups) == count
    assert task.class_ids == tuple(sorted(chosen))
    assert task.excluded == dict.fromkeys(others, "not ImageNet-1k's")
    assert all(_members(task).values())


def _ancestors(class_id):
    above = synsets()[class_id].hypernyms
    return set(above).union(*map(_ancestors, above)) if above else set()


def test_groups_are_named_after_what_their_classes_have_in_common():
    members = _members(suggest(list(load_task("animals").class_ids), 6, "animals"))
    assert {"carnivore", "other mammal", "insect", "other vertebrate"} <= members.keys()
    for name, class_ids in members.items():
        top = name.removeprefix("other ")
        for class_id in class_ids:
            assert top in {synsets()[key].names.split(",")[0] for key in _ancestors(class_id)}


def test_groups_of_the_same_name_are_told_apart():
    task = suggest(["n02012849", "n03126707"], 2, "cranes")
    assert _members(task) == {"crane": ("n02012849",), "crane (n03126707)": ("n03126707",)}


@pytest.mark.parametrize(
    ("class_ids", "match"),
    [
        (["n01440764", "cat"], "^1 of 2 classes are WordNet ids .* other one is 'cat': write"),
        (["n00001740", "n01440764"], "first other one is 'n00001740'"),
        ([], "^0 of 0 classes are WordNet ids .* at least 2: write a label file"),
    ],
)
def test_fewer_than_two_classes_of_imagenet_are_refused(class_ids, match):
    with pytest.raises(TaskError, match=match):
        suggest(class_ids, 2, "few")


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_or_too_many_groups_are_refused(count):
    with pytest.raises(ConfigError, match=f"groups must be between 2 and 2, .* got {count}"):
        suggest(["n01440764", "n01443537"], count, "fish")


ANIMALS = ("n01440764", "n01443537", "n02085620", "n02123045", "n02124075")


@pytest.fixture
def photos(tmp_path):
    for name in (*ANIMALS, "n99999999"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "0.png")
    return tmp_path / "photos"


def _run(photos, out, *flags):
    return main(["suggest", "--source", str(photos), "--out", str(out), *flags])


def test_a_suggested_label_file_is_a_task_of_the_data(photos, tmp_path, capsys):
    out = tmp_path / "animals.yaml"
    assert _run(photos, out, "--groups", "3") == 0
    task = load_task(out)
    assert task.groups == ("cyprinid", "Chihuahua", "domestic cat")
    assert task.class_ids == ANIMALS
    assert task.class_names == tuple(imagenet_names()[key].split(",")[0] for key in ANIMALS)
    assert task.group_of_class.tolist() == [0, 0, 1, 2, 2]
    assert task.excluded == {"n99999999": "not ImageNet-1k's"}
    assert f"results: {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--groups", "6"], "groups must be between 2 and 5, the number of classes, got 6"),
        (["--source", "drawn"], "give --task drawn"),
        (["--source", "{others}"], "0 of 2 classes are WordNet ids of ImageNet-1k"),
        (["--source", "{pets}", "--groups", "2"], "each of the data's 2 classes is a group: leave"),
        (["--source", "{nested}"], "'animal' includes 'dog' in WordNet, and a class is of one"),
        (["--out", "{photos}"], "is there already: choose another --out"),
    ],
)
def test_what_cannot_be_suggested_is_told_in_one_line(photos, tmp_path, capsys, flags, match):
    places = {"photos": photos}
    given = {"others": ("unicorn", "dog"), "pets": ("cat", "dog"), "nested": ("animal", "dog")}
    for place, names in given.items():
        places[place] = tmp_path / place
        for name in names:
            (places[place] / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(places[place] / name / "0.png")
    typed = [flag.format(**places) for flag in flags]
    assert _run(photos, tmp_path / "labels.yaml", *typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line
    assert not (tmp_path / "labels.yaml").exists()


def test_names_of_ancestors_are_groups_of_what_is_below_them():
    task, lines = propose(["cats", "Dog", "unicorn", "aircraft_carrier"], imagenet_labels(), "mine")
    ids = {item.group: item.id for item in task.classes}
    assert ids == {"cats": "n02121808", "Dog": "n02084071", "aircraft_carrier": "n02687172"}
    assert task.groups == ("cats", "Dog", "aircraft_carrier")
    assert task.excluded == {"unicorn": "no name in WordNet"}
    assert lines[0].startswith("cats: n02121808 (domestic cat), 5 classes: tabby, tiger cat, Pers")
    assert "; or n02121620 (cat), 7 classes: " in lines[0]
    assert lines[2] == "aircraft_carrier: n02687172 (aircraft carrier), 1 class: aircraft carrier"
    data = Labels(owner="the data", ids=("Dog", "aircraft_carrier", "cats"), names=("", "", ""))
    assert task.among(imagenet_labels()).for_data(data).folders["cats"] == ("cats",)


def test_groups_are_of_the_models_classes():
    labels = Labels(owner="model 'mine'", ids=("n02127808", "n02123045"), names=("x", "y"))
    with pytest.raises(TaskError, match="1 of 2 classes have the name of classes of model 'mine'"):
        propose(["cat", "dog"], labels, "mine")


WORDNET_IDS = ["n02123045", "n02085620", "n01440764"]


def test_the_classes_of_a_weights_file_are_taken_from_its_labels(tmp_path):
    for name in WORDNET_IDS:
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    weights = timm.create_model("test_vit", num_classes=2).state_dict()
    torch.save(weights, tmp_path / "model.pth")
    (tmp_path / "names.txt").write_text("\n".join(WORDNET_IDS[:2]))
    given = {"model": tmp_path / "model.pth", "arch": "test_vit", "labels": tmp_path / "names.txt"}
    task = vitcut.suggest(tmp_path / "photos", groups=2, out=tmp_path / "task.yaml", **given)
    assert set(task.class_ids) == set(WORDNET_IDS[:2])
    for flag in ({"labels": "names.txt"}, {"arch": "test_vit"}):
        with pytest.raises(ConfigError, match="arch and labels are of a model"):
            vitcut.suggest(tmp_path / "photos", out=tmp_path / "other.yaml", **flag)


def test_a_stated_order_is_the_order_of_a_model_that_names_nothing(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [0, 1, 0, 1], names=WORDNET_IDS)
    weights = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save(weights, tmp_path / "model.pth")
    model = vitcut.load_model(tmp_path / "model.pth", arch="test_vit")
    # The third class has no picture: only the stated order knows of it.
    task = vitcut.suggest(source, model=model, groups=2, out=tmp_path / "task.yaml")
    assert set(task.class_ids) == set(WORDNET_IDS[:2])
