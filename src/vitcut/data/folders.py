"""A folder or .zip of class folders: ROOT/train/CLASS/... and ROOT/val/CLASS/..., or one level.

A class is the first folder below its split; images may lie deeper. Other files are left out.
"""

from vitcut.data.archives import FileTree
from vitcut.data.records import Record, RecordSplit, Source, checked_records

_SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
_EXPECTED = (
    "CLASS/*.jpg for two classes or more, or train/CLASS/*.jpg and val/CLASS/*.jpg, "
    f"with images that end in {', '.join(_SUFFIXES)}"
)


def read_class_folders(tree: FileTree) -> Source:
    """List the images; a class is called what its folder is called.

    Raises:
        DataError: There are no images in class folders, or only one class.
    """
    images = [name for name in tree.names if name.lower().endswith(_SUFFIXES)]
    split_of = _split_folders({name.partition("/")[0] for name in images})
    records: list[Record] = []
    for name in images:
        folders = name.split("/")[:-1]
        if not split_of and folders:
            records.append(Record(split=None, class_id=folders[0], path=name))
        elif len(folders) > 1 and folders[0] in split_of:
            records.append(Record(split=split_of[folders[0]], class_id=folders[1], path=name))
    ordered = checked_records(records, location=tree.location, expected=_EXPECTED)
    return Source(
        records=ordered,
        class_names={record.class_id: record.class_id for record in ordered},
        fingerprint=tree.fingerprint,
        read=lambda position: tree.read(ordered[position].path),
    )


def _split_folders(tops: set[str]) -> dict[str, RecordSplit]:
    if "train" not in tops:
        return {}
    splits: dict[str, RecordSplit] = {"train": "train"}
    validation = next((name for name in _VALIDATION_FOLDERS if name in tops), None)
    if validation is not None:
        splits[validation] = "validation"
    return splits
