"""However a model and a data set spell their classes, each is matched by itself, or asked for."""

import json
import unicodedata
from dataclasses import replace

import pytest
import timm
from PIL import Image
from pretrained import fake_pretrained
from test_api import build_module
from timm.models import save_for_hf

import vitcut
from vitcut.cli import main
from vitcut.errors import ModelError, TaskError, UnsupportedModelError
from vitcut.labels import Labels
from vitcut.model.classes import find_labels
from vitcut.model.load import load
from vitcut.model.model import Model
from vitcut.model.transformers_folders import labels_of
from vitcut.preprocessing import Preprocessing
from vitcut.task import all_classes_task, parse_task
from vitcut.wordnet import imagenet_labels, imagenet_names

IDS, NAMES = list(imagenet_names()), list(imagenet_names().values())
FIRST = [name.split(",")[0] for name in NAMES]
TAKEN = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))


def labels(texts, names=None, owner="the data") -> Labels:
    return Labels(owner=owner, ids=tuple(texts), names=tuple(names or texts))


def found(model, data, text=None) -> dict[str, int]:
    """The logit of each of the data's classes, as a task of them has it."""
    task = all_classes_task(data) if text is None else parse_task(text, origin="x.yaml")
    task = task.naming(data)
    known, _ = find_labels(model, "mine", len(model.ids), data, task)
    ids = task.among(known).class_ids
    return {own: known.ids.index(own) for own in ids}


DECOMPOSED = unicodedata.normalize("NFD", "Café São")


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (["American bulldog", "pug"], ["american_bulldog", "PUG"]),
        (["a_bulldog", "yellow lady's slipper"], ["a-bulldog", "Yellow_ladys_slipper"]),
        (["Café São", "b"], [DECOMPOSED, "b"]),
        (["\uff21\uff22\uff23", "b"], ["abc", "b"]),
        (["001.Black_footed_Albatross", "002.Ruff"], ["001 Black footed Albatross", "002.Ruff"]),
        (["cat", "Cat"], ["cat", "Cat"]),
        (["maillot", "maillot, tank suit"], ["Maillot", "Maillot, tank_suit"]),
        (["tabby, tabby cat", "pug, pug-dog"], ["tabby", "pug dog"]),
        (["tabby, tabby cat", "pug, pug-dog"], ["n02123045", "n02110958"]),
        (["n02123045", "n02110958"], ["Tabby", "pug-dog"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_a_text_is_the_same_however_it_is_typed(model, data, turned):
    order = [1, 0] if turned else [0, 1]
    given = found(labels([model[at] for at in order]), labels(sorted(data)))
    assert given == {data[at]: order.index(at) for at in (0, 1)}


SPELLINGS = {
    "as transformers has them": NAMES,
    "by the first synonym": FIRST,
    "with underscores": [name.replace(" ", "_") for name in NAMES],
    "in capitals": [name.upper() for name in FIRST],
    "one of them an id": [*NAMES[:7], IDS[7], *NAMES[8:]],
    "one of them of its own": [*NAMES[:7], "my rooster", *NAMES[8:]],
}


@pytest.mark.parametrize("texts", SPELLINGS.values(), ids=SPELLINGS)
def test_imagenets_classes_are_found_one_by_one(texts):
    own = [at for at in range(1000) if texts[at] != "my rooster"]
    data = labels([IDS[at] for at in own])
    assert list(found(labels(texts), data).values()) == own
    # And by the names that folders have, but for those that several classes share.
    shared = {name for name in FIRST if FIRST.count(name) > 1 or name.lower() != name}
    some = [at for at in own[::9] if FIRST[at] not in shared and not any(
        FIRST[at] in other.split(", ")[1:] for other in NAMES)]  # fmt: skip
    data = labels(sorted(FIRST[at].replace(" ", "_") for at in some))
    assert sorted(found(labels(texts), data).values()) == some


def test_only_classes_in_doubt_are_asked_for_and_a_label_file_answers():
    model = labels(FIRST, owner="model 'mine'")
    data = labels(["crane", "maillot", "pug", "tabby"])
    with pytest.raises(TaskError) as caught:
        found(model, data)
    said = str(caught.value)
    for word in ("'crane' is the name of 2", "n02012849 (crane, position 134)", "position 517)"):
        assert word in said
    assert "'maillot' is the name of 2" in said
    assert "pug" not in said
    assert "tabby" not in said
    assert "'model: {crane: 134}'" in said
    answer = "classes: [crane, maillot, pug, tabby]\nmodel: {crane: 517, maillot: 638}"
    given = found(model, data, answer)
    assert given == {"crane": 517, "maillot": 638, "pug": 254, "tabby": 281}
    answer = "classes: {517: crane, 638: maillot, pug: pug, tabby: tabby}"
    assert found(model, data, answer) == given


def test_one_text_twice_concerns_no_other_class():
    model = labels(["crane", "ant", "crane", "owl"], owner="model 'mine'")
    assert found(model, labels(["ANT", "owl"])) == {"ANT": 1, "owl": 3}
    assert found(model, labels(["Crane", "owl"]), "classes: [Crane, owl]\nmodel: {Crane: 2}") == {
        "Crane": 2,
        "owl": 3,
    }


def test_what_is_left_over_is_told_with_the_nearest_names():
    model = labels(["tabby", "siamese cat", "golden retriever"], owner="model 'mine'")
    with pytest.raises(TaskError) as caught:
        found(model, labels(["golden_retriver", "siamezze", "tabby"]))
    said = str(caught.value)
    assert "lacks: golden_retriver, siamezze; model 'mine' has 3 classes, such as" in said
    assert "such as golden retriever (for golden_retriver), siamese cat (for siamezze):" in said
    assert "tabby" not in said


def folders(root, names) -> str:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for at in range(12):
            Image.new("L", (8, 8), 20 * number + at).save(root / name / f"{at}.png")
    return str(root)


MODELS = {
    "WordNet ids": labels(IDS, NAMES),
    "texts": labels(NAMES),
    "texts in another order": labels(NAMES[::-1]),
    "texts with underscores": labels([name.replace(" ", "_") for name in NAMES]),
    "some of the texts": labels([NAMES[at] for at in range(0, 400)]),
    "nothing": None,
}
TASKS = {
    "ancestors": ("groups: {cat: domestic cat, dog: domestic dog}", ["Cat", "dog", "gadget"]),
    "ids": ("groups: {cat: [n02123045], dog: [n02099601]}", ["cat", "dog"]),
    "names": ("groups: {cat: [tabby], dog: [Golden_Retriever]}", ["cat", "dog"]),
    "a whole group that is one class": ("groups: {lion: lion, dog: domestic dog}", ["dog", "lion"]),
    "classes by id": (
        "groups: {cat: domestic cat, dog: domestic dog}\nexcluded: {n02123394: none}",
        [own for own in sorted(IDS[151:269] + IDS[281:286]) if own != "n02123394"],
    ),
    "classes by name": (
        "groups: {cat: [tabby, egyptian cat], dog: [pug]}", ["Egyptian_cat", "PUG", "tabby"]
    ),
    "other folders": (
        "groups: {cat: domestic cat, dog: domestic dog}\nfolders: {cat: kitties, dog: ['7']}",
        ["7", "kitties"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("named", MODELS)
def test_coarse_tasks_take_every_way_of_naming(tmp_path, named, task, capsys):
    text, names = TASKS[task]
    own = MODELS[named]
    model = Model.of(build_module(num_classes=1000 if own is None else len(own.ids)), "mine",
                     TAKEN, own)  # fmt: skip
    source = folders(tmp_path / "photos", names)
    images = vitcut.load_images(source, task=parse_task(text, origin="x.yaml"), model=model)
    fitted = model.for_task(images.task, images.labels)
    # Whatever they are called, the logits of every group are those of ImageNet's classes.
    rows = {tuple(row.tolist()): at for at, row in enumerate(model.module.head.weight)}
    order = list(range(999, -1, -1)) if named == "texts in another order" else list(range(1000))
    got = {group: set() for group in images.task.groups}
    for item, row in zip(images.task.classes, fitted.module.head.weight, strict=True):
        got[item.group].add(IDS[order[rows[tuple(row.tolist())]]])
    wanted = parse_task(text, origin="x.yaml").among(imagenet_labels())
    assert got == {g: {c.id for c in wanted.classes if c.group == g} for g in wanted.groups}
    said = capsys.readouterr().err
    if "domestic" in text:
        assert "made of the model's classes: " in said
        assert "cat: 5 classes (" in said or "cat: 4 classes (" in said or "lion: 1 class" in said
        assert "dog: 118 classes (" in said
    assert len(images.test) > 0


def test_suggest_takes_data_with_a_class_that_wordnet_lacks_and_models_without_names(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "photos", ["cat", "dog", "gadget"])
    model = replace(Model.of(build_module(num_classes=1000), "mine", TAKEN, None), name="mine")
    task = vitcut.preparation.suggest("photos", model=model, out="labels.yaml")
    assert task.folders == {"cat": ("cat",), "dog": ("dog",)}


def test_suggest_groups_the_classes_that_the_model_has(tmp_path):
    source = folders(tmp_path / "photos", IDS[281:285] + IDS[200:204])
    own = labels(NAMES[282:285] + NAMES[200:203], owner="model 'mine'")
    model = Model.of(build_module(num_classes=6), "mine", TAKEN, own)
    out = tmp_path / "labels.yaml"
    task = vitcut.preparation.suggest(source, model=model, groups=2, out=out)
    assert set(task.class_ids) == {*IDS[282:285], *IDS[200:203]}
    assert task.excluded == dict.fromkeys((IDS[203], IDS[281]), "none of the model's")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"problem_type": "multi_label_classification", "num_labels": 3}, "multi_label_class"),
        ({"problem_type": "regression", "num_labels": 3}, "for regression, which measures"),
        ({"num_labels": 1}, "gives one logit"),
    ],
)
def test_models_that_do_not_choose_one_class_are_refused_by_name(tmp_path, capsys, given, match):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, image_size=16, patch_size=8, **given)  # fmt: skip
    module = transformers.ViTForImageClassification(config).eval()
    with pytest.raises(UnsupportedModelError, match=match):
        vitcut.load_model(module, mean=0.5, std=0.5)
    folder = tmp_path / "hf"
    module.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=match):
        load(folder)
    assert main(["info", str(folder)]) == 2
    assert match in capsys.readouterr().err.splitlines()[-1]


def test_a_module_of_transformers_names_its_classes_unless_they_are_only_numbers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    for texts, known in (
        (["owl", "ant"], ("owl", "ant")),
        (["0", "1"], None),
        (["LABEL_0", "LABEL_1"], None),
    ):
        config = transformers.ViTConfig(**sizes, id2label=dict(enumerate(texts)))
        module = transformers.ViTForImageClassification(config).eval()
        own = vitcut.load_model(module, mean=0.5, std=0.5).labels
        assert (None if own is None else own.ids) == known


@pytest.mark.parametrize(
    ("named", "known"),
    [
        (["c", "a"], ("c", "a")),
        ({"1": "a", "0": "c"}, ("c", "a")),  # as timm allows, too
        ([10, 9], ("10", "9")),
        ({"0": "c", "2": "a"}, "label_names in .* names classes '0': 'c', '2': 'a': expected a t"),
        ([["c"], ["a"]], "expected a text for each of the logits 0 to 1: correct it"),
        ("ca", "label_names in .* are a str"),
    ],
)
def test_a_folder_of_timm_names_its_classes_in_every_form_that_timm_writes(tmp_path, named, known):
    module = timm.create_model("test_vit", num_classes=2)
    save_for_hf(module, tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, "label_names": named}))
    if isinstance(known, tuple):
        assert load(tmp_path / "vit").labels.ids == known
        return
    with pytest.raises(ModelError, match=known):
        load(tmp_path / "vit")


def test_classes_that_transformers_numbers_from_one_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(id2label={1: "ant", 2: "owl"})
    with pytest.raises(ModelError, match=r"id2label in .* names classes 1: 'ant', 2: 'owl': expe"):
        labels_of(config, "mine")


@pytest.mark.parametrize(("count", "known"), [(1000, True), (7, False)])
def test_timms_own_weights_are_of_the_classes_that_timm_says(tmp_path, monkeypatch, count, known):
    name = "vit_tiny_patch16_224"
    fake_pretrained(monkeypatch, name, tmp_path / "weights.pth", num_classes=count)
    own = vitcut.load_model(f"timm:{name}").labels
    assert (None if own is None else list(own.ids)) == (IDS if known else None)
