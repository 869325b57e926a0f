"""``preprocessor_config.json`` of Hugging Face's folders: how images are made, read and written."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitcut.errors import ConfigError, ModelError
from vitcut.framing import Fit, Framing, Interpolation
from vitcut.preprocessing import Preprocessing, per_channel

PREPROCESSOR = "preprocessor_config.json"
_TOP = 255
"""The highest value of a pixel."""
_FILTERS: tuple[Interpolation, ...] = (
    "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming",
)  # fmt: skip
"""By Pillow's number, which ``resample`` is."""
_KINDS = {"Bit", "CLIP", "DeiT", "ViT"}
_SHORTER_SIDE = {"Bit", "CLIP"}
"""Those whose ``size`` means the shorter side where it is one number; the others squash."""
_SUFFIX = re.compile(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$")


class Preprocessor:
    """The settings of an image processor; refuses what it does not understand."""

    def __init__(self, folder: Path) -> None:
        """Read the file of a folder.

        Raises:
            ModelError: It is missing or damaged, or of a kind of processor that is not known.
        """
        self._path = folder / PREPROCESSOR
        if not self._path.is_file():
            raise ModelError(
                f"{folder} holds no {PREPROCESSOR}, which says how images are scaled and "
                "normalised: save the image processor that the model was trained with into it"
            )
        self._settings = self._read()
        kind = self._kind()
        if kind is not None and kind not in _KINDS:
            raise ModelError(
                f"{self._path} is of {kind}, expected one of "
                f"{', '.join(f'{name}ImageProcessor' for name in sorted(_KINDS))}"
            )

    def made_size(self) -> int | None:
        """Height and width of the square that is made; None where that is the picture's own.

        Raises:
            ModelError: It is no square.
        """
        if self._settings.get("do_center_crop"):
            return self._square("crop_size", self._settings.get("crop_size"))
        return self._scaling()[1]

    def preprocessing(self, size: int, channels: int) -> Preprocessing:
        """What is done to pictures for a model of an image size and so many channels.

        Raises:
            ModelError: Something is missing, or nothing that vitcut does.
        """
        return Preprocessing(
            image_size=size,
            mean=self._scaled("image_mean", channels),
            std=self._scaled("image_std", channels),
            framing=self._framing(size, channels),
        )

    def _read(self) -> Mapping[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ModelError(f"{self._path} is not readable JSON: {error}") from None
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise ModelError(f"{self._path} holds a {kind}, expected settings by name")
        return content

    def _kind(self) -> str | None:
        names = ("image_processor_type", "feature_extractor_type")
        kind = next((self._settings[name] for name in names if name in self._settings), None)
        return None if kind is None else _SUFFIX.sub("", str(kind))

    def _scaling(self) -> tuple[Fit, int | None]:
        """What is scaled to how many pixels, before the crop; None where nothing is."""
        if not self._settings.get("do_resize", True):
            if self._settings.get("do_center_crop"):
                raise ModelError(
                    f"{self._path} crops images that it does not scale: expected do_resize"
                )
            return "crop", None
        size = self._settings.get("size")
        if isinstance(size, dict) and "shortest_edge" in size:
            return "crop", self._square("size", size["shortest_edge"])
        short = type(size) is int and self._kind() in _SHORTER_SIDE
        return "crop" if short else "squash", self._square("size", size)

    def _framing(self, size: int, channels: int) -> Framing:
        fit, scaling = self._scaling()
        scaled = size if scaling is None else scaling
        number = self._settings.get("resample", _FILTERS.index("bilinear"))
        if number not in range(len(_FILTERS)):
            raise ModelError(f"{self._path} has resample {number!r}, expected 0 to 5")
        if scaled < size:
            raise ModelError(
                f"{self._path} scales images to {scaled} pixels and crops {size}, which pads "
                "them: vitcut does not pad; correct size or crop_size"
            )
        try:
            return Framing(
                channels=channels,
                fit=fit,
                crop_fraction=size / scaled,
                interpolation=_FILTERS[number],
            )
        except ConfigError as error:
            raise ModelError(f"{self._path.parent}: {error}") from None

    def _scaled(self, key: str, channels: int) -> tuple[float, ...]:
        """Mean or standard deviation on the scale 0 to 1, whatever pixels are multiplied by."""
        factor = 1.0
        if self._settings.get("do_rescale", True):
            factor = self._settings.get("rescale_factor", 1 / _TOP)
        top = 1.0 if abs(factor * _TOP - 1) < 1e-6 else factor * _TOP
        if not self._settings.get("do_normalize", True):
            return (0.0 if key == "image_mean" else 1 / top,) * channels
        if self._settings.get(key) is None:
            raise ModelError(f"{self._path} lacks {key}: write it down there")
        values = per_channel(self._settings[key], channels, f"{key} in {self._path}")
        return tuple(value / top for value in values)

    def _square(self, key: str, value: Any) -> int:
        if isinstance(value, dict) and value.keys() >= {"height", "width"}:
            value = (value["height"], value["width"])
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{self._path} has {key} {value!r}: expected one number of pixels, or a square's "
                "height and width"
            )
        return value


def processor_settings(taken: Preprocessing) -> dict[str, Any]:
    """The content of a ``preprocessor_config.json`` that makes what a model takes."""
    size, framing = taken.image_size, taken.framing
    scaled = round(size / framing.shown_fraction(size))
    squashed = framing.fit == "squash"
    return {
        "image_processor_type": "ViTImageProcessor" if squashed else "BitImageProcessor",
        "do_resize": True,
        "size": {"height": scaled, "width": scaled} if squashed else {"shortest_edge": scaled},
        "resample": _FILTERS.index(framing.interpolation),
        "do_center_crop": not squashed or scaled != size,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / _TOP,
        "do_normalize": True,
        "image_mean": list(taken.mean),
        "image_std": list(taken.std),
    }
