"""Encoded bytes -> one RGB image of the wanted size. Which bytes is left to the readers."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitcut.errors import DataError

_MAX_PIXELS = 89_478_485
"""Pillow warns from here on, and refuses at twice as many; here a warning is an error."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Pillow's plugins that may run; left alone, it starts Ghostscript for an x.jpg that is EPS."""

_PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode(content: bytes, image_size: int) -> NDArray[np.uint8]:
    """Decode to RGB, and bring the central square to ``image_size`` (bicubic).

    The same as scaling the shorter side to ``image_size`` and cropping the centre. An image that
    has the size already is left as it is.

    Returns:
        uint8, shape [image_size, image_size, 3].

    Raises:
        DataError: The bytes are no JPEG, PNG, WebP, BMP, GIF, PPM, PGM or TIFF that Pillow reads,
            or not one of 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, a decompression bomb")
            return np.asarray(_fit(_rgb(image), image_size))
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address.
        raise DataError("not an image of a known format") from None
    except _PILLOW_ERRORS as error:
        raise DataError(" ".join(str(error).split())) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        raise DataError(f"pixels of mode {image.mode!r}, expected 8 bits per channel")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fit(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Cropping first: a picture of 1 x 10,000,000 pixels must not grow before it is cropped.
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
