import pytest
from PIL import Image

from vitcut.cli import main
from vitcut.task import load_task
from vitcut.wordnet import imagenet_names

ANIMALS = ("n01440764", "n01443537", "n02085620", "n02123045", "n02124075")


@pytest.fixture
def photos(tmp_path):
    for name in (*ANIMALS, "n99999999"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "0.png")
    return tmp_path / "photos"


def _suggest(photos, out, *flags):
    return main(["suggest", "--source", str(photos), "--out", str(out), *flags])


def test_a_suggested_label_file_is_a_task_of_the_data(photos, tmp_path, capsys):
    out = tmp_path / "animals.yaml"
    assert _suggest(photos, out, "--groups", "3") == 0
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
        (["--groups", "6"], "groups must be between 2 and 5, the classes, got 6"),
        (["--source", "drawn"], "give --task drawn"),
        (["--source", "{others}"], "0 of the data's 2 classes, such as 'cat', are called by"),
        (["--out", "{photos}"], "is there already: choose another --out"),
    ],
)
def test_what_cannot_be_suggested_is_told_in_one_line(photos, tmp_path, capsys, flags, match):
    others = tmp_path / "others"
    for name in ("cat", "dog"):
        (others / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(others / name / "0.png")
    typed = [flag.format(others=others, photos=photos) for flag in flags]
    assert _suggest(photos, tmp_path / "labels.yaml", *typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line
    assert not (tmp_path / "labels.yaml").exists()
