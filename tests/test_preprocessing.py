import pytest

from vitcut.errors import ConfigError
from vitcut.preprocessing import WHOLE, Framing


def test_the_default_shows_all_of_the_square():
    assert Framing(channels=3, fit="crop", crop_fraction=1.0, interpolation="bicubic") == WHOLE
    assert WHOLE.shown_fraction(64) == 1


@pytest.mark.parametrize(
    ("fraction", "size", "scaled"), [(0.9, 224, 248), (0.875, 224, 256), (384 / 438, 384, 438)]
)
def test_pictures_are_scaled_to_whole_pixels(fraction, size, scaled):
    """Rounded down, as timm does it."""
    assert Framing(crop_fraction=fraction).shown_fraction(size) == size / scaled


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"channels": 4}, r"1 \(grey\) or 3 .*got 4"),
        ({"crop_fraction": 0}, "crop_fraction must be > 0 and <= 1, got 0"),
        ({"crop_fraction": 1.1}, "crop_fraction must be > 0 and <= 1, got 1.1"),
        ({"crop_fraction": float("nan")}, "got nan"),
        ({"fit": "border"}, "fit must be one of crop, squash, got 'border'"),
        ({"interpolation": "random"}, "one of nearest, .*, lanczos, got 'random'"),
    ],
)
def test_a_framing_that_is_not_known_is_refused(change, match):
    framing = Framing()
    for name, value in change.items():  # past the tests' own check of types
        object.__setattr__(framing, name, value)
    with pytest.raises(ConfigError, match=match):
        framing.__post_init__()
