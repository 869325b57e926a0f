"""List the labelled images of class folders, of Tiny ImageNet and of parquet files."""

import json
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vitcut.errors import DataError, one_line
from vitcut.images.archives import FileTree
from vitcut.progress import say
from vitcut.store import sha256_file, sha256_json

RecordSplit = Literal["train", "test"]

_SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SPLIT_FOLDERS: dict[RecordSplit, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("val", "valid", "validation", "test", "testing"),
}
"""Names of the folders of each split, in any case; the first that exists is used."""
_CLASS_FOLDERS = (
    "CLASS/*.jpg for two classes or more, or train/CLASS/*.jpg and val/CLASS/*.jpg, "
    f"with images that end in {', '.join(_SUFFIXES)}"
)

_ANNOTATIONS = "val/val_annotations.txt"
_TINY_IMAGENET = "train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_PARQUET = "rows with an image (struct of bytes and path) and a label, of two classes or more"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One encoded image of a source."""

    split: RecordSplit | None
    """None where the data has only one part."""
    class_id: str
    """The class, as the data calls it."""
    path: str
    """Where the image is inside the source; unique."""


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """The labelled images of an archive, a folder, a parquet file or a dataset."""

    records: tuple[Record, ...]
    """Sorted by path."""
    class_names: dict[str, str]
    """Readable name of each class id; the id itself where no name is known."""
    fingerprint: str
    """Hex hash of the content, wherever it is stored."""
    read: Callable[[int], bytes]
    """Encoded bytes of the record at a position; safe to call from several threads."""
    class_order: tuple[str, ...] = ()
    """The classes in the order that the source gives them, with those of no image; empty if it
    gives none."""
    ordered_by: str = ""
    """What gives that order, for messages."""


def read_tree(tree: FileTree) -> ImageSource:
    """List the images of Tiny ImageNet, or of class folders.

    Tiny ImageNet is recognised by its list of validation labels. Its classes are those of the train
    folders, with 200 ids or fewer; bounding boxes and the unlabelled test images are ignored.

    Class folders are ``train/CLASS/...`` and ``val/CLASS/...``, or ``CLASS/...`` without splits. A
    class is named after its folder and may have subfolders. Images elsewhere are left out and
    counted; other files are ignored.

    Raises:
        DataError: There are no images, fewer than two classes, or Tiny ImageNet's list of
            validation labels does not match its images.
    """
    is_tiny = _ANNOTATIONS in tree.names
    expected = _TINY_IMAGENET if is_tiny else _CLASS_FOLDERS
    found = _tiny_imagenet_records(tree) if is_tiny else _class_folder_records(tree)
    records = _checked(found, location=tree.location, expected=expected)
    class_names = {record.class_id: record.class_id for record in records}
    if is_tiny and "words.txt" in tree.names:
        for line in tree.read_text("words.txt").splitlines():
            class_id, _, words = line.partition("\t")
            if class_id in class_names and words.strip():
                class_names[class_id] = words.strip()
    return ImageSource(
        records=records,
        class_names=class_names,
        fingerprint=tree.fingerprint,
        read=lambda position: tree.read(records[position].path),
    )


def read_parquet(files: list[Path], *, root: Path, location: str) -> ImageSource:
    """List the labelled images of parquet files as Hugging Face writes them.

    A file needs a struct column with the bytes of the images, and a label column. Its split is part
    of its name or folder, as in "train-00000.parquet". Files named "test" are used only if none is
    named for validation. Row groups are read when their images are needed.

    Args:
        files: At least one; all belong to the same dataset.
        root: The folder that file names are relative to.
        location: The source, for messages.

    Raises:
        DataError: A file is damaged or has no image or label column, or the files belong to several
            configurations of a dataset, which may contain the same images.
    """
    found: list[Record] = []
    places: dict[str, tuple[Path, str, int, int]] = {}  # file, column, row group, row in the group
    orders: set[tuple[str, ...]] = set()
    splits = _splits(files, root=root, location=location)
    for path, split in splits.items():
        name = path.relative_to(root).as_posix()
        with _open_parquet(path) as file:
            image_column, label_column = _columns(file.schema_arrow, path)
            class_ids, order = _class_ids(file, label_column, path)
            orders.add(order)
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            rows = [(at, row) for at, group in enumerate(groups) for row in range(group.num_rows)]
        for number, (class_id, (group, row)) in enumerate(zip(class_ids, rows, strict=True)):
            record = Record(split=split, class_id=class_id, path=f"{name}:{number:09d}")
            found.append(record)
            places[record.path] = (path, image_column, group, row)
    records = _checked(found, location=location, expected=_PARQUET)
    class_order = orders.pop() if len(orders) == 1 else _merged(orders)

    # Several threads ask for images in nearly ascending order, so a few row groups are enough.
    @lru_cache(maxsize=4)
    def images_of(path: Path, column: str, group: int) -> Any:
        # Opened anew each time: pyarrow's readers are not thread-safe.
        with _open_parquet(path) as file:
            table = file.read_row_group(group, columns=[column])
        return table.column(0).combine_chunks().field("bytes")

    def read(position: int) -> bytes:
        path, column, group, row = places[records[position].path]
        content = images_of(path, column, group)[row].as_py()
        if content is None:
            raise DataError("the row has a path instead of the bytes of the image")
        return content

    return ImageSource(
        records=records,
        class_names={record.class_id: record.class_id for record in records},
        fingerprint=sha256_json(
            [[path.relative_to(root).as_posix(), sha256_file(path)] for path in splits]
        ),
        read=read,
        class_order=class_order,
        ordered_by=f"the label column of {location}" if class_order else "",
    )


def _checked(records: list[Record], *, location: str, expected: str) -> tuple[Record, ...]:
    """Sort records by path, and drop the split where the data has only one part."""
    if not records:
        raise DataError(f"{location} has no images: expected {expected}")
    class_ids = {record.class_id for record in records}
    if len(class_ids) == 1:
        raise DataError(f"{location} has only one class, {class_ids.pop()!r}: expected {expected}")
    if len({record.split for record in records}) == 1:
        records = [replace(record, split=None) for record in records]
    return tuple(sorted(records, key=lambda record: record.path))


def _class_folder_records(tree: FileTree) -> list[Record]:
    images = [name for name in tree.names if name.lower().endswith(_SUFFIXES)]
    tops = sorted({name.split("/")[0] for name in images if name.count("/") > 1})
    split_of: dict[str, RecordSplit] = {}
    for split, names in _SPLIT_FOLDERS.items():
        existing = [top for name in names for top in tops if top.lower() == name]
        if existing:
            split_of[existing[0]] = split
    if "train" not in split_of.values():
        split_of = {}  # Classes may have the names of splits.
    records: list[Record] = []
    for name in images:
        folders = name.split("/")[:-1]
        if not split_of and folders:
            records.append(Record(split=None, class_id=folders[0], path=name))
        elif len(folders) > 1 and folders[0] in split_of:
            records.append(Record(split=split_of[folders[0]], class_id=folders[1], path=name))
    outside = sorted(set(images) - {record.path for record in records})
    if outside:
        places = " and ".join(f"{folder}/CLASS" for folder in split_of) or "class folders"
        say(
            f"data: left out {len(outside)} of {len(images)} images, which are outside {places}, "
            f"first {outside[0]!r}"
        )
    return records


def _tiny_imagenet_records(tree: FileTree) -> list[Record]:
    records: list[Record] = []
    for name in tree.names:
        parts = name.split("/")
        if len(parts) == 4 and parts[0] == "train" and parts[2] == "images":
            records.append(Record(split="train", class_id=parts[1], path=name))
    test_classes: dict[str, str] = {}
    for number, line in enumerate(tree.read_text(_ANNOTATIONS).splitlines(), start=1):
        fields = line.split()
        if len(fields) < 2:
            raise DataError(
                f"{tree.location}: line {number} of {_ANNOTATIONS} is {line!r}: "
                "expected 'FILE WNID x y x y'"
            )
        test_classes[f"val/images/{fields[0]}"] = fields[1]
    images = {name for name in tree.names if name.startswith("val/images/")}
    for names, problem in (
        (images - test_classes.keys(), f"not listed in {_ANNOTATIONS}"),
        (test_classes.keys() - images, "missing"),
    ):
        if names:
            raise DataError(
                f"{tree.location}: {len(names)} test images are {problem}, first {min(names)!r}: "
                f"expected {_TINY_IMAGENET}, get the data again"
            )
    if not records:
        raise DataError(f"{tree.location} has no training images: expected {_TINY_IMAGENET}")
    return records + [
        Record(split="test", class_id=class_id, path=name)
        for name, class_id in test_classes.items()
    ]


@contextmanager
def _open_parquet(path: Path) -> Generator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a complete parquet file: {one_line(error)}") from None


def _splits(files: list[Path], *, root: Path, location: str) -> dict[Path, RecordSplit | None]:
    """Choose the files to read, and tell their splits by their names."""
    val_words = {"val", "valid", "validation"}
    split_words = {"train", "test", "partial", *val_words}
    configurations: set[str] = set()
    words_of: dict[Path, set[str]] = {}
    for path in files:
        name = path.relative_to(root)
        words_of[path] = _words(name.as_posix())
        # Configurations differ in their folders, apart from folders named after a split.
        folders = [
            part for part in name.parent.parts if not _words(part) or _words(part) - split_words
        ]
        configurations.add(Path(*folders).as_posix())
    if len(configurations) > 1:
        raise DataError(
            f"{location} has files of {len(configurations)} configurations, "
            f"{', '.join(sorted(configurations))}: expected one; download a .parquet file of the "
            "one you want and give its path"
        )
    has_val = any(words & val_words for words in words_of.values())
    return {
        path: "train" if "train" in words else "test" if words & {"test", *val_words} else None
        for path, words in words_of.items()
        if not (has_val and "test" in words)
    }


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.lower()))


def _columns(schema: pa.Schema, path: Path) -> tuple[str, str]:
    """The names of the image column and of the label column."""
    names = ", ".join(schema.names)
    images = [
        column.name
        for column in schema
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    ]
    if not images:
        raise DataError(
            f"{path} has no image column among {names}: expected a struct with field 'bytes'"
        )
    is_label = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    labels = [column.name for column in schema if any(test(column.type) for test in is_label)]
    known = [name for name in _LABEL_COLUMNS if name in labels]
    if not known and len(labels) != 1:
        raise DataError(
            f"{path}: cannot tell which of the columns {names} is the label: expected integers or "
            f"strings in a column called {', '.join(_LABEL_COLUMNS[:-1])} or {_LABEL_COLUMNS[-1]}"
        )
    return images[0], (known or labels)[0]


def _merged(orders: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The numbers of several files in one order; lists of names may contradict each other."""
    numbers = [name.lstrip("-").isdecimal() for order in orders for name in order]
    if not all(numbers) or any(list(order) != sorted(order, key=int) for order in orders):
        return ()
    return tuple(sorted({name for order in orders for name in order}, key=int))


def _class_ids(file: pq.ParquetFile, column: str, path: Path) -> tuple[list[str], tuple[str, ...]]:
    """The class of each row, and the order of the classes if the labels are integers.

    A class is called by the name that the schema gives to its label, or by the label itself.
    """
    metadata: dict[bytes, Any] = file.schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names: list[str] | None = features[column].get("names")
    except (ValueError, KeyError, TypeError, AttributeError):
        names = None
    labels: Iterable[Any] = file.read(columns=[column]).column(0).to_pylist()
    if names is None:
        class_ids = [None if label in {None, -1} else str(label) for label in labels]
    else:
        class_ids = [
            names[label] if isinstance(label, int) and 0 <= label < len(names) else None
            for label in labels
        ]
    known = [class_id for class_id in class_ids if class_id is not None]
    if len(known) < len(class_ids):
        raise DataError(
            f"{path}: {len(class_ids) - len(known)} of {len(class_ids)} rows have no known label "
            f"in column {column!r}: expected one for every image"
        )
    if pa.types.is_integer(file.schema_arrow.field(column).type):
        return known, tuple(names or sorted(set(known), key=int))
    return known, ()
