"""Decoded images in a cache: one uint8 array, an index and a meta file, keyed by content.

A cache folder is built beside its place and renamed when it is whole, so a killed run leaves none.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitcut.errors import ArtefactError, DataError, shortage
from vitcut.images.decoding import Picture, decode, told_turned
from vitcut.images.drawn import SOURCE_WORD, drawn_images
from vitcut.images.readers import ImageSource
from vitcut.images.settings import DataSettings
from vitcut.images.sources import open_source
from vitcut.labels import Labels
from vitcut.preprocessing import WHOLE, Framing
from vitcut.progress import Meter, say
from vitcut.runtime import usable_threads
from vitcut.settings import config_hash
from vitcut.store import atomic_folder, cache_dir, load, save, sha256_file, sweep
from vitcut.wordnet import imagenet_names, with_wordnet_ids

FORMAT_VERSION = 3
IMAGES_FILE = "images.npy"
_INDEX_FILE, _META_FILE = "index.parquet", "meta.json"
_DAMAGE = (ArtefactError, OSError, EOFError, ValueError, KeyError, pa.ArrowException)
_SLOW_BYTES = 1 << 30
"""About half a second of hashing, or two on a CPU without instructions for it."""
_BLOCK_IMAGES = 512
_MAX_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class _Meta:
    """The content of ``meta.json``."""

    source_fingerprint: str
    image_size: int
    channels: int
    images: int
    images_per_split: dict[str, int]
    class_names: dict[str, str]
    skipped: dict[str, str]
    num_turned: int
    files: dict[str, str]
    """SHA-256 of the files beside it, by name."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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
    """The name for people of each class id."""
    fingerprint: str
    """Hex, of the source's content."""
    skipped: dict[str, str]
    """What is wrong with the images that did not decode, by path."""
    num_turned: int
    """How many images have an EXIF orientation other than upright."""
    class_order: tuple[str, ...] = ()
    """As `ImageSource` has it."""
    ordered_by: str = ""

    @cached_property
    def labels(self) -> Labels:
        """The classes in the order of their ids; ImageNet's have its names, if no others."""
        ids = tuple(sorted(self.class_names))
        known = imagenet_names()
        names = tuple(
            known.get(own, own) if self.class_names[own] == own else self.class_names[own]
            for own in ids
        )
        labels = Labels(
            owner="the data",
            ids=ids,
            names=names,
            stated=self.class_order,
            stated_by=self.ordered_by,
        )
        return with_wordnet_ids(labels)


def prepare(settings: DataSettings, framing: Framing = WHOLE) -> PreparedData:
    """Decode a source into the cache, or find it there; drawn pictures never touch the disk.

    Args:
        settings: The source and the size.
        framing: Which part of each picture is kept. Of drawn pictures it sets only the channels.

    Raises:
        DataError: The source cannot be used, images do not decode, or the disk is full.
    """
    if settings.source == SOURCE_WORD:
        return _drawn(settings, framing.channels)
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    with open_source(settings.source, **columns) as source:
        # The default framing is left out, so that keys of earlier versions still hold.
        key = config_hash(
            FORMAT_VERSION,
            source.fingerprint,
            settings.image_size,
            *([] if framing == WHOLE else [framing.key()]),
        )
        folder = cache_dir() / "data" / key
        for place in (cache_dir(), folder.parent):
            sweep(place)
        found = folder.exists()
        if not found:
            _build(source, folder, settings, framing)
        prepared = open_prepared(folder)
        shape = (settings.image_size, settings.image_size, framing.channels)
        if (prepared.fingerprint, prepared.images.shape[1:]) != (source.fingerprint, shape):
            raise DataError(
                f"the prepared data is of another source or size: delete {folder} and run again"
            )
        # The order is no part of the cache.
        prepared = replace(prepared, class_order=source.class_order, ordered_by=source.ordered_by)
    _refuse_bad_images(prepared.skipped, len(prepared.images), settings)
    if prepared.skipped:
        say(f"left out: {_bad_images(prepared.skipped, len(prepared.images))}")
    if prepared.num_turned:
        say(f"data: {told_turned(prepared.num_turned, len(prepared.images), framing)}")
    say(
        f"data: {len(prepared.images)} images of {len(prepared.class_names)} classes, "
        f"{'found' if found else 'prepared'} in {folder}"
    )
    return prepared


def _drawn(settings: DataSettings, channels: int) -> PreparedData:
    """Drawn pictures as if they had been prepared: 150 for training and 50 for test per class."""
    per_class, train = 200, 150
    images, class_ids = drawn_images(
        images_per_class=per_class, seed=settings.seed, image_size=settings.image_size
    )
    if channels == 1:
        # What red, green and blue add to brightness (ITU-R 601), as Pillow has it.
        grey = images @ np.array([0.299, 0.587, 0.114], np.float32)
        images = grey.round().astype(np.uint8)[..., np.newaxis]
    numbers = np.arange(len(images)) % per_class
    return PreparedData(
        images=images,
        class_ids=class_ids,
        splits=np.where(numbers < train, "train", "test"),
        paths=np.array([f"{name}/{n}" for name, n in zip(class_ids, numbers, strict=True)]),
        class_names={str(name): str(name) for name in np.unique(class_ids)},
        fingerprint=config_hash(SOURCE_WORD, 1, settings.seed),
        skipped={},
        num_turned=0,
    )


def _build(source: ImageSource, folder: Path, settings: DataSettings, framing: Framing) -> None:
    """Decode every image into a new cache folder."""
    count, side = len(source.records), settings.image_size
    try:
        # Equal keys hold equal content: where another process was faster, its folder stays.
        with atomic_folder(folder, replace=False) as part:
            free, needed = shutil.disk_usage(folder.parent).free, count * side**2 * framing.channels
            if free < needed:
                raise DataError(
                    f"{folder.parent} has {free / 2**30:.2f} GiB left, expected "
                    f"{needed / 2**30:.2f} GiB for the decoded images: free some, or set "
                    "VITCUT_CACHE"
                )
            bad: dict[int, str] = {}
            num_turned = 0
            # A plain stream: a full disk is an error then, where a memory map would crash.
            with (part / IMAGES_FILE).open("wb") as stream:
                _write_header(stream, (count, side, side, framing.channels))
                with Meter("Decoding", count, unit="images") as meter:
                    for row, image in enumerate(_decoded(source, side, framing)):
                        if isinstance(image, str):
                            bad[row] = image
                        else:
                            stream.write(image.pixels.tobytes())
                            num_turned += image.orientation != 1
                        meter.advance()
                stream.seek(0)
                _write_header(stream, (count - len(bad), side, side, framing.channels))
                stream.flush()
                os.fsync(stream.fileno())
            skipped = {source.records[row].path: reason for row, reason in bad.items()}
            kept = [record for row, record in enumerate(source.records) if row not in bad]
            _refuse_bad_images(skipped, len(kept), settings)
            columns = {
                "split": [record.split or "" for record in kept],
                "class_id": [record.class_id for record in kept],
                "path": [record.path for record in kept],
            }
            pq.write_table(
                pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()}),
                part / _INDEX_FILE,
            )
            counts = Counter(record.split or "undivided" for record in kept)
            meta = _Meta(
                source_fingerprint=source.fingerprint,
                image_size=side,
                channels=framing.channels,
                images=len(kept),
                images_per_split=dict(sorted(counts.items())),
                class_names=dict(sorted(source.class_names.items())),
                skipped=skipped,
                num_turned=num_turned,
                files={name: sha256_file(part / name) for name in (IMAGES_FILE, _INDEX_FILE)},
            )
            save(part / _META_FILE, meta, version=FORMAT_VERSION)
    except OSError as error:
        if shortage(error):
            raise
        raise DataError(
            f"cannot write the decoded images into {folder.parent} ({error}): free some space, or "
            "set VITCUT_CACHE to a folder that can be written"
        ) from None


def _decoded(source: ImageSource, image_size: int, framing: Framing) -> Iterator[Picture | str]:
    """Every image in order, or what is wrong with it; decoded in threads, block by block."""

    def read(row: int) -> Picture | str:
        try:
            return decode(source.read(row), image_size, framing)
        except DataError as error:
            # Not the error itself, whose traceback would keep the content of the file.
            return str(error)

    count = len(source.records)
    with ThreadPoolExecutor(min(usable_threads(), _MAX_THREADS)) as pool:
        for start in range(0, count, _BLOCK_IMAGES):
            yield from pool.map(read, range(start, min(start + _BLOCK_IMAGES, count)))


def _write_header(stream: BinaryIO, shape: tuple[int, int, int, int]) -> None:
    """Write the head of a .npy file of images; numpy pads it, so it can be rewritten."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def open_prepared(folder: Path) -> PreparedData:
    """Open a prepared folder; the images stay on disk.

    Raises:
        DataError: A file of it is missing or damaged, or a newer vitcut wrote it.
    """
    try:
        meta = load(folder / _META_FILE, _Meta, kind="prepared data", version=FORMAT_VERSION)
        if (folder / IMAGES_FILE).stat().st_size > _SLOW_BYTES:
            say(f"checking the decoded images in {folder}")
        for name in (IMAGES_FILE, _INDEX_FILE):
            if sha256_file(folder / name) != meta.files.get(name):
                raise ValueError(f"{name} was altered: its hash is not the one in {_META_FILE}")
        images = np.load(folder / IMAGES_FILE, mmap_mode="r")
        with pq.ParquetFile(folder / _INDEX_FILE) as file:
            index = file.read().to_pydict()
        count = len(index["path"])
        if images.dtype != np.uint8 or images.shape != (
            meta.images,
            meta.image_size,
            meta.image_size,
            meta.channels,
        ):
            raise ValueError(f"its images are {images.shape} {images.dtype}")
        if not meta.images == count == len(set(index["path"])):
            raise ValueError(f"{meta.images} images were prepared, {count} are listed")
        if not set(index["class_id"]) <= meta.class_names.keys():
            raise ValueError("an image is of a class without a name")
        if not (set(index["split"]) <= {"train", "test"} or set(index["split"]) == {""}):
            raise ValueError(f"its splits are {sorted(map(str, set(index['split'])))}")
        return PreparedData(
            images=images,
            class_ids=np.array(index["class_id"], np.str_),
            splits=np.array(index["split"], np.str_),
            paths=np.array(index["path"], np.str_),
            class_names=meta.class_names,
            fingerprint=meta.source_fingerprint,
            skipped=meta.skipped,
            num_turned=meta.num_turned,
        )
    except _DAMAGE as error:
        if shortage(error):
            raise
        raise DataError(
            f"the prepared data is damaged ({error}): delete {folder} and run again"
        ) from None


def _refuse_bad_images(bad: dict[str, str], good: int, settings: DataSettings) -> None:
    """Stop at bad images, unless the user chose to skip them and good ones are left."""
    if bad and not (settings.skip_bad_images and good):
        raise DataError(
            f"{_bad_images(bad, good)}: repair them, or leave them out with --skip-bad-images"
        )


def _bad_images(bad: dict[str, str], good: int) -> str:
    first = [f"{path} ({reason})" for path, reason in islice(bad.items(), 5)]
    listed = ", ".join(first) + (", ..." if len(bad) > 5 else "")
    return f"{len(bad)} of {good + len(bad)} images do not decode: {listed}"
