"""Parquet files and Hugging Face datasets."""

from collections import Counter
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import encoded, write_parquet

from vitcut.errors import DataError
from vitcut.images.sources import open_source


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
        ([0.5, 1.5], None, "which of the columns image, label is the label"),
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
        pytest.raises(DataError, match="not a whole parquet file"),
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
        pytest.raises(DataError, match=f"^org/name holds files of {configurations}: expected one"),
        open_source("org/name"),
    ):
        pass


def test_no_network_says_that_the_source_is_neither_here_nor_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with (
        pytest.raises(DataError, match=r"'org/name' is no file or folder here.*no network"),
        open_source("org/name"),
    ):
        pass


@pytest.mark.parametrize("source", ["gone.zip", "data/gone.parquet", "/gone/folder", "word"])
def test_a_source_that_does_not_exist_is_refused_without_network(source: str) -> None:
    with pytest.raises(DataError, match="does not exist: expected"), open_source(source):
        pass
