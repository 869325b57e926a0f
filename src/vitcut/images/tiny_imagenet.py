"""Tiny ImageNet in its official layout, with 200 ids or fewer, from a .zip or a folder.

The classes are those of the train folders; bounding boxes and the unlabelled test images are
left out.
"""

from vitcut.errors import DataError
from vitcut.images.archives import FileTree
from vitcut.images.records import Record, Source, checked_records

_ANNOTATIONS = "val/val_annotations.txt"
_EXPECTED = "train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"


def is_tiny_imagenet(tree: FileTree) -> bool:
    """Whether the files follow Tiny ImageNet's layout."""
    return _ANNOTATIONS in tree.names


def read_tiny_imagenet(tree: FileTree) -> Source:
    """List the labelled images.

    Raises:
        DataError: The layout is broken: no training images, or a test image without label.
    """
    records = [*_train_records(tree), *_test_records(tree)]
    if not any(record.split == "train" for record in records):
        raise DataError(f"{tree.location} has no training images: expected {_EXPECTED}")
    ordered = checked_records(records, location=tree.location, expected=_EXPECTED)
    return Source(
        records=ordered,
        class_names=_class_names(tree, {record.class_id for record in ordered}),
        fingerprint=tree.fingerprint,
        read=lambda position: tree.read(ordered[position].path),
    )


def _train_records(tree: FileTree) -> list[Record]:
    records: list[Record] = []
    for name in tree.names:
        parts = name.split("/")
        if len(parts) == 4 and parts[0] == "train" and parts[2] == "images":
            records.append(Record(split="train", class_id=parts[1], path=name))
    return records


def _test_records(tree: FileTree) -> list[Record]:
    images = {name for name in tree.names if name.startswith("val/images/")}
    labels: dict[str, str] = {}
    for number, line in enumerate(tree.read_text(_ANNOTATIONS).splitlines(), start=1):
        fields = line.split()
        if len(fields) < 2:
            raise DataError(
                f"{tree.location}: line {number} of {_ANNOTATIONS} is {line!r}: "
                "expected 'FILE WNID x y x y'"
            )
        labels[f"val/images/{fields[0]}"] = fields[1]
    _refuse_any(images - labels.keys(), tree, f"without a line in {_ANNOTATIONS}")
    _refuse_any(labels.keys() - images, tree, "missing")
    return [Record(split="test", class_id=class_id, path=name) for name, class_id in labels.items()]


def _refuse_any(names: set[str], tree: FileTree, what: str) -> None:
    if names:
        raise DataError(
            f"{tree.location}: {len(names)} test images are {what}, first "
            f"{min(names)!r}: expected {_EXPECTED}, get the data again"
        )


def _class_names(tree: FileTree, class_ids: set[str]) -> dict[str, str]:
    names = {class_id: class_id for class_id in sorted(class_ids)}
    if "words.txt" in tree.names:
        for line in tree.read_text("words.txt").splitlines():
            class_id, _, words = line.partition("\t")
            if class_id in names and words.strip():
                names[class_id] = words.strip()
    return names
