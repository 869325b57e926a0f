"""What the logits of a model stand for that does not name its classes: stated, or asked for."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_api import build_module

import vitcut
from vitcut.cli import main
from vitcut.errors import ModelError, TaskError
from vitcut.model.model import Model
from vitcut.task import parse_task

PER_CLASS = 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))


def nameless(count: int) -> Model:
    return vitcut.load_model(build_module(num_classes=count), mean=0.5, std=0.5)


def picture(shade: int) -> Image.Image:
    return Image.new("L", (8, 8), shade % 256)


def folders(root, names) -> str:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for at in range(PER_CLASS):
            picture(PER_CLASS * number + at).save(root / name / f"{at}.png")
    return str(root)


def parquet(path, labels, names=None) -> str:
    """Rows of (image, label) as the library datasets writes them."""
    rows = []
    for shade in range(PER_CLASS * len(labels)):
        picture(shade).save(path.parent / "x.png")
        rows.append({"bytes": (path.parent / "x.png").read_bytes(), "path": "x.png"})
    column = [label for label in labels for _ in range(PER_CLASS)]
    table = pa.table({"image": rows, "label": column})
    if names is not None:
        told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, path)
    return str(path)


def order_of(model: Model, source: str, task=None) -> list[str]:
    """The data's class of each logit, as the fitted model has it."""
    images = vitcut.load_images(source, task=task, model=model)
    fitted = model.for_task(images.task, images.labels)
    rows = [row.tolist() for row in model.module.head.weight]
    found = {rows.index(row.tolist()): own for row, own in zip(
        fitted.module.head.weight, images.task.class_ids, strict=True)}  # fmt: skip
    return [found[at] for at in sorted(found)]


TWELVE = [str(number) for number in range(1, 13)]


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (TWELVE, "string order 1, 10, 11, 12, 2, ...; natural order 1, 2, 3, 4, 5, ..."),
        (
            ["ant", "Bee", "cat"],
            "string order Bee, ant, cat, ...; order whatever case and accents a",
        ),
        (["1001", "207", "33"], "string order 1001, 207, 33, ...; natural order 33, 207, 1001"),
        (["fish2", "fish10", "owl"], "string order fish10, fish2, owl, ...; natural order fish2, "),
        (["00", "1", "02"], "string order 00, 02, 1, ...; natural order 00, 1, 02"),
        (
            ["été", "fox", "zoo"],
            "string order fox, zoo, été, ...; order whatever case and accents é",
        ),
        (["00", "01", "02"], None),
        (["n01440764", "n01443537", "n02123045"], None),
        (["ant", "bee", "cat"], None),
    ],
)
def test_names_that_can_be_sorted_in_two_ways_are_asked_for(tmp_path, names, both, capsys):
    source, model = folders(tmp_path / "photos", names), nameless(len(names))
    if both is None:
        assert order_of(model, source) == sorted(names, key=str.casefold)
        return
    with pytest.raises(TaskError, match="can be sorted in two ways") as caught:
        order_of(model, source)
    assert both in str(caught.value)
    assert "--labels FILE" in str(caught.value)
    assert "\n" not in str(caught.value)
    # The remedy works, in any order.
    mixed = names[::-1]
    assert order_of(replace(model, labels=None).with_labels(mixed), source) == mixed


def test_folders_from_zero_on_are_numbers(tmp_path, capsys):
    names = [str(number) for number in range(12)]
    assert order_of(nameless(12), folders(tmp_path / "photos", names)) == names
    said = capsys.readouterr().err
    assert said.count("are taken as the data's classes, in the order of their numbers\n") == 1


OWN = ["zebra", "Ant", "10", "9", "owl"]


@pytest.mark.parametrize(
    ("labels", "names", "order"),
    [
        ([4, 1, 0, 3, 2], OWN, OWN),
        ([3, 1, 0], OWN, ["zebra", "Ant", "9"]),  # two classes have no image
        (list(range(1, 13)), None, TWELVE),
        ([700, 30, 4], None, ["4", "30", "700"]),
    ],
)
def test_the_order_of_a_parquets_own_labels_is_the_models(tmp_path, labels, names, order, capsys):
    source = parquet(tmp_path / "data.parquet", labels, names)
    assert order_of(nameless(len(names or labels)), source) == order
    assert capsys.readouterr().err.count("in the order of the label column of ") == 1


def test_names_in_a_parquet_without_an_order_are_asked_for_like_folders(tmp_path):
    source = parquet(tmp_path / "data.parquet", ["fish2", "fish10"])
    with pytest.raises(TaskError, match="can be sorted in two ways"):
        order_of(nameless(2), source)


@pytest.mark.parametrize(
    "text",
    [
        "classes: {0: fish10, 1: owl, 2: fish2}",
        "groups: {fish: {0: fish10, 2: Fish2}, bird: {1: owl}}",
        "classes: [fish10, owl, fish2]\nmodel: {fish10: 0, Owl: 1, fish2: 2}",
    ],
)
def test_a_label_file_states_the_order_and_a_run_keeps_it(tmp_path, text):
    source, model = folders(tmp_path / "photos", ["fish2", "fish10", "owl"]), nameless(3)
    task = parse_task(text, origin="x.yaml")
    assert order_of(model, source, task) == ["fish10", "owl", "fish2"]
    kept = vitcut.load_images(source, task=task, model=model).task
    again = parse_task(json.dumps(kept.to_dict()), origin="x.yaml")
    assert again == kept
    assert order_of(model, source, again) == ["fish10", "owl", "fish2"]


def test_a_list_of_classes_in_another_order_than_their_names_is_asked_for(tmp_path):
    source = folders(tmp_path / "photos", ["ant", "bee", "owl"])
    task = parse_task("classes: [Owl, ant, bee]", origin="x.yaml")
    with pytest.raises(TaskError, match="the label file's order owl, ant, bee"):
        order_of(nameless(3), source, task)
    assert order_of(nameless(3).with_labels(["owl", "ant", "bee"]), source, task) == [
        "owl",
        "ant",
        "bee",
    ]
    # Of groups with several classes, or in the order of the names, there is one reading.
    for text in ("classes: [ant, bee, owl]", "groups: {bird: owl, insect: [ant, bee]}"):
        assert order_of(nameless(3), source, parse_task(text, origin="x.yaml"))[0] == "ant"


def test_what_a_label_file_says_of_the_model_must_be_there(tmp_path):
    source, model = folders(tmp_path / "photos", ["ant", "owl"]), nameless(2)
    for text, match in (
        ("classes: [ant, owl]\nmodel: {ant: 0, owl: 7}", "model 'VisionTransformer' has no '7'"),
        ("classes: [ant, owl]\nmodel: {ant: 0, owl: 1, fox: 1}", "the data has no 'fox'"),
        ("classes: [ant, owl]\nmodel: [ant]", "expected 'model: {class of the data"),
    ):
        with pytest.raises(TaskError, match=match):
            order_of(model, source, parse_task(text, origin="x.yaml"))


def test_labels_come_from_a_file_and_a_run_directory_keeps_them(tmp_path, capsys):
    source = folders(tmp_path / "photos", TWELVE)
    model = nameless(12)
    (tmp_path / "names.txt").write_bytes("\ufeff".encode() + "\r\n".join(TWELVE).encode())
    given = vitcut.load_model(build_module(num_classes=12), mean=0.5, std=0.5,
                              labels=tmp_path / "names.txt")  # fmt: skip
    assert order_of(given, source) == TWELVE
    with pytest.raises(ModelError, match=r"labels names 2 classes, .* has 12 logits"):
        model.with_labels(["a", "b"])
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    numbered = dict(reversed([*enumerate(TWELVE)]))
    assert model.with_labels(numbered).labels.ids == tuple(TWELVE)
    with pytest.raises(ModelError, match="a text for each of the logits 0 to 11: correct it"):
        model.with_labels({number + 1: name for number, name in enumerate(TWELVE)})
    with pytest.raises(TaskError, match=r"line 2 of .*gap\.txt is empty"):
        vitcut.load_model(build_module(), mean=0.5, std=0.5, labels=tmp_path / "gap.txt")
    folder = tmp_path / "vit"
    given.with_labels([f"class{n}" for n in range(12)]).save(folder)
    typed = ["eval", str(folder), "--source", source, "--labels", str(tmp_path / "names.txt")]
    assert main([*typed, "--out", str(tmp_path / "run")]) == 0
    again = vitcut.load_model(tmp_path / "run")
    assert again.labels is not None
    assert list(again.labels.ids) == TWELVE


def test_a_folder_called_like_a_shipped_task_is_a_task_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "animals", ["cat", "dog", "fox"])
    images = vitcut.load_images("animals", image_size=8)
    assert images.task.groups == ("cat", "dog", "fox")
    assert vitcut.load_images("animals", model=nameless(3)).task.groups == ("cat", "dog", "fox")
