"""The format of prepared data: an array, an index and a meta file in one folder.

Filling such a folder from a source is left to `prepare`.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitcut.errors import ArtefactError, DataError
from vitcut.images.readers import ImageSource, Record
from vitcut.store import read_json, write_json

FORMAT_VERSION = 2
IMAGES_FILE = "images.npy"

_INDEX_FILE = "index.parquet"
_DAMAGE = (ArtefactError, OSError, EOFError, ValueError, KeyError, pa.ArrowException)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """All images of a source at one size, and where they came from."""

    images: NDArray[np.uint8]
    """Shape [images, image_size, image_size, channels]; mapped read-only from disk."""
    class_ids: NDArray[np.character]
    """Shape [images]."""
    splits: NDArray[np.character]
    """Shape [images]; "train" or "test", or "" throughout where the data has one part."""
    paths: NDArray[np.character]
    """Unique names inside the source, shape [images]."""
    class_names: dict[str, str]
    """What a person calls each class id."""
    fingerprint: str
    """Hex, of the source's content."""
    skipped: dict[str, str]
    """What is wrong with the images that did not decode, by path."""


def open_prepared(folder: Path) -> PreparedData:
    """Open a prepared folder; the images stay on disk.

    Raises:
        DataError: A file of it is missing or damaged, or a newer vitcut wrote it.
    """
    try:
        meta = read_json(folder / "meta.json", kind="prepared data", newest_version=FORMAT_VERSION)
        images = np.load(folder / IMAGES_FILE, mmap_mode="r")
        with pq.ParquetFile(folder / _INDEX_FILE) as file:
            index = file.read().to_pydict()
        if not meta["images"] == len(images) == len(index["path"]):
            raise ValueError(f"{meta['images']} images were prepared, {len(images)} are there")
        return PreparedData(
            images=images,
            class_ids=np.array(index["class_id"], np.str_),
            splits=np.array(index["split"], np.str_),
            paths=np.array(index["path"], np.str_),
            class_names=meta["class_names"],
            fingerprint=meta["source_fingerprint"],
            skipped=meta["skipped"],
        )
    except _DAMAGE as error:
        raise DataError(
            f"the prepared data is damaged ({error}): delete {folder} and run again"
        ) from None


def write_header(stream: BinaryIO, shape: tuple[int, int, int, int]) -> None:
    """Write the head of a .npy file of images; numpy pads it, so it can be rewritten."""
    description = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(stream, description)


def write_index(
    folder: Path,
    source: ImageSource,
    *,
    kept: list[Record],
    image_size: int,
    skipped: dict[str, str],
) -> None:
    """Write what belongs to the images: one row for each that was kept, and the meta file."""
    columns = {
        "split": [record.split or "" for record in kept],
        "class_id": [record.class_id for record in kept],
        "path": [record.path for record in kept],
    }
    pq.write_table(
        pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()}),
        folder / _INDEX_FILE,
    )
    counts = Counter(record.split or "undivided" for record in kept)
    meta = {
        "format_version": FORMAT_VERSION,
        "source_fingerprint": source.fingerprint,
        "image_size": image_size,
        "images": len(kept),
        "images_per_split": dict(sorted(counts.items())),
        "class_names": dict(sorted(source.class_names.items())),
        "skipped": skipped,
    }
    write_json(folder / "meta.json", meta)
