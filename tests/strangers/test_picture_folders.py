"""Folders and archives as people have them: names, formats, leftovers and layouts."""

import io
import os
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import encoded, shades, tiny_imagenet, write_folder, write_parquet, write_zip
from PIL import Image

import vitcut
from vitcut import cli
from vitcut.errors import DataError
from vitcut.images.prepare import prepare
from vitcut.images.settings import DataSettings
from vitcut.images.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _counts(path: Path) -> dict:
    with open_source(str(path)) as source:
        return dict(Counter((record.split, record.class_id) for record in source.records))


def _fingerprint(path: Path) -> str:
    with open_source(str(path)) as source:
        return source.fingerprint


def _as(form: str, shade: int = 200) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (shade,) * 3).save(stream, form)
    return stream.getvalue()


FORMS = {
    "a.jfif": "JPEG", "b.JPG": "JPEG", "c": "JPEG", "d.avif": "AVIF", "e.jp2": "JPEG2000",
    "f.picture": "PNG", "g.PNG": "PNG", "h.1": "WEBP", "i": "BMP", "j.x": "PPM", "k": "TIFF",
    "l.jpg": "PNG", "m": "GIF",
}  # fmt: skip


def test_pictures_are_told_by_their_content(tmp_path: Path) -> None:
    files = {f"{own}/{name}": _as(form) for own in ("cat", "dog") for name, form in FORMS.items()}
    for path in (write_folder(tmp_path / "a", files), write_zip(tmp_path / "a.zip", files)):
        prepared = prepare(DataSettings(source=str(path), image_size=16))
        assert len(prepared.images) == len(files)
        assert np.abs(np.array(shades(prepared.images)) - 200).max() <= 3


def test_what_is_no_picture_is_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"read.me": b"BMW and P6", "cat/a.txt": b"", "cat/b.txt": b"P1", "dog/a.svg": b"<svg/>"}
    pictures = {"cat/1": encoded(), "dog/1": encoded()}
    assert _counts(write_folder(tmp_path / "a", pictures | texts)) == {
        (None, "cat"): 1,
        (None, "dog"): 1,
    }
    told = "out 4 of 6 files, which are no pictures (2 .txt, 1 .svg, 1 .me), first 'cat/a.txt'"
    assert told in capsys.readouterr().err
    write_folder(tmp_path / "b", pictures)
    assert _fingerprint(tmp_path / "a") == _fingerprint(tmp_path / "b")


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_without_its_package_says_what_to_install(tmp_path: Path, brand: bytes) -> None:
    files = {"cat/1.png": encoded(), "dog/1": b"\0\0\0\x18ftyp" + brand + b"\0" * 40}
    path = write_folder(tmp_path / "a", files)
    with pytest.raises(DataError, match=r"dog/1 .HEIC, .*pip install \"vitcut\[heif\]\""):
        prepare(DataSettings(source=str(path), image_size=8))


@pytest.mark.skipif(find_spec("pillow_heif") is None, reason="pillow-heif is not installed")
def test_heic_is_read_with_its_package(tmp_path: Path) -> None:
    import pillow_heif

    stream = io.BytesIO()
    picture = Image.new("RGB", (64, 64), (200, 200, 200))
    pillow_heif.from_pillow(picture).save(stream)
    files = {"cat/1.png": _as("PNG"), "dog/1.HEIC": stream.getvalue(), "dog/2": stream.getvalue()}
    path = write_folder(tmp_path / "a", files)
    prepared = prepare(DataSettings(source=str(path), image_size=16))
    assert np.abs(np.array(shades(prepared.images)) - 200).max() <= 3


LEFTOVERS = [
    "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/cat/._1.png", "deep/__MACOSX/1.png", ".thumbnails/1.png", "cat/.hidden.png",
    ".git/objects/1.png", "Thumbs.db", "cat/THUMBS.DB", "dog/Desktop.ini", ".DS_Store",
    "#recycle/cat/1.png", "$RECYCLE.BIN/1.png", ".ipynb_checkpoints/cat/1.png",
    "System Volume Information/1.png", "lost+found/1.png", "cat/Icon\r",
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_what_programs_leave_behind_is_neither_class_nor_picture(
    tmp_path: Path, packed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = {f"{own}/{i}.png": encoded(i) for own in ("cat", "dog") for i in range(3)}
    write_folder(tmp_path / "clean", clean)
    files = {**clean, **dict.fromkeys(LEFTOVERS, encoded())}
    if packed:
        path = write_zip(tmp_path / "a.zip", files, top="photos/")
    else:
        path = write_folder(tmp_path / "a" / "photos", files).parent
    assert _counts(path) == {(None, "cat"): 3, (None, "dog"): 3}
    assert _fingerprint(path) == _fingerprint(tmp_path / "clean")
    assert "left out" not in capsys.readouterr().err


SPLITS = {("train", "cat"): 1, ("train", "dog"): 1, ("test", "cat"): 1, ("test", "dog"): 1}
LAYOUTS = {
    "a folder in a folder": ["a/b/train/{c}/1", "a/b/val/{c}/1"],
    "Kaggle's sets": ["training_set/training_set/{c}/1", "test_set/test_set/{c}/1"],
    "segments": ["archive/seg_train/seg_train/{c}/1", "archive/seg_test/seg_test/{c}/1"],
    "one of them twice": ["train/{c}/1", "test/test/{c}/1"],
    "years": ["train2017/{c}/1", "val2017/{c}/1"],
    "words": ["Train Images/{c}/1", "Validation Images/{c}/1"],
    "a folder between": ["train/images/{c}/1", "val/images/{c}/1"],
    "splits in classes": ["{c}/train/1", "{c}/test/1"],
    "splits in classes, with subfolders": ["{c}/Train/x/1", "{c}/Valid/y/1"],
    "splits in classes, three of them": ["{c}/train/1", "{c}/val/1", "{c}/test/2"],
    "test images without labels": ["train/{c}/1", "val/{c}/1", "test/loose-{c}"],
}


@pytest.mark.parametrize("backslashes", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_whose_meaning_is_plain_are_read(
    tmp_path: Path, name: str, backslashes: bool
) -> None:
    names = [f"{way.format(c=own)}.png" for own in ("cat", "dog") for way in LAYOUTS[name]]
    if backslashes:
        # As some programs on Windows write them, with folders of their own.
        names = [name.replace("/", "\\") for name in names]
        names += {f"{name.partition(chr(92))[0]}\\" for name in names}
    files = {name: b"" if name.endswith("\\") else encoded() for name in names}
    assert _counts(write_zip(tmp_path / "a.zip", files)) == SPLITS


REFUSED = {
    "splits without classes": (["images/train/1", "images/val/1"], "test|val.*names of splits"),
    "no train split": (["val/{c}/1", "test/{c}/1"], "test, val, which are names of splits"),
    "two train splits": (["train/{c}/1", "training/{c}/1"], "train and training, which can each"),
    "splits in some classes": (["{c}/train/1", "{c}/test/1", "cat/1"], "images outside these"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_with_two_meanings_are_refused(tmp_path: Path, name: str) -> None:
    ways, told = REFUSED[name]
    names = {f"{way.format(c=own)}.png" for own in ("cat", "dog") for way in ways}
    with pytest.raises(DataError, match=told):
        _counts(write_folder(tmp_path / "a", dict.fromkeys(names, encoded())))


@pytest.mark.parametrize("names", [("bus", "train"), ("test tube", "train station"), ("Val", "Bo")])
def test_classes_may_be_called_like_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    files = {f"{name}/{i}.png": encoded() for name in names for i in range(2)}
    assert _counts(write_folder(tmp_path / "a", files)) == {(None, name): 2 for name in names}


def test_two_forms_of_one_name_are_one_class(tmp_path: Path) -> None:
    files = {"train/caf\u00e9/1.png": b"", "val/cafe\u0301/1.png": b"", "train/bar/1.png": b""}
    assert set(_counts(write_folder(tmp_path / "a", files | {"val/bar/1.png": b""}))) == {
        (split, name) for split in ("train", "test") for name in ("caf\u00e9", "bar")
    }


def test_tiny_imagenet_is_known_however_deep_it_lies_and_whatever_lies_beside_it(tmp_path) -> None:
    write_folder(tmp_path / "plain", tiny_imagenet())
    beside = {f"deep/data/{name}": content for name, content in tiny_imagenet().items()}
    beside |= {"deep/notes.txt": b"", "deep/data/todo.txt": b"", "deep/data/val/images/.x": b""}
    write_folder(tmp_path / "a", beside)
    assert _fingerprint(tmp_path / "a") == _fingerprint(tmp_path / "plain")


def test_names_that_are_not_utf8_are_read_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = os.fsencode(tmp_path / "a")
    for folder in (b"caf\xe9", b"dog"):
        Path(os.fsdecode(root + b"/" + folder)).mkdir(parents=True)
        for i in range(9):
            path = root + b"/" + folder + b"/\xfc%d.png" % i
            Path(os.fsdecode(path)).write_bytes(encoded(i))
    assert cli.main(["prepare", "--source", str(tmp_path / "a"), "--image-size", "8"]) == 0
    told = (
        r"18 of 18 file names are not UTF-8; their bytes are written as \\xNN, first 'caf\\\\xe9/"
    )
    assert re.search(told, capsys.readouterr().err)
    images = vitcut.load_images(tmp_path / "a", image_size=8)
    assert images.task.class_ids == ("caf\\xe9", "dog")


@pytest.mark.parametrize("utf8", [True, False])
def test_a_zip_that_does_not_say_its_encoding_is_read_as_its_unpacked_folder(
    tmp_path: Path, utf8: bool
) -> None:
    name = "café/1.png".encode("utf-8" if utf8 else "latin-1")
    path = write_zip(tmp_path / "a.zip", {"cafX/1.png": encoded(), "dog/1.png": encoded()})
    if utf8:
        path = write_zip(tmp_path / "a.zip", {"cafXX/1.png": encoded(), "dog/1.png": encoded()})
    written = path.read_bytes()
    path.write_bytes(written.replace(b"cafXX/1.png" if utf8 else b"cafX/1.png", name))
    assert set(_counts(path)) == {(None, "café" if utf8 else "caf\\xe9"), (None, "dog")}


def test_a_folder_of_parquet_files_is_read_as_a_dataset(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path / "a" / "data" / f"{split}-00000.parquet", [0, 1], names=["a", "b"])
    (tmp_path / "a" / "README.md").write_text("a card")
    assert _counts(tmp_path / "a") == {(s, c): 1 for s in ("train", "test") for c in ("a", "b")}


def test_a_picture_beside_parquet_files_does_not_hide_them(tmp_path: Path, capsys) -> None:
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1], names=["a", "b"])
    (tmp_path / "preview.png").write_bytes(encoded(1))
    assert _counts(tmp_path) == {(None, "a"): 1, (None, "b"): 1}
    assert "left out 1 of 2 files, which are pictures beside parquet" in capsys.readouterr().err


def test_class_folders_beside_parquet_files_with_pictures_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], names=["a", "b"])
    write_folder(tmp_path, {"cat/1.png": encoded(1), "dog/1.png": encoded(2)})
    with pytest.raises(
        DataError, match=r"both class folders .* and parquet files .*train\.parquet"
    ):
        _counts(tmp_path)


def test_a_table_about_pictures_is_none_of_them(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat/1.png": encoded(1), "dog/1.png": encoded(2)})
    pq.write_table(pa.table({"file_name": ["cat/1.png"], "age": [3]}), tmp_path / "meta.parquet")
    assert _counts(tmp_path) == {(None, "cat"): 1, (None, "dog"): 1}


def test_a_parquet_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1])
    assert _counts(path.rename(tmp_path / "data")) == {(None, "0"): 1, (None, "1"): 1}


@pytest.mark.parametrize(
    ("begins", "kind"), [(b"\x1f\x8b", "gzip"), (b"Rar!", "rar"), (b"\0" * 257 + b"ustar", "tar")]
)
def test_other_archives_say_to_unpack_them(tmp_path: Path, begins: bytes, kind: str) -> None:
    (tmp_path / "a.tgz").write_bytes(begins + b"\0" * 100)
    with pytest.raises(DataError, match=f"is a {kind} archive.*unpack it, and give the folder"):
        _counts(tmp_path / "a.tgz")


def test_runs_and_the_cache_may_lie_inside_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{own}/{i}.png": encoded(i) for own in ("cat", "dog") for i in range(9)}
    root = write_folder(tmp_path / "a" / "photos", files).parent
    before = _fingerprint(root)
    monkeypatch.setenv("VITCUT_CACHE", str(root / "cache"))
    write_folder(root / "run", {"config.yaml": b"format_version: 1\n", "report/1.png": encoded()})
    for _ in range(2):
        assert len(prepare(DataSettings(source=str(root), image_size=8)).images) == 18
        assert _fingerprint(root) == before
    assert "left out" not in capsys.readouterr().err


def test_a_zip_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write_zip(path, {"cat/1.png": encoded(), "dog/1.png": encoded(), "cat/2.png": encoded()})
    path.write_bytes(path.read_bytes().replace(b"cat/2.png", b"cat/1.png"))
    with pytest.raises(DataError, match=r"has the file 'cat/1.png' twice"):
        _counts(path)
