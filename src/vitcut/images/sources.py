"""What a user means by ``--source``: picks the reader. Drawn pictures are left to `drawn`."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vitcut.errors import DataError
from vitcut.images.archives import open_tree
from vitcut.images.download import fetch_parquet_files, fetch_tiny_imagenet
from vitcut.images.folders import read_class_folders
from vitcut.images.parquet import read_parquet
from vitcut.images.records import Source
from vitcut.images.tiny_imagenet import is_tiny_imagenet, read_tiny_imagenet

_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@contextmanager
def open_source(source: str | None) -> Generator[Source]:
    """Open an archive, folder, parquet file or dataset for reading.

    Args:
        source: As in `DataSettings`, except "drawn".

    Raises:
        DataError: It does not exist, or is none of these.
    """
    path = fetch_tiny_imagenet() if source is None else Path(source).expanduser()
    if not path.exists():
        yield _read_dataset(str(source))
    elif path.suffix == ".parquet":
        yield read_parquet([path], root=path.parent, location=str(path))
    else:
        with open_tree(path) as tree:
            yield read_tiny_imagenet(tree) if is_tiny_imagenet(tree) else read_class_folders(tree)


def _read_dataset(source: str) -> Source:
    if not _DATASET_ID.fullmatch(source) or Path(source).suffix in {".zip", ".parquet"}:
        raise DataError(
            f"source {source!r} does not exist: expected a .zip, a folder, a .parquet file, a "
            "Hugging Face dataset id (org/name) or 'drawn'"
        )
    root, files = fetch_parquet_files(source)
    return read_parquet(files, root=root, location=source)
