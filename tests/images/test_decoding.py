"""Encoded bytes to pixels."""

import io
from typing import get_args

import numpy as np
import pytest
from data_samples import encoded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from vitcut.errors import DataError
from vitcut.images import decoding
from vitcut.preprocessing import WHOLE, Framing, Interpolation


def decode(content: bytes, image_size: int, framing: Framing = WHOLE) -> np.ndarray:
    return decoding.decode(content, image_size, framing).pixels


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


RAMP = np.linspace(0, 255, 90 * 60 * 3).reshape(90, 60, 3).astype(np.uint8)
"""Higher than wide, and every row of another brightness."""


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_a_framing_makes_what_timm_makes(fit, crop_fraction, interpolation) -> None:
    framing = Framing(fit=fit, crop_fraction=crop_fraction, interpolation=interpolation)
    theirs = create_transform(
        32,
        crop_pct=crop_fraction,
        crop_mode={"crop": "center", "squash": "squash"}[fit],
        interpolation=interpolation,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )(Image.fromarray(RAMP))
    ours = decode(_png(RAMP), 32, framing).transpose(2, 0, 1)
    assert np.abs(ours - theirs.numpy() * 255).max() < 5


@pytest.mark.parametrize("interpolation", get_args(Interpolation))
def test_every_filter_is_its_own(interpolation) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = Image.fromarray(noise).resize((16, 16), Image.Resampling[interpolation.upper()])
    ours = decode(_png(noise), 16, Framing(interpolation=interpolation))
    np.testing.assert_array_equal(ours, np.asarray(expected))


def test_framings_differ() -> None:
    whole = decode(_png(RAMP), 32)
    for change in ({"fit": "squash"}, {"crop_fraction": 0.8}):
        changed = decode(_png(RAMP), 32, Framing(**change))
        assert np.abs(whole.astype(int) - changed).max() > 8


def test_a_crop_enlarges_what_it_keeps_of_an_image_of_the_right_size() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[4:12, 4:12] = 200
    image = decode(_png(pixels), 16, Framing(crop_fraction=0.5, interpolation="nearest"))
    assert (image == 200).all()


@given(mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]))
def test_any_mode_becomes_grey(mode: str) -> None:
    image = decode(encoded(255, size=(9, 7), mode=mode), 16, Framing(channels=1))
    assert image.shape == (16, 16, 1)
    assert (image == 255).all()


def test_grey_stays_as_it_is_and_colours_become_their_brightness() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    grey = Framing(channels=1)
    np.testing.assert_array_equal(decode(_png(pixels), 16, grey)[..., 0], pixels)
    green = np.zeros((16, 16, 3), dtype=np.uint8)
    green[..., 1] = 200
    assert (decode(_png(green), 16, grey) == round(200 * 0.587)).all()
