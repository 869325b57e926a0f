"""Decoded images in a cache: one uint8 array, an index and what was found, keyed by content.

A cache folder is built beside its place and renamed when it is whole, so a killed run leaves none.
Which images a task needs is left to `images`.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitcut.errors import DataError
from vitcut.framing import WHOLE, Framing
from vitcut.images.decoding import decode
from vitcut.images.drawn import SOURCE_WORD, drawn_data
from vitcut.images.prepared import (
    FORMAT_VERSION,
    IMAGES_FILE,
    PreparedData,
    open_prepared,
    write_header,
    write_index,
)
from vitcut.images.readers import ImageSource
from vitcut.images.settings import DataSettings
from vitcut.images.sources import open_source
from vitcut.progress import Meter, say
from vitcut.settings import config_hash
from vitcut.store import atomic_folder, cache_dir

_BLOCK_IMAGES = 512
_MAX_THREADS = 8


def prepare(config: DataSettings, framing: Framing = WHOLE) -> PreparedData:
    """Decode a source into the cache, or find it there; drawn pictures never touch the disk.

    Args:
        config: The source and the size.
        framing: What is kept of each picture; drawn ones are drawn to fit, it gives their colours.

    Raises:
        DataError: The source cannot be used, images do not decode, or the disk is full.
    """
    if config.source == SOURCE_WORD:
        return drawn_data(image_size=config.image_size, seed=config.seed, channels=framing.channels)
    with open_source(config.source) as source:
        key = config_hash(
            FORMAT_VERSION, source.fingerprint, config.image_size, *differing(framing)
        )
        folder = cache_dir() / "data" / key
        found = folder.exists()
        if not found:
            _build(source, folder, config, framing)
    prepared = open_prepared(folder)
    _refuse_bad_images(prepared.skipped, len(prepared.images), config)
    if prepared.skipped:
        say(f"left out: {_bad_images(prepared.skipped, len(prepared.images))}")
    say(
        f"data: {len(prepared.images)} images of {len(prepared.class_names)} classes, "
        f"{'found' if found else 'prepared'} in {folder}"
    )
    return prepared


def differing(framing: Framing) -> list[dict[str, Any]]:
    """A framing as part of a key: nothing for the default, which older keys did not name."""
    return [] if framing == WHOLE else [asdict(framing)]


def _build(source: ImageSource, folder: Path, config: DataSettings, framing: Framing) -> None:
    size = config.image_size
    try:
        # Equal keys hold equal content: where another process was faster, its folder stays.
        with atomic_folder(folder, replace=False) as part:
            _require_space(folder.parent, len(source.records) * size * size * framing.channels)
            with (part / IMAGES_FILE).open("wb") as stream:
                bad = _write_images(stream, source, size, framing)
            skipped = {source.records[row].path: reason for row, reason in bad.items()}
            kept = [record for row, record in enumerate(source.records) if row not in bad]
            _refuse_bad_images(skipped, len(kept), config)
            write_index(part, source, kept=kept, image_size=size, skipped=skipped)
    except OSError as error:
        raise DataError(
            f"cannot write the decoded images into {folder.parent} ({error}): free some space, or "
            "set VITCUT_CACHE to a folder that can be written"
        ) from None


def _write_images(
    stream: BinaryIO, source: ImageSource, size: int, framing: Framing
) -> dict[int, str]:
    """Write a .npy file of all images that decode; returns what is wrong with the others.

    Written as a plain stream: a full disk is then an error, where a memory map would crash.
    """
    count = len(source.records)
    shape = (size, size, framing.channels)
    write_header(stream, (count, *shape))
    bad: dict[int, str] = {}
    with Meter("Decoding", count, unit="images") as meter:
        for row, image in enumerate(_decoded(source, size, framing)):
            if isinstance(image, DataError):
                bad[row] = str(image)
            else:
                stream.write(image.tobytes())
            meter.advance()
    stream.seek(0)
    write_header(stream, (count - len(bad), *shape))
    stream.flush()
    os.fsync(stream.fileno())
    return bad


def _decoded(
    source: ImageSource, size: int, framing: Framing
) -> Iterator[NDArray[np.uint8] | DataError]:
    def read(row: int) -> NDArray[np.uint8] | DataError:
        try:
            return decode(source.read(row), size, framing)
        except DataError as error:
            return error

    count = len(source.records)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        for start in range(0, count, _BLOCK_IMAGES):
            yield from pool.map(read, range(start, min(start + _BLOCK_IMAGES, count)))


def _refuse_bad_images(bad: dict[str, str], good: int, config: DataSettings) -> None:
    """Bad images stop the run, unless the user said to skip them and some are left."""
    if bad and not (config.skip_bad_images and good):
        raise DataError(
            f"{_bad_images(bad, good)}: mend them, or leave them out with --skip-bad-images"
        )


def _bad_images(bad: dict[str, str], good: int) -> str:
    first = [f"{path} ({reason})" for path, reason in islice(bad.items(), 5)]
    listed = ", ".join(first) + (", ..." if len(bad) > 5 else "")
    return f"{len(bad)} of {good + len(bad)} images do not decode: {listed}"


def _require_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DataError(
            f"{folder} has {free / 2**30:.2f} GiB left, expected {needed_bytes / 2**30:.2f} GiB "
            "for the decoded images: free some, or set VITCUT_CACHE"
        )
