"""Decode image files into square uint8 arrays, as a model's preprocessing asks for them."""

import io
import struct
import zlib
from contextlib import nullcontext, suppress
from functools import cache
from importlib import import_module
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vitcut.errors import DataError, one_line
from vitcut.preprocessing import WHOLE, Framing

HEAD_BYTES = 1024
"""From so many, a format is told."""
PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Files that are pictures by name, in any case; the content of all others is looked at."""

_MAX_PIXELS = 89_478_485
"""Pillow warns above this and refuses above twice as many; here both are errors."""
_LARGE_PIXELS, _ONE_AT_A_TIME = 1 << 24, Lock()
"""Pictures above this are decoded one at a time, because each can take a GiB."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000", "HEIF")
"""The Pillow plugins that may run; by default Pillow runs Ghostscript on an x.jpg that is EPS."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")

_PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class Picture(NamedTuple):
    """A decoded image file."""

    pixels: NDArray[np.uint8]
    """Shape [height, width, channels]."""
    orientation: int
    """As EXIF numbers it: 1 is upright, 2 to 8 are turned or mirrored."""


def picture_format(head: bytes) -> str | None:
    """Tell the format of an image file by its first bytes, whatever its name.

    Args:
        head: The first `HEAD_BYTES` of the file, or all of it.

    Returns:
        Pillow's name of the format, or None if it is none of those that are read.
    """
    for name in _plugins():
        accepts = Image.OPEN[name][1]
        accepted = accepts is not None and accepts(head)
        if not accepted or isinstance(accepted, str):  # a text says what is not installed
            continue
        if name in {"BMP", "PPM"}:
            # They begin with two letters only, as a text may.
            try:
                Image.open(io.BytesIO(head), formats=(name,)).close()
            except _PILLOW_ERRORS:
                continue
        return name
    return "HEIF" if _is_heic(head) else None


def decode(content: bytes, image_size: int | None, framing: Framing = WHOLE) -> Picture:
    """Decode an image file, crop it and resize it.

    Equals resizing first and cropping the centre afterwards, up to half a pixel. An image that
    already has the size and is not cropped stays untouched.

    Args:
        content: The bytes of an image file.
        image_size: Height and width of the result, in pixels; None keeps the whole picture.
        framing: Channels, orientation, crop and interpolation.

    Raises:
        DataError: Pillow cannot read the bytes as JPEG, PNG, WebP, BMP, GIF, PPM, PGM, TIFF, AVIF
            or JPEG 2000 (and HEIC, if pillow-heif is installed) with 8 bits per channel.
    """
    channels = framing.channels
    try:
        with Image.open(io.BytesIO(content), formats=_plugins()) as opened:
            count = opened.width * opened.height
            if count > _MAX_PIXELS:
                raise DataError(f"{opened.width} x {opened.height} pixels, a decompression bomb")
            if opened.mode[0] in "IF":
                raise DataError(f"pixels of mode {opened.mode!r}, expected 8 bits per channel")
            with _ONE_AT_A_TIME if count > _LARGE_PIXELS else nullcontext():
                image, orientation = opened, _orientation(opened)
                if orientation != 1 and framing.orientation == "apply":
                    image = ImageOps.exif_transpose(image)
                if "transparency" in image.info:
                    image = image.convert("RGBA")  # Pillow warns when it converts to RGB at once.
                image = image.convert("RGB")
                if channels == 1:
                    image = image.convert("L")
                size = image.size if image_size is None else (image_size, image_size)
                shown = 1.0 if image_size is None else framing.shown_fraction(image_size)
                if image.size != size or shown != 1:
                    sides = image.size if framing.fit == "squash" else (min(image.size),) * 2
                    width, height = (side * shown for side in sides)
                    left, top = (image.width - width) / 2, (image.height - height) / 2
                    # Crop and resize in one call: resizing first could need far more memory, for
                    # example for an image of 1 x 10,000,000 pixels.
                    image = image.resize(
                        size,
                        Image.Resampling[framing.interpolation.upper()],
                        box=(left, top, left + width, top + height),
                    )
                pixels = np.asarray(image).reshape(*reversed(size), channels)
                return Picture(pixels, orientation)
    except UnidentifiedImageError:
        if _is_heic(content) and "HEIF" not in _plugins():
            raise DataError('HEIC, which needs a package: pip install "vitcut[heif]"') from None
        # Pillow's own message contains a memory address.
        raise DataError("not an image of a known format") from None
    except _PILLOW_ERRORS as error:
        raise DataError(one_line(error)) from None


def told_turned(count: int, total: int, framing: Framing) -> str:
    """How many pictures have an EXIF orientation, and what is done about it."""
    told = {
        "apply": "turned as it says; --orientation ignore takes pixels as they are stored",
        "ignore": "ignored, as timm and torchvision do; --orientation apply turns them",
    }
    return (
        f"{count} of {total} pictures have an EXIF orientation, which is "
        f"{told[framing.orientation]}"
    )


def _orientation(image: Image.Image) -> int:
    """What EXIF or XMP say; broken entries say nothing.

    Pillow turns TIFF by itself, as everyone who reads with it does, and so does pillow-heif.
    """
    image.load()
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*_PILLOW_ERRORS, Warning):
        return 1
    return found if found in range(2, 9) else 1


def _is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


@cache
def _plugins() -> tuple[str, ...]:
    """Those of the formats that this installation reads."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
