"""List the labelled images of class folders, of Tiny ImageNet and of parquet files."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vitcut.errors import DataError, one_line
from vitcut.images.archives import FileTree
from vitcut.images.decoding import HEAD_BYTES, PICTURE_SUFFIXES, picture_format
from vitcut.progress import say
from vitcut.store import sha256_file, sha256_json

RecordSplit = Literal["train", "test"]

_SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_BESIDE_SPLIT = {
    "set", "sets", "image", "images", "img", "imgs", "data", "dataset", "seg", "split", "folder",
}  # fmt: skip
"""Words in the name of a split's folder, as in "seg_train", "training_set" or "test images"."""
_CLASS_FOLDERS = (
    "CLASS/*.jpg for two classes or more, or train/CLASS/*.jpg and val/CLASS/*.jpg, with images of "
    "a format that Pillow reads"
)

_ANNOTATIONS = "val/val_annotations.txt"
_TINY_IMAGENET_HOLDS = {"train", "val", "test", "wnids.txt", "words.txt"}
_TINY_IMAGENET = "train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_PARQUET = (
    "rows with an image (bytes, or a struct of bytes and path) and a label, of two classes or more"
)
_MOST_GROUP_BYTES = 2 << 30
"""The images of a row group are read at once."""


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


def named_pictures(tree: FileTree) -> list[str]:
    """The files that are pictures by their names."""
    return [name for name in tree.names if name.lower().endswith(PICTURE_SUFFIXES)]


def read_tree(tree: FileTree) -> ImageSource:
    """List the images of Tiny ImageNet, or of class folders.

    Tiny ImageNet is recognised by its list of validation labels. Its classes are those of the train
    folders, with 200 ids or fewer; bounding boxes and the unlabelled test images are ignored.

    Class folders are ``train/CLASS/...`` and ``val/CLASS/...``, ``CLASS/train/...`` and
    ``CLASS/val/...``, or ``CLASS/...`` without splits, in a folder of their own or not. A class is
    named after its folder and may have subfolders. What is left out is counted: images elsewhere,
    and files that are no images.

    Raises:
        DataError: There are no images, fewer than two classes, folders could be classes or splits,
            or Tiny ImageNet's list of validation labels does not match its images.
    """
    lists = [name for name in tree.names if f"/{name}".endswith(f"/{_ANNOTATIONS}")]
    class_names: dict[str, str] = {}
    if lists:
        tree = tree.below(lists[0].removesuffix(_ANNOTATIONS))
        records = _checked(
            _tiny_imagenet_records(tree), location=tree.location, expected=_TINY_IMAGENET
        )
        if "words.txt" in tree.names:
            lines = tree.read_text("words.txt").splitlines()
            class_names = {
                own: words.strip() for own, _, words in (s.partition("\t") for s in lines)
            }
        seen = [name for name in tree.names if name.split("/")[0] in _TINY_IMAGENET_HOLDS]
    else:
        pictures = _pictures(tree)
        top = _common_folder(pictures)
        tree = tree.below(top)
        found = _class_folder_records([name.removeprefix(top) for name in pictures], tree.location)
        records = _checked(found, location=tree.location, expected=_CLASS_FOLDERS)
        seen = [record.path for record in records]

    def read(position: int) -> bytes:
        with tree.open(records[position].path) as stream:
            # What is no picture is not read whole.
            head = stream.read(HEAD_BYTES)
            if picture_format(head) is None:
                raise DataError("not an image of a known format")
            return head + stream.read()

    return ImageSource(
        records=records,
        class_names={
            record.class_id: class_names.get(record.class_id) or record.class_id
            for record in records
        },
        fingerprint=tree.fingerprint(seen),
        read=read,
    )


def read_parquet(
    files: list[Path],
    *,
    root: Path,
    location: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """List the labelled images of parquet files as Hugging Face writes them.

    A file needs a column with the bytes of the images, alone or in a struct, and a label column.
    Its split is part of its name or folder, as in "train-00000.parquet". Files named "test" are
    used only if none is named for validation. Row groups are read when their images are needed.

    Args:
        files: At least one; all belong to the same dataset.
        root: The folder that file names are relative to.
        location: The source, for messages.
        image_column: The column with the images; None takes "image", or the only one there is.
        label_column: The column with the labels; None takes one with a usual name, or the only one.

    Raises:
        DataError: A file is damaged, or it has no image or label column or several, or the files
            belong to several configurations of a dataset, which may contain the same images.
    """
    found: list[Record] = []
    places: dict[str, tuple[Path, str, int, int]] = {}  # file, column, row group, row in the group
    orders: set[tuple[str, ...]] = set()
    unusual = (False, False)  # whether a file would be read from another column unless told
    guessed: set[str] = set()
    splits = _splits(files, root=root, location=location)
    for path, split in splits.items():
        name = path.relative_to(root).as_posix()
        with _open_parquet(path) as file:
            images_in, images_usual = _image_column(file.schema_arrow, image_column, path)
            labels_in, labels_usual = _label_column(
                file.schema_arrow, label_column, images_in, path
            )
            unusual = (unusual[0] or not images_usual, unusual[1] or not labels_usual)
            if label_column is None and labels_in not in _LABEL_COLUMNS:
                guessed.add(labels_in)
            class_ids, order = _class_ids(file, labels_in, path)
            orders.add(order)
            rows = _rows(file, len(class_ids), path)
        for number, (class_id, (group, row)) in enumerate(zip(class_ids, rows, strict=True)):
            record = Record(split=split, class_id=class_id, path=f"{name}:{number:09d}")
            found.append(record)
            places[record.path] = (path, images_in, group, row)
    records = _checked(found, location=location, expected=_PARQUET)
    for column in sorted(guessed):
        say(f"data: the label is taken from column {column!r}, the only one that can be it")
    chosen = [
        column if other else None
        for column, other in zip((image_column, label_column), unusual, strict=True)
    ]
    class_order = orders.pop() if len(orders) == 1 else _merged(orders, location)

    # Several threads ask for images in nearly ascending order, so a few row groups are enough.
    @lru_cache(maxsize=4)
    def images_of(path: Path, column: str, group: int) -> Any:
        # Opened anew each time: pyarrow's readers are not thread-safe.
        with _open_parquet(path) as file:
            table = file.read_row_group(group, columns=[column])
        return table.column(0)

    def read(position: int) -> bytes:
        path, column, group, row = places[records[position].path]
        group_images = images_of(path, column, group)
        if row >= len(group_images):
            raise DataError("the file is damaged: its row group lacks the row")
        found = group_images[row]
        inner = found["bytes"] if found.is_valid and pa.types.is_struct(found.type) else found
        content = inner.as_py()
        if content is None:
            raise DataError("the row has a path instead of the bytes of the image")
        return content

    return ImageSource(
        records=records,
        class_names={record.class_id: record.class_id for record in records},
        fingerprint=sha256_json(
            [
                *([path.relative_to(root).as_posix(), sha256_file(path)] for path in splits),
                # Left out where they change nothing: hashes of earlier versions still hold.
                *(name for name in (chosen,) if name != [None, None]),
            ]
        ),
        read=read,
        class_order=class_order,
        ordered_by=f"the label column of {location}" if class_order else "",
    )


def _rows(file: pq.ParquetFile, labels: int, path: Path) -> list[tuple[int, int]]:
    """The row group of each image of a file, and its row in the group."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > _MOST_GROUP_BYTES:
        raise DataError(
            f"{path} has a row group of {largest / 2**30:.1f} GiB, which would be read at once, "
            f"expected at most {_MOST_GROUP_BYTES / 2**30:g}: write it with smaller row groups"
        )
    claimed = sum(group.num_rows for group in groups)
    if labels != claimed:
        raise DataError(
            f"{path} is damaged: it has {labels} labels and claims {claimed} rows; get the file "
            "again"
        )
    return [(at, row) for at, group in enumerate(groups) for row in range(group.num_rows)]


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


def _pictures(tree: FileTree) -> list[str]:
    """The files that are pictures by their names or their content; the others are counted."""
    pictures: list[str] = []
    others: list[str] = []
    for name in tree.names:
        known = name.lower().endswith(PICTURE_SUFFIXES)
        if not known:
            with tree.open(name) as stream:
                known = picture_format(stream.read(HEAD_BYTES)) is not None
        (pictures if known else others).append(name)
    if others:
        kinds = Counter(PurePosixPath(name).suffix or "no suffix" for name in others)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3))
        more = ", ..." if len(kinds) > 3 else ""
        say(
            f"data: left out {len(others)} of {len(tree.names)} files, which are no pictures "
            f"({listed}{more}), first {others[0]!r}"
        )
    return pictures


def _common_folder(names: list[str]) -> str:
    """The folder, ending in "/", that holds all files and is not the only class; often ""."""
    top = ""
    while True:
        first = {name[len(top) :].partition("/")[0] for name in names}
        inner = f"{top}{first.pop()}/" if len(first) == 1 else ""
        if not inner or not any("/" in name[len(inner) :] for name in names):
            return top
        top = inner


def _class_folder_records(images: list[str], location: str) -> list[Record]:
    """The images of class folders, from their names below the folder that holds all of them."""
    inside = {name: name.split("/")[:-1] for name in images if "/" in name}
    kinds = _split_kinds({folders[0] for folders in inside.values() if len(folders) > 1})
    if "train" not in kinds:
        second = {folders[1] if len(folders) > 1 else "" for folders in inside.values()}
        kinds = _split_kinds(second)
        if "train" in kinds and len(kinds) > 1:  # CLASS/train and CLASS/test: turn them round
            if not all(map(_split_word, second)):
                raise DataError(
                    f"{location} has classes with folders for train and test, and images outside "
                    "these: expected CLASS/train and CLASS/test for all images, or for none"
                )
            inside = {name: [own[1], own[0], *own[2:]] for name, own in inside.items()}
        else:
            kinds = {}  # Classes may have the names of splits.
            tops = sorted({folders[0] for folders in inside.values()})
            if len(tops) > 1 and all(map(_split_word, tops)):
                raise DataError(
                    f"{location} has images in {', '.join(tops)}, which are names of splits, and "
                    f"tells no classes: expected {_CLASS_FOLDERS}"
                )
    splits: dict[str, RecordSplit] = {}
    for kind in ("train", "val" if "val" in kinds else "test"):
        folders = kinds.get(kind, [])
        if len(folders) > 1:
            raise DataError(
                f"{location} has {' and '.join(folders)}, which can each be the {kind} split: "
                "rename or merge them"
            )
        splits |= dict.fromkeys(folders, "train" if kind == "train" else "test")
    if splits:
        inside = _without_wrappers(
            {name: own for name, own in inside.items() if own[0] in splits and len(own) > 1}
        )
    records = [
        Record(
            split=splits[own[0]] if splits else None,
            class_id=unicodedata.normalize("NFC", own[1 if splits else 0]),
            path=name,
        )
        for name, own in inside.items()
    ]
    outside = sorted(set(images) - inside.keys())
    if outside:
        places = " and ".join(f"{folder}/CLASS" for folder in splits) or "class folders"
        say(
            f"data: left out {len(outside)} of {len(images)} images, which are outside {places}, "
            f"first {outside[0]!r}"
        )
    return records


def _split_word(folder: str) -> str | None:
    """The split that a folder is named after: train, val or test."""
    found = {_SPLIT_WORDS.get(word, word) for word in _words(folder) - _BESIDE_SPLIT}
    return found.pop() if len(found) == 1 and found <= {"train", "val", "test"} else None


def _split_kinds(folders: Iterable[str]) -> dict[str, list[str]]:
    """The folders that are named after each split, of those that are."""
    kinds: dict[str, list[str]] = {}
    for folder in sorted(folders):
        if (word := _split_word(folder)) is not None:
            kinds.setdefault(word, []).append(folder)
    return kinds


def _without_wrappers(inside: dict[str, list[str]]) -> dict[str, list[str]]:
    """Leave out a folder between a split and its classes, by the folders of each image.

    Some programs repeat the name of a split (seg_train/seg_train/CLASS), or put the classes of each
    into a folder of their own (train/images/CLASS and test/images/CLASS).
    """
    wrapper: dict[str, str | None] = {}
    for top in {own[0] for own in inside.values()}:
        ways = [own for own in inside.values() if own[0] == top]
        single = len({own[1] for own in ways}) == 1 and all(len(own) > 2 for own in ways)
        wrapper[top] = ways[0][1] if single else None
    if None in wrapper.values():
        wrapper = {
            top: name if name and _split_word(name) == _split_word(top) else None
            for top, name in wrapper.items()
        }
    return {
        name: own if wrapper[own[0]] is None else [own[0], *own[2:]] for name, own in inside.items()
    }


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
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
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
    unused = [path for path, words in words_of.items() if has_val and "test" in words]
    if unused:
        say(
            f"data: left out {len(unused)} of {len(files)} files, which are named test where "
            f"others are for validation, first {unused[0].name!r}"
        )
    return {
        path: "train" if "train" in words else "test" if words & {"test", *val_words} else None
        for path, words in words_of.items()
        if path not in unused
    }


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.lower()))


def holds_images(path: Path) -> bool:
    """Whether a parquet file has a column that can be the images.

    Raises:
        DataError: It is damaged.
    """
    with _open_parquet(path) as file:
        return bool(_image_columns(file.schema_arrow))


def _image_columns(schema: pa.Schema) -> list[str]:
    def has_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and has_bytes(kind.field("bytes").type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    return [column.name for column in schema if has_bytes(column.type)]


def _image_column(schema: pa.Schema, given: str | None, path: Path) -> tuple[str, bool]:
    """The column of the images, and whether it is the usual one: "image", or the only one."""
    found = _image_columns(schema)
    names, listed = ", ".join(schema.names), ", ".join(found)
    if not found:
        raise DataError(
            f"{path} has no image column among {names}: expected bytes, or a struct with field "
            "'bytes'"
        )
    if given is not None and given not in found:
        raise DataError(
            f"{path} has no images in a column {given!r}: expected one of {listed} as image-column"
        )
    usual = "image" if "image" in found else found[0] if len(found) == 1 else None
    chosen = given or usual
    if chosen is None:
        raise DataError(
            f"{path} has several columns that can be the images, {listed}: say which with "
            "--image-column"
        )
    return chosen, chosen == usual


def _label_column(schema: pa.Schema, given: str | None, image: str, path: Path) -> tuple[str, bool]:
    """The column of the labels, and whether it is the usual one: by its name, or the only one."""

    def is_label(kind: pa.DataType) -> bool:
        if pa.types.is_dictionary(kind):
            return is_label(kind.value_type)
        kinds = pa.types
        tests = (kinds.is_integer, kinds.is_boolean, kinds.is_string, kinds.is_large_string)
        return any(test(kind) for test in tests)

    found = [column.name for column in schema if is_label(column.type) and column.name != image]
    names, listed = ", ".join(schema.names), ", ".join(found)
    if given is not None and given not in found:
        raise DataError(
            f"{path} has no labels in a column {given!r}: expected one of {listed or 'none'} as "
            "label-column"
        )
    usual = [name for name in _LABEL_COLUMNS if name in schema.names and name != image]
    known = [name for name in usual if name in found] or found
    if given is None and usual and not set(usual) & set(found):
        raise DataError(
            f"{path}: its column {usual[0]} is {schema.field(usual[0]).type}, expected integers, "
            "strings or booleans: write it so, or say another with --label-column"
        )
    if given is None and len(known) != 1:
        raise DataError(
            f"{path}: cannot tell which of the columns {names} is the label: expected integers, "
            "strings or booleans in one that is called label, labels, fine_label or class; say "
            "which with --label-column"
        )
    return given or known[0], [given or known[0]] == known


def _merged(orders: set[tuple[str, ...]], location: str) -> tuple[str, ...]:
    """The numbers of several files in one order.

    Raises:
        DataError: They are not all plain numbers: the files would mean different classes.
    """
    numbers = [name.lstrip("-").isdecimal() for order in orders for name in order]
    if (
        () in orders
        or not all(numbers)
        or any(list(order) != sorted(order, key=int) for order in orders)
    ):
        told = " and ".join(repr(order[:3]) if order else "text" for order in sorted(orders)[:2])
        raise DataError(
            f"the parquet files of {location} label their classes differently, {told}: write all "
            "with the same label names, in the same order"
        )
    return tuple(sorted({name for order in orders for name in order}, key=int))


def _class_ids(file: pq.ParquetFile, column: str, path: Path) -> tuple[list[str], tuple[str, ...]]:
    """The class of each row, and the order of the classes if the labels are integers.

    A class is called by the name that the schema gives to its label, or by the label itself.
    """
    metadata: dict[bytes, Any] = file.schema_arrow.metadata or {}
    names: Any = None
    # Other programs keep other things there.
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column].get("names")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        names = None
    labels: list[Any] = file.read(columns=[column]).column(0).to_pylist()
    if names is None or any(isinstance(label, str) for label in labels):
        class_ids = [None if label in {None, -1} else str(label) for label in labels]
    else:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DataError(f"{path} has two labels that are called {twice[0]!r}: rename one")
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
