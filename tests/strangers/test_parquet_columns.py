"""Parquet files as other programs write them: several columns, plain bytes, foreign metadata."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import encoded, write_folder

import vitcut
from vitcut import cli
from vitcut.errors import ConfigError, DataError
from vitcut.images import readers
from vitcut.images.sources import open_source

ROWS = 4
PICTURES = [{"bytes": encoded(10 + i), "path": None} for i in range(ROWS)]
MASKS = [{"bytes": encoded(50 + i), "path": None} for i in range(ROWS)]
PLAIN = [encoded(90 + i) for i in range(ROWS)]
LABELS = [0, 1, 0, 1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write(folder: Path, columns: dict, metadata: bytes | None = None) -> str:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, folder / "a.parquet")
    return str(folder / "a.parquet")


def _first(source: str, **columns: str) -> bytes:
    with open_source(source, **columns) as opened:
        return opened.read(0)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"mask": MASKS, "image": PICTURES}, encoded(10)),
        ({"image": PLAIN, "mask": MASKS}, encoded(90)),
        ({"img": PLAIN}, encoded(90)),
        ({"photo": pa.array(PLAIN, pa.large_binary())}, encoded(90)),
    ],
)
def test_the_column_of_pictures_is_image_or_the_only_one(tmp_path, columns, expected) -> None:
    assert _first(_write(tmp_path, {**columns, "label": LABELS})) == expected


def test_among_several_columns_of_pictures_a_flag_chooses(tmp_path: Path) -> None:
    source = _write(tmp_path, {"front": PICTURES, "back": PLAIN, "label": LABELS})
    with pytest.raises(
        DataError, match=r"several columns .*front, back: say which with --image-co"
    ):
        _first(source)
    assert _first(source, image_column="front") == encoded(10)
    assert _first(source, image_column="back") == encoded(90)
    with pytest.raises(DataError, match="no images in a column 'side': expected one of front, ba"):
        _first(source, image_column="side")


def test_columns_are_part_of_the_fingerprint_where_they_change_what_is_read(tmp_path) -> None:
    columns = {"image": PICTURES, "back": PLAIN, "label": LABELS, "class_": ["a", "b", "c", "a"]}
    source = _write(tmp_path, columns)

    def fingerprint(**columns: str) -> str:
        with open_source(source, **columns) as opened:
            return opened.fingerprint

    usual = fingerprint()
    assert fingerprint(image_column="image") == usual
    assert fingerprint(image_column="image", label_column="label") == usual
    others = {fingerprint(image_column="back"), fingerprint(label_column="class_")}
    assert len(others | {usual}) == 3


def test_among_several_columns_of_labels_a_flag_chooses(tmp_path: Path) -> None:
    columns = {"image": PICTURES, "label": LABELS, "fine_label": ["a", "b", "c", "a"]}
    source = _write(tmp_path, columns)
    with pytest.raises(DataError, match=r"cannot tell which .* is the label.*--label-column"):
        _first(source)
    with open_source(source, label_column="fine_label") as opened:
        assert sorted(opened.class_names) == ["a", "b", "c"]


def test_a_column_that_is_taken_as_the_label_is_said_once(tmp_path: Path, capsys) -> None:
    for name in ("train", "test"):
        source = Path(_write(tmp_path, {"image": PICTURES, "kind": LABELS}))
        source.rename(tmp_path / f"{name}.parquet")
    _first(str(tmp_path))
    assert capsys.readouterr().err.count("the label is taken from column 'kind'") == 1
    _first(str(tmp_path), label_column="kind")
    assert "kind" not in capsys.readouterr().err


def test_the_flags_go_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = 40
    columns = {
        "front": [encoded(i) for i in range(rows)],
        "back": [encoded(100) for _ in range(rows)],
        "kind": [i % 2 for i in range(rows)],
        "number": list(range(rows)),
    }
    source = _write(tmp_path, columns)
    flags = ["--image-column", "back", "--label-column", "kind"]
    assert cli.main(["prepare", "--source", source, "--image-size", "8", *flags]) == 0
    assert " ".join(flags) in capsys.readouterr().out
    images = vitcut.load_images(source, image_size=8, image_column="back", label_column="kind")
    assert (images.train.all()[..., 0] == 100).all()
    assert images.origin["image_column"] == "back"
    with pytest.raises(DataError, match="image-column is for parquet files"):
        _first(str(write_folder(tmp_path / "a", {"cat/1.png": b""})), image_column="back")


def test_yes_and_no_are_two_classes(tmp_path: Path) -> None:
    columns = {"image": PICTURES, "label": [True, False, True, False], "number": range(ROWS)}
    with open_source(_write(tmp_path, columns)) as opened:
        assert [record.class_id for record in opened.records] == ["True", "False"] * 2


@pytest.mark.parametrize("labels", [[0.0, 1.0, 0.0, 1.0], [[0], [1], [0], [1]]])
def test_no_other_column_stands_in_for_a_label_that_is_none(tmp_path: Path, labels: list) -> None:
    source = _write(tmp_path, {"image": PICTURES, "label": labels, "number": range(ROWS)})
    with pytest.raises(DataError, match=r"label is (double|list).*expected integers, strings or b"):
        _first(source)
    assert _first(source, label_column="number") == encoded(10)


@pytest.mark.parametrize("column", ["image_column", "label_column"])
def test_columns_are_refused_where_there_are_none(tmp_path: Path, column: str) -> None:
    flag = column.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} is for parquet files, got it with.*drawn"):
        vitcut.load_images("drawn", image_size=8, **{column: "label"})
    with pytest.raises(ConfigError, match=f"{flag} is for parquet files, got it with.*drawn"):
        vitcut.prepare("drawn", image_size=8, **{column: "label"})
    folder = write_folder(tmp_path / "a", {"cat/1.png": b"", "dog/1.png": b""})
    with pytest.raises(DataError, match=f"{flag} is for parquet files, got it with"):
        vitcut.load_images(folder, image_size=8, **{column: "label"})


def test_categories_are_labels(tmp_path: Path) -> None:
    kinds = pa.array(["cat", "dog", "cat", "dog"]).dictionary_encode()
    with open_source(_write(tmp_path, {"image": PLAIN, "label": kinds})) as opened:
        assert sorted(opened.class_names) == ["cat", "dog"]


FOREIGN = [
    b"[1, 2]", b"nonsense", b"\xff", b'{"info": {"features": []}}', b"[" * 100_000,
    b'{"info": {"features": {"label": {"names": "cat"}}}}',
    b'{"info": {"features": {"label": {"names": [1, null]}}}}',
    b'{"info": {"features": {"label": {"names": {"0": "cat"}}}}}',
]  # fmt: skip


@pytest.mark.parametrize("metadata", FOREIGN)
def test_metadata_that_names_no_labels_does_not_matter(tmp_path: Path, metadata: bytes) -> None:
    with open_source(_write(tmp_path, {"image": PLAIN, "label": LABELS}, metadata)) as opened:
        assert sorted(opened.class_names) == ["0", "1"]


def test_two_labels_with_one_name_are_refused(tmp_path: Path) -> None:
    features = {"label": {"names": ["crane", "crane"]}}
    metadata = json.dumps({"info": {"features": features}}).encode()
    with pytest.raises(DataError, match="two labels that are called 'crane'"):
        _first(_write(tmp_path, {"image": PLAIN, "label": LABELS}, metadata))


def test_test_files_that_are_left_out_are_said(tmp_path: Path, capsys) -> None:
    for split in ("train", "validation", "test"):
        path = _write(tmp_path, {"image": PLAIN, "label": LABELS})
        Path(path).rename(tmp_path / f"{split}.parquet")
    with open_source(str(tmp_path)) as opened:
        assert len(opened.records) == 2 * ROWS
    assert "left out 1 of 3 files, which are named test" in capsys.readouterr().err


def test_a_row_group_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "_MOST_GROUP_BYTES", 100)
    with pytest.raises(DataError, match=r"row group of 0\.0 GiB.*write it with smaller row groups"):
        _first(_write(tmp_path, {"image": PLAIN, "label": LABELS}))
