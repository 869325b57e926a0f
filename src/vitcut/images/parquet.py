"""Parquet files as Hugging Face writes them: a struct column of image bytes, a label column.

Row groups are read when their images are wanted; downloading is left to `download`.
"""

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitcut.errors import DataError
from vitcut.images.records import Record, RecordSplit, Source, checked_records
from vitcut.store import sha256_file, sha256_json

_LABEL_NAMES = ("label", "labels", "fine_label", "class")
_VALIDATION_WORDS = {"val", "valid", "validation"}
_SPLIT_WORDS = _VALIDATION_WORDS | {"train", "test", "partial"}
"""What folders are called that tell splits apart, not configurations."""
_EXPECTED = "rows with an image (struct of bytes and path) and a label, of two classes or more"


def read_parquet(files: list[Path], *, root: Path, location: str) -> Source:
    """List the labelled images of parquet files that belong together.

    The split stands in a file's name or folder ("train-00000.parquet"); "test" is used where
    there is no other, and is left out where there is.

    Args:
        files: At least one.
        root: The folder whose relative names tell files apart.
        location: The source, for messages.

    Raises:
        DataError: A file is damaged, has no image or label column, or the files belong to several
            configurations of a dataset, which may hold the same images.
    """
    _require_one_configuration(files, root=root, location=location)
    tables = [_Table(path, path.relative_to(root).as_posix()) for path in _wanted(files, root)]
    rows: dict[str, tuple[_Table, int]] = {}
    records: list[Record] = []
    for table in tables:
        for row, class_id in enumerate(table.class_ids()):
            path = f"{table.name}:{row:09d}"
            rows[path] = (table, row)
            records.append(Record(split=table.split, class_id=class_id, path=path))
    ordered = checked_records(records, location=location, expected=_EXPECTED)

    def read(position: int) -> bytes:
        table, row = rows[ordered[position].path]
        return table.image_bytes(row)

    return Source(
        records=ordered,
        class_names={record.class_id: record.class_id for record in ordered},
        fingerprint=sha256_json([[table.name, sha256_file(table.path)] for table in tables]),
        read=read,
    )


class _Table:
    """One parquet file: which columns hold what, and its rows."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.split: RecordSplit | None = _split_of(name)
        with _reading(path), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            groups = range(file.metadata.num_row_groups)
            sizes = [file.metadata.row_group(group).num_rows for group in groups]
        self._image = _image_column(schema, path)
        self._label = _label_column(schema, path)
        self._label_names: list[str] | None = _features(schema).get(self._label, {}).get("names")
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        # Images are asked for nearly in order, by a few threads at once.
        self._images_of = lru_cache(maxsize=2)(self._read_images)

    def class_ids(self) -> list[str]:
        """The class id of each row."""
        with _reading(self.path), pq.ParquetFile(self.path) as file:
            labels = file.read(columns=[self._label]).column(0).to_pylist()
        names = self._label_names
        bad = sum(not _is_known(label, names) for label in labels)
        if bad:
            raise DataError(
                f"{self.path}: {bad} of {len(labels)} rows have no known label in column "
                f"{self._label!r}: expected one for every image"
            )
        return [str(label) if names is None else names[label] for label in labels]

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""
        group, offset = self._places[row]
        content = self._images_of(group)[offset].as_py()
        if content is None:
            raise DataError("the row has no image bytes, only a path")
        return content

    def _read_images(self, group: int) -> Any:
        # Opened for each call: pyarrow's readers are not made for several threads.
        with _reading(self.path), pq.ParquetFile(self.path) as file:
            table = file.read_row_group(group, columns=[self._image])
        return table.column(0).combine_chunks().field("bytes")


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a whole parquet file: {reason}") from None


def _require_one_configuration(files: list[Path], *, root: Path, location: str) -> None:
    """Configurations differ in their folders, once those that are called after a split are gone."""
    names = {_configuration(path.relative_to(root).parent) for path in files}
    if len(names) > 1:
        raise DataError(
            f"{location} holds files of {len(names)} configurations, {', '.join(sorted(names))}: "
            "expected one; download a .parquet file of the one you mean and give its path"
        )


def _configuration(folder: Path) -> str:
    return Path(*(part for part in folder.parts if not _names_split(part))).as_posix()


def _names_split(part: str) -> bool:
    words = _words(part) - {""}
    return bool(words) and words <= _SPLIT_WORDS


def _wanted(files: list[Path], root: Path) -> list[Path]:
    """All files, without those called "test" where others are called validation."""
    words = {path: _words(path.relative_to(root).as_posix()) for path in files}
    if any(words[path] & _VALIDATION_WORDS for path in files):
        return [path for path in files if "test" not in words[path]]
    return files


def _split_of(name: str) -> RecordSplit | None:
    words = _words(name)
    if "train" in words:
        return "train"
    return "test" if words & (_VALIDATION_WORDS | {"test"}) else None


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face notes of each column: its kind, and the names of its labels."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        return json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _image_column(schema: pa.Schema, path: Path) -> str:
    for column in schema:
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            return column.name
    raise DataError(
        f"{path} has no image column among {', '.join(schema.names)}: expected a struct with "
        "field 'bytes'"
    )


def _is_known(label: Any, names: list[str] | None) -> bool:
    if names is None:
        return label is not None and label != -1
    return isinstance(label, int) and 0 <= label < len(names)


def _label_column(schema: pa.Schema, path: Path) -> str:
    for name in _LABEL_NAMES:
        if name in schema.names and _is_label(schema.field(name).type):
            return name
    others = [column.name for column in schema if _is_label(column.type)]
    if len(others) != 1:
        raise DataError(
            f"{path}: which of the columns {', '.join(schema.names)} is the label is not clear: "
            f"expected one called {' or '.join(_LABEL_NAMES)}, of integers or strings"
        )
    return others[0]


def _is_label(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
