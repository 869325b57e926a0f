"""Folders of class folders."""

from collections import Counter
from pathlib import Path

import pytest
from data_samples import encoded, write_folder, write_zip

from vitcut.errors import DataError
from vitcut.images.sources import open_source


def _counts(path: Path) -> dict:
    with open_source(str(path)) as source:
        return dict(Counter((record.split, record.class_id) for record in source.records))


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "testing", "VAL"])
@pytest.mark.parametrize("train", ["train", "training", "Train"])
def test_train_and_validation_folders_are_the_splits(tmp_path: Path, train: str, name: str) -> None:
    files = [f"{split}/{c}/deep/1.png" for split in (train, name) for c in ("cat", "dog")]
    write_folder(tmp_path / "a", dict.fromkeys([*files, "read.me"], b""))
    expected = {(split, c): 1 for split in ("train", "test") for c in ("cat", "dog")}
    assert _counts(tmp_path / "a") == expected


def test_test_images_are_left_out_where_validation_images_are(tmp_path: Path) -> None:
    files = [f"{split}/{c}/1.png" for split in ("train", "val", "test") for c in ("cat", "dog")]
    counts = _counts(write_zip(tmp_path / "a.zip", dict.fromkeys(files, b"")))
    assert sum(counts.values()) == 4


@pytest.mark.parametrize("top", ["", "train/", "photos/"])
def test_one_level_of_class_folders_has_no_split(tmp_path: Path, top: str) -> None:
    files = {f"{top}{c}/{i}.PNG": encoded() for c in ("cat", "dog") for i in range(3)}
    counts = _counts(write_folder(tmp_path / "a", files))
    assert counts == {(None, "cat"): 3, (None, "dog"): 3}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no images: expected CLASS/"),
        (["a.png", "b.png"], "holds no images"),
        (["cat/a.txt", "dog/b.txt"], "holds no images"),
        (["images/1.png", "images/2.png", "list.txt"], "only one class, 'images'"),
    ],
)
def test_a_folder_without_classes_says_what_was_expected(
    tmp_path: Path, names: list[str], message: str
) -> None:
    (tmp_path / "a").mkdir()
    write_folder(tmp_path / "a", dict.fromkeys(names, b""))
    with pytest.raises(DataError, match=message):
        _counts(tmp_path / "a")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    files = dict.fromkeys([f"{c}/1.png" for c in ("bus", "car", "train")], b"")
    counts = _counts(write_folder(tmp_path / "a", files))
    assert counts == {(None, "bus"): 1, (None, "car"): 1, (None, "train"): 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png"],
            None,
        ),
        (
            ["train/cat/1.png", "train/dog/1.png", "extra/cat/3.png", "train/loose.png"],
            "left out 2 of 4 images, which lie outside train/CLASS, first 'extra/cat/3.png'",
        ),
        (
            ["train/a/1.png", "train/b/1.png", "val/a/1.png", "test/a/1.png"],
            "left out 1 of 4 images, which lie outside train/CLASS and val/CLASS, first 'test/",
        ),
        (
            ["cat/1.png", "dog/1.png", "cover.png"],
            "left out 1 of 3 images, which lie outside class folders, first 'cover.png'",
        ),
    ],
)
def test_images_that_are_left_out_are_counted(
    tmp_path: Path, names: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    _counts(write_folder(tmp_path / "a", dict.fromkeys(names, b"")))
    said = capsys.readouterr().err
    assert message in said if message else "left out" not in said
