"""Encoded bytes -> one image of the wanted size and colours. Which bytes is left to the readers."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitcut.errors import DataError
from vitcut.framing import WHOLE, Framing

_MAX_PIXELS = 89_478_485
"""Pillow warns from here on, and refuses at twice as many; here a warning is an error."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Pillow's plugins that may run; left alone, it starts Ghostscript for an x.jpg that is EPS."""

_PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode(content: bytes, image_size: int, framing: Framing = WHOLE) -> NDArray[np.uint8]:
    """Decode, and bring the part of the picture that a framing keeps to a size.

    The same as scaling first and cropping the centre afterwards, up to half a pixel. An image
    that has the size already, and is kept whole, is left as it is.

    Args:
        content: An image file.
        image_size: Height and width, in pixels.
        framing: The colours, which part is kept, and how it is scaled.

    Returns:
        uint8, shape [image_size, image_size, channels].

    Raises:
        DataError: The bytes are no JPEG, PNG, WebP, BMP, GIF, PPM, PGM or TIFF that Pillow reads,
            or not one of 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, a decompression bomb")
            fitted = np.asarray(_fit(_coloured(image, framing), image_size, framing))
            return fitted.reshape(image_size, image_size, framing.channels)
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address.
        raise DataError("not an image of a known format") from None
    except _PILLOW_ERRORS as error:
        raise DataError(" ".join(str(error).split())) from None


def _coloured(image: Image.Image, framing: Framing) -> Image.Image:
    if image.mode[0] in "IF":
        raise DataError(f"pixels of mode {image.mode!r}, expected 8 bits per channel")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("RGB")
    return image if framing.channels == 3 else image.convert("L")


def _fit(image: Image.Image, size: int, framing: Framing) -> Image.Image:
    shown = framing.shown_fraction(size)
    if image.size == (size, size) and shown == 1:
        return image
    sides = image.size if framing.fit == "squash" else (min(image.size),) * 2
    width, height = (side * shown for side in sides)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    # Cropping first: a picture of 1 x 10,000,000 pixels must not grow before it is cropped.
    box = (left, top, left + width, top + height)
    return image.resize((size, size), Image.Resampling[framing.interpolation.upper()], box=box)
