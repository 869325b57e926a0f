"""What every reader hands over: a list of records, and their encoded bytes on demand.

Which source a user meant is decided in `sources`; decoding is left to `decoding`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from vitcut.errors import DataError

RecordSplit = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image that has not been decoded yet."""

    split: RecordSplit | None
    """None where the data has only one part."""
    class_id: str
    """What the data calls the class."""
    path: str
    """Where the image is inside the source; unique."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images of one archive, folder, parquet file or dataset."""

    records: tuple[Record, ...]
    class_names: dict[str, str]
    """What a person calls each class id; the id itself where nothing better is known."""
    fingerprint: str
    """Hex; equal content, equal fingerprint, wherever it lies."""
    read: Callable[[int], bytes]
    """The encoded bytes of the record at a position; may be called from several threads."""


def checked_records(records: list[Record], *, location: str, expected: str) -> tuple[Record, ...]:
    """Sort records by path, and drop the split where the data has only one part.

    Args:
        records: In any order.
        location: The source, for messages.
        expected: The layout that was looked for, for messages.

    Raises:
        DataError: There are no images, or fewer than two classes.
    """
    if not records:
        raise DataError(f"{location} holds no images: expected {expected}")
    classes = {record.class_id for record in records}
    if len(classes) == 1:
        raise DataError(
            f"{location} holds only one class, {next(iter(classes))!r}: expected {expected}"
        )
    if len({record.split for record in records}) == 1:
        records = [replace(record, split=None) for record in records]
    return tuple(sorted(records, key=lambda record: record.path))
