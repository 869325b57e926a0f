"""Decode image files into square uint8 arrays, as a model's preprocessing asks for them."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitcut.errors import DataError, one_line
from vitcut.preprocessing import WHOLE, Framing

_MAX_PIXELS = 89_478_485
"""Pillow warns above this and refuses above twice as many; here both are errors."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""The Pillow plugins that may run; by default Pillow runs Ghostscript on an x.jpg that is EPS."""

_PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode(content: bytes, image_size: int, framing: Framing = WHOLE) -> NDArray[np.uint8]:
    """Decode an image file, crop it and resize it.

    Equals resizing first and cropping the centre afterwards, up to half a pixel. An image that
    already has the size and is not cropped stays untouched.

    Args:
        content: The bytes of an image file.
        image_size: Height and width of the result, in pixels.
        framing: Channels, crop and interpolation.

    Returns:
        uint8, shape [image_size, image_size, channels].

    Raises:
        DataError: Pillow cannot read the bytes as JPEG, PNG, WebP, BMP, GIF, PPM, PGM or TIFF with
            8 bits per channel.
    """
    channels, shown = framing.channels, framing.shown_fraction(image_size)
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise DataError(f"{opened.width} x {opened.height} pixels, a decompression bomb")
            if opened.mode[0] in "IF":
                raise DataError(f"pixels of mode {opened.mode!r}, expected 8 bits per channel")
            image = opened
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns when it converts these to RGB at once.
            image = image.convert("RGB")
            if channels == 1:
                image = image.convert("L")
            if image.size != (image_size, image_size) or shown != 1:
                sides = image.size if framing.fit == "squash" else (min(image.size),) * 2
                width, height = (side * shown for side in sides)
                left, top = (image.width - width) / 2, (image.height - height) / 2
                # Crop and resize in one call: resizing first could need far more memory, for
                # example for an image of 1 x 10,000,000 pixels.
                image = image.resize(
                    (image_size, image_size),
                    Image.Resampling[framing.interpolation.upper()],
                    box=(left, top, left + width, top + height),
                )
            return np.asarray(image).reshape(image_size, image_size, channels)
    except UnidentifiedImageError:
        # Pillow's own message contains a memory address.
        raise DataError("not an image of a known format") from None
    except _PILLOW_ERRORS as error:
        raise DataError(one_line(error)) from None
