"""A folder or .zip of class folders: ROOT/train/CLASS/... and ROOT/val/CLASS/..., or one level.

A class is the first folder below its split; images may lie deeper. Images that lie elsewhere are
left out, with a count; other files are left out.
"""

from vitcut.images.archives import FileTree
from vitcut.images.records import Record, RecordSplit, Source, checked_records
from vitcut.progress import say

_SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SPLIT_FOLDERS: dict[RecordSplit, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("val", "valid", "validation", "test", "testing"),
}
"""What the folder of a split may be called, in any case; an earlier name goes before a later."""
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
    split_of = _split_folders({name.split("/")[0] for name in images if name.count("/") > 1})
    records: list[Record] = []
    for name in images:
        folders = name.split("/")[:-1]
        if not split_of and folders:
            records.append(Record(split=None, class_id=folders[0], path=name))
        elif len(folders) > 1 and folders[0] in split_of:
            records.append(Record(split=split_of[folders[0]], class_id=folders[1], path=name))
    _say_left_out(images, records, split_of)
    ordered = checked_records(records, location=tree.location, expected=_EXPECTED)
    return Source(
        records=ordered,
        class_names={record.class_id: record.class_id for record in ordered},
        fingerprint=tree.fingerprint,
        read=lambda position: tree.read(ordered[position].path),
    )


def _split_folders(tops: set[str]) -> dict[str, RecordSplit]:
    """The splits of top folders that hold folders; empty where none of them is for training."""
    splits: dict[str, RecordSplit] = {}
    for split, names in _SPLIT_FOLDERS.items():
        found = [top for name in names for top in sorted(tops) if top.lower() == name]
        if found:
            splits[found[0]] = split
    return splits if "train" in splits.values() else {}


def _say_left_out(
    images: list[str], records: list[Record], split_of: dict[str, RecordSplit]
) -> None:
    left_out = sorted(set(images) - {record.path for record in records})
    if left_out:
        places = " and ".join(f"{folder}/CLASS" for folder in split_of) or "class folders"
        say(
            f"data: left out {len(left_out)} of {len(images)} images, which lie outside {places}, "
            f"first {left_out[0]!r}"
        )
