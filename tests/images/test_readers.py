"""Class folders, Tiny ImageNet's layout in small and in the real archive, and parquet files."""

import os
from collections import Counter
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import (
    CAT,
    DOG,
    OWL,
    encoded,
    tiny_imagenet,
    write_folder,
    write_parquet,
    write_zip,
)

from vitcut.errors import DataError
from vitcut.images.readers import ImageSource
from vitcut.images.sources import open_source


def _read(path: Path) -> ImageSource:
    with open_source(str(path)) as source:
        return source


def _counts(path: Path) -> dict:
    records = _read(path).records
    return dict(Counter((record.split, record.class_id) for record in records))


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
        ([], "has no images: expected CLASS/"),
        (["a.png", "b.png"], "has no images"),
        (["cat/a.txt", "dog/b.txt"], "has no images"),
        (["images/1.png", "images/2.png", "list.txt"], "has only one class, 'images'"),
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
            "left out 2 of 4 images, which are outside train/CLASS, first 'extra/cat/3.png'",
        ),
        (
            ["train/a/1.png", "train/b/1.png", "val/a/1.png", "test/a/1.png"],
            "left out 1 of 4 images, which are outside train/CLASS and val/CLASS, first 'test/",
        ),
        (
            ["cat/1.png", "dog/1.png", "cover.png"],
            "left out 1 of 3 images, which are outside class folders, first 'cover.png'",
        ),
    ],
)
def test_images_that_are_left_out_are_counted(
    tmp_path: Path, names: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    _counts(write_folder(tmp_path / "a", dict.fromkeys(names, b"")))
    said = capsys.readouterr().err
    assert message in said if message else "left out" not in said


@pytest.mark.parametrize("top", ["", "tiny-imagenet-200/"])
def test_both_splits_are_listed_with_their_labels(tmp_path: Path, top: str) -> None:
    source = _read(write_zip(tmp_path / "a.zip", tiny_imagenet(), top=top))
    assert _counts(tmp_path / "a.zip") == {("train", c): 6 for c in (CAT, DOG, OWL)} | {
        ("test", c): 2 for c in (CAT, DOG, OWL)
    }
    assert source.class_names == {CAT: "cat, house cat", DOG: "dog", OWL: OWL}


def test_archive_and_folder_have_equal_content(tmp_path: Path) -> None:
    packed = _read(write_zip(tmp_path / "a.zip", tiny_imagenet(), top="tiny-imagenet-200/"))
    folder = _read(write_folder(tmp_path / "folder", tiny_imagenet()))
    assert packed.records == folder.records
    assert packed.fingerprint == folder.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val/images/val_99.JPEG": b"1"}, "1 test images are not listed"),
        ({"val/val_annotations.txt": b"val_0.JPEG"}, "line 1 of .* is 'val_0.JPEG'"),
        ({"val/val_annotations.txt": b"../up.JPEG n1\n"}, "not listed"),
    ],
)
def test_a_broken_val_list_is_refused(
    tmp_path: Path, change: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        _read(write_zip(tmp_path / "a.zip", tiny_imagenet() | change))


def test_a_listed_image_that_is_missing_is_named(tmp_path: Path) -> None:
    files = tiny_imagenet()
    del files["val/images/val_0.JPEG"]
    with pytest.raises(DataError, match=r"1 test images are missing, first .*val_0\.JPEG"):
        _read(write_folder(tmp_path / "a", files))


def test_the_real_archive_is_listed_whole() -> None:
    beside = Path(__file__).parents[3] / "shared" / "data" / "tiny-imagenet-200.zip"
    path = Path(os.environ.get("VITCUT_TINY_IMAGENET", beside))
    if not path.exists():
        pytest.skip("no Tiny ImageNet archive: set VITCUT_TINY_IMAGENET to its path")
    source = _read(path)
    assert len(source.class_names) in {59, 200}
    per_class = Counter((record.split, record.class_id) for record in source.records)
    assert {n for (split, _), n in per_class.items() if split == "test"} == {50}
    assert len({n for (split, _), n in per_class.items() if split == "train"}) == 1
    assert source.class_names["n01443537"] == "goldfish, Carassius auratus"


def test_label_names_come_from_the_schema(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [1, 0, 1, 0, 0], names=["cat", "dog"])
    with open_source(str(path)) as source:
        assert [record.class_id for record in source.records] == ["dog", "cat", "dog", "cat", "cat"]
        assert {record.split for record in source.records} == {None}
        assert [source.read(i) for i in range(5)] == [encoded(i) for i in range(5)]


@pytest.mark.parametrize("labels", [[3, 7, 3], ["3", "7", "3"]])
def test_labels_without_names_are_their_own_ids(tmp_path: Path, labels: list) -> None:
    with open_source(str(write_parquet(tmp_path / "a.parquet", labels))) as source:
        assert [record.class_id for record in source.records] == ["3", "7", "3"]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, -1, 1], None, "1 of 3 rows have no known label"),
        ([0, None, 1], None, "1 of 3 rows have no known label"),
        ([0, -2, 1], ["cat", "dog"], "1 of 3 rows have no known label"),
        ([0, 5, 1], ["cat", "dog"], "1 of 3 rows have no known label"),
        ([0.5, 1.5], None, "its column label is double, expected integers, strings or booleans"),
    ],
)
def test_rows_that_cannot_be_labelled_are_refused(
    tmp_path: Path, labels: list, names: list[str] | None, message: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", labels, names=names)
    with pytest.raises(DataError, match=message), open_source(str(path)):
        pass


def test_a_parquet_file_without_images_lists_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}), tmp_path / "a.parquet")
    with (
        pytest.raises(DataError, match="no image column among label, text"),
        open_source(str(tmp_path / "a.parquet")),
    ):
        pass


def test_a_file_that_is_no_parquet_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not this")
    with (
        pytest.raises(DataError, match="not a complete parquet file"),
        open_source(str(tmp_path / "a.parquet")),
    ):
        pass


def test_a_dataset_id_is_downloaded_and_split_by_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train-00000-of-00001", "valid-00000-of-00001", "test-00000-of-00001"):
        write_parquet(tmp_path / "hub" / "data" / f"{name}.parquet", [0, 1])
    (tmp_path / "main").mkdir()
    folders = {"main": tmp_path / "main", "refs/convert/parquet": tmp_path / "hub"}

    def snapshot(dataset: str, *, revision: str, **_: object) -> str:
        assert dataset == "org/name"
        return str(folders[revision])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with open_source("org/name") as source:
        splits = Counter(record.split for record in source.records)
    assert splits == {"train": 2, "test": 2}


@pytest.mark.parametrize(
    ("names", "configurations"),
    [
        (
            ["full/train/0000", "full/test/0000", "small/train/0000"],
            "2 configurations, full, small",
        ),
        (["2023/train-0", "2024/train-0"], "2 configurations, 2023, 2024"),
        (["data/full/train-0", "data/train-0"], "2 configurations, data, data/full"),
        (["default/partial-train/0000", "default/test/0000"], None),
        (["train/0000", "validation/0000"], None),
    ],
)
def test_a_dataset_of_several_configurations_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    configurations: str | None,
) -> None:
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", [0, 1])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    if configurations is None:
        with open_source("org/name") as source:
            assert len(source.records) == 2 * len(names)
        return
    with (
        pytest.raises(DataError, match=f"^org/name has files of {configurations}: expected one"),
        open_source("org/name"),
    ):
        pass
