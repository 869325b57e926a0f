"""Encoded bytes to pixels."""

import io

import numpy as np
import pytest
from data_samples import encoded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitcut.data import decoding
from vitcut.data.decoding import decode
from vitcut.errors import DataError


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]),
)
def test_any_shape_and_mode_becomes_a_square_of_rgb(width: int, height: int, mode: str) -> None:
    image = decode(encoded(255, size=(width, height), mode=mode), 16)
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8
    assert (image == 255).all()


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_an_image_of_the_right_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(_png(pixels), 16), pixels)


def test_the_centre_of_a_wide_image_is_kept() -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    image = decode(_png(pixels), 16)
    assert (image[:, 4:12] == 200).all()
    assert (image > 150).all()


def test_a_palette_with_transparency_decodes_without_a_warning() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 250, 0, 0])
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=b"\x10\xf0")
    assert (decode(stream.getvalue(), 8) == [250, 0, 0]).all()


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"text", encoded(size=(64, 64))[:60]])
def test_what_is_no_whole_image_is_refused(content: bytes) -> None:
    with pytest.raises(DataError):
        decode(content, 8)


def test_a_format_that_needs_another_program_is_not_tried() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    with pytest.raises(DataError, match="not an image of a known format"):
        decode(stream.getvalue(), 8)


@pytest.mark.parametrize("name", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_every_format_of_an_accepted_suffix_decodes(name: str) -> None:
    stream = io.BytesIO()
    picture = Image.new("RGB", (8, 8), (200, 200, 200))
    picture.save(
        stream, name, **({"save_all": True, "append_images": [picture]} if name == "MPO" else {})
    )
    assert (abs(decode(stream.getvalue(), 8).astype(int) - 200) <= 3).all()


def test_more_than_eight_bits_per_channel_are_refused() -> None:
    with pytest.raises(DataError, match="expected 8 bits"):
        decode(_png(np.full((8, 8), 40_000, dtype=np.uint16)), 8)


@pytest.mark.parametrize("side", [11, 20])
def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(decoding, "_MAX_PIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with pytest.raises(DataError, match="decompression bomb"):
        decode(encoded(size=(side, side)), 8)
