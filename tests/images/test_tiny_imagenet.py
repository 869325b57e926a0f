"""Tiny ImageNet's layout, in small and in the real archive."""

import os
from collections import Counter
from pathlib import Path

import pytest
from data_samples import CAT, DOG, OWL, tiny_imagenet, write_folder, write_zip

from vitcut.errors import DataError
from vitcut.images.records import Source
from vitcut.images.sources import open_source


def _read(path: Path) -> Source:
    with open_source(str(path)) as source:
        return source


@pytest.mark.parametrize("top", ["", "tiny-imagenet-200/"])
def test_both_splits_are_listed_with_their_labels(tmp_path: Path, top: str) -> None:
    source = _read(write_zip(tmp_path / "a.zip", tiny_imagenet(), top=top))
    counts = Counter((record.split, record.class_id) for record in source.records)
    assert counts == {("train", c): 6 for c in (CAT, DOG, OWL)} | {
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
        ({"val/images/val_99.JPEG": b"1"}, "1 test images are without a line"),
        ({"val/val_annotations.txt": b"val_0.JPEG"}, "line 1 of .* is 'val_0.JPEG'"),
        ({"val/val_annotations.txt": b"../up.JPEG n1\n"}, "without a line"),
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
