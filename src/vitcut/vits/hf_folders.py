"""Hugging Face's folders: configuration, weights and preprocessing, read and written.

What a loaded model's parts are called is left to `transformers_models`.
"""

import json
import pickle
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vitcut.errors import ConfigError, ModelError
from vitcut.files import write_json
from vitcut.framing import Fit, Framing, Interpolation
from vitcut.progress import say
from vitcut.vits.adapters import as_classifier
from vitcut.vits.loaded import Labels, LoadedModel, Preprocessing, per_channel

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, in its order."""
_PREPROCESSOR = "preprocessor_config.json"
_PIXELS = 255
_FILTERS: tuple[Interpolation, ...] = (
    "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming",
)  # fmt: skip
"""By Pillow's number, which ``resample`` is."""
_PROCESSORS = {"Bit", "CLIP", "DeiT", "ViT"}
_SHORT = {"Bit", "CLIP"}
_SUFFIX = re.compile(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$")
_SHOWN = 3
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError,
    ZeroDivisionError, IndexError, SafetensorError,
)  # fmt: skip
"""What transformers and its readers raise for settings or weights that do not fit."""


def load_hf_folder(folder: Path, spec: str) -> LoadedModel:
    """Load an image classifier of transformers; code that the folder brings is never run.

    Args:
        folder: With ``config.json``, weights and ``preprocessor_config.json``.
        spec: What was asked for.

    Raises:
        ModelError: A file is missing or damaged, there is no such classifier, or the weights are
            not all of them and no others.
        ConfigError: transformers is not installed.
    """
    _require_transformers(spec)
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"{folder} holds no weights: expected {WEIGHTS[0]}, beside its config.json"
        )
    found = read_preprocessor(folder)
    module = _load(folder, spec)
    channels = _number(module.config, "num_channels", folder)
    size = _fitted_size(module, found, folder)
    taken = Preprocessing(
        image_size=size,
        mean=_scaled(found, "image_mean", channels, folder),
        std=_scaled(found, "image_std", channels, folder),
        framing=_framing(found, size, channels, folder),
    )
    return LoadedModel.of(as_classifier(module), spec, taken, _labels(module.config))


def save_hf_folder(
    model: nn.Module, folder: Path, taken: Preprocessing, class_ids: tuple[str, ...]
) -> None:
    """Write a classifier as ``from_pretrained`` reads it, with its preprocessing.

    Args:
        model: As `load_hf_folder` gave it.
        folder: It exists.
        taken: What the model takes.
        class_ids: In the order of the logits.
    """
    with _quiet():
        inner: Any = model.get_submodule("model")
        inner.save_pretrained(folder, max_shard_size="1TB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {str(number): name for number, name in enumerate(class_ids)}
    config["label2id"] = {name: number for number, name in enumerate(class_ids)}
    write_json(folder / "config.json", config)
    write_json(folder / _PREPROCESSOR, _preprocessor(taken))


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``.

    Raises:
        ModelError: It is missing or damaged.
    """
    path = folder / _PREPROCESSOR
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no {_PREPROCESSOR}, which says how images are scaled and normalised: "
            "save the image processor that the model was trained with into it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected settings by name")
    return content


def _require_transformers(spec: str) -> None:
    try:
        import vitcut.vits.transformers_models  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(
            f"{spec!r} is a model of transformers, which is missing or too old ({error}): "
            'pip install "vitcut[hf]"'
        ) from None


def _load(folder: Path, spec: str) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        # Weights that are missing are drawn at random first: torch's generator is left as it was.
        with _quiet(), torch.random.fork_rng(devices=[]):
            module, info = AutoModelForImageClassification.from_pretrained(
                folder,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
    except pickle.UnpicklingError:
        raise ModelError(
            f"the weights in {folder} hold more than weights, so that loading them could run code "
            f"that they bring, or are damaged: get them as {WEIGHTS[0]}"
        ) from None
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load the model {spec!r} with transformers: {reason}") from None
    _require_whole(info, type(module).__name__, folder)
    return module


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' progress bars and load report: what is wrong becomes an error."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _require_whole(info: Mapping[str, Any], kind: str, folder: Path) -> None:
    """Refuse what transformers only warns of: a classifier that was never trained, above all."""
    missing = sorted(info["missing_keys"])
    problems = {
        "missing": missing,
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": [
            f"{key} {list(stored)} instead of {list(wanted)}"
            for key, stored, wanted in sorted(info["mismatched_keys"])
        ],
    }
    told = [
        f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if told:
        untrained = any(key.startswith("classifier") for key in missing)
        remedy = (
            "it has no trained classifier: give one that was fine-tuned to classify"
            if untrained
            else "restore the folder, or correct its config.json"
        )
        raise ModelError(
            f"the weights in {folder} are not those of a {kind}: {'; '.join(told)}; {remedy}"
        )


def _fitted_size(module: Any, found: Mapping[str, Any], folder: Path) -> int:
    """The image size of the preprocessor, to which DINOv2's positions are brought."""
    own = _number(module.config, "image_size", folder)
    made = _crop_size(found, folder) or _scaling(found, folder)[1] or own
    if made == own:
        return own
    if type(module).__name__ != "Dinov2ForImageClassification":
        raise ModelError(
            f"{folder / _PREPROCESSOR} makes images of {made} pixels, the model takes {own}: "
            "correct the one that is wrong"
        )
    say(f"model: positions brought from {own} to {made} pixels, as DINOv2 does on every image")
    _resample_positions(module, made)
    return made


def _resample_positions(module: Any, size: int) -> None:
    """What ``Dinov2Embeddings.forward`` does to positions for images of another size, once."""
    embeddings = module.dinov2.embeddings
    patches = embeddings.patch_embeddings
    side = size // patches.patch_size[0]
    tokens = torch.empty(1, side**2 + 1, embeddings.position_embeddings.shape[-1])
    with torch.no_grad():
        position = embeddings.interpolate_pos_encoding(tokens, size, size)
    embeddings.position_embeddings = nn.Parameter(position.clone())
    patches.image_size, patches.num_patches = (size, size), side**2
    module.config.image_size = size


def _crop_size(found: Mapping[str, Any], folder: Path) -> int | None:
    if not found.get("do_center_crop"):
        return None
    return _square(found.get("crop_size"), "crop_size", folder)


def _scaling(found: Mapping[str, Any], folder: Path) -> tuple[Fit, int | None]:
    """What is scaled to how many pixels, before the crop; None where nothing is."""
    if not found.get("do_resize", True):
        if found.get("do_center_crop"):
            raise ModelError(
                f"{folder / _PREPROCESSOR} crops images that it does not scale: expected do_resize"
            )
        return "crop", None
    size = found.get("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        return "crop", _square(size["shortest_edge"], "size", folder)
    # One number: old folders of some processors mean the shorter side, the others a square.
    short = type(size) is int and _processor(found) in _SHORT
    return "crop" if short else "squash", _square(size, "size", folder)


def _processor(found: Mapping[str, Any]) -> str | None:
    kind = found.get("image_processor_type", found.get("feature_extractor_type"))
    return None if kind is None else _SUFFIX.sub("", str(kind))


def _framing(found: Mapping[str, Any], size: int, channels: int, folder: Path) -> Framing:
    kind = _processor(found)
    if kind is not None and kind not in _PROCESSORS:
        raise ModelError(
            f"{folder / _PREPROCESSOR} is of {kind}, expected one of "
            f"{', '.join(f'{name}ImageProcessor' for name in sorted(_PROCESSORS))}"
        )
    fit, scaling = _scaling(found, folder)
    scaled = size if scaling is None else scaling
    number = found.get("resample", 2)
    if number not in range(len(_FILTERS)):
        raise ModelError(f"{folder / _PREPROCESSOR} has resample {number!r}, expected 0 to 5")
    if scaled < size:
        raise ModelError(
            f"{folder / _PREPROCESSOR} scales images to {scaled} pixels and crops {size}, which "
            "pads them: vitcut does not pad; correct size or crop_size"
        )
    return _framed(folder, channels, fit, size / scaled, _FILTERS[number])


def _framed(
    folder: Path, channels: int, fit: Fit, fraction: float, filter_name: Interpolation
) -> Framing:
    try:
        return Framing(
            channels=channels, fit=fit, crop_fraction=fraction, interpolation=filter_name
        )
    except ConfigError as error:
        raise ModelError(f"{folder}: {error}") from None


def _scaled(found: Mapping[str, Any], key: str, channels: int, folder: Path) -> tuple[float, ...]:
    """Mean or standard deviation on the scale 0 to 1, whatever pixels are multiplied by."""
    factor = 1.0
    if found.get("do_rescale", True):
        factor = found.get("rescale_factor", 1 / _PIXELS)
    top = 1.0 if abs(factor * _PIXELS - 1) < 1e-6 else factor * _PIXELS
    if not found.get("do_normalize", True):
        return (0.0 if key == "image_mean" else 1 / top,) * channels
    if found.get(key) is None:
        raise ModelError(f"{folder / _PREPROCESSOR} lacks {key}: write it down there")
    values = per_channel(found[key], channels, f"{key} in {folder / _PREPROCESSOR}")
    return tuple(value / top for value in values)


def _labels(config: Any) -> Labels:
    """The label texts, which are ids and names at once; LABEL_0 and so on say nothing."""
    numbers = sorted(config.id2label)
    texts = tuple(str(config.id2label[number]) for number in numbers)
    if all(text == f"LABEL_{number}" for number, text in zip(numbers, texts, strict=True)):
        return Labels()
    return Labels(ids=texts, names=texts)


def _square(value: Any, key: str, folder: Path) -> int:
    if isinstance(value, dict) and value.keys() >= {"height", "width"}:
        value = (value["height"], value["width"])
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or value < 1:
        raise ModelError(
            f"{folder / _PREPROCESSOR} has {key} {value!r}: expected one number of pixels, or a "
            "square's height and width"
        )
    return value


def _number(config: Any, key: str, folder: Path) -> int:
    value = getattr(config, key, None)
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if type(value) is not int:
        raise ModelError(
            f"{folder / 'config.json'} has {key} {value!r}: expected one number, as ViT, DeiT and "
            "DINOv2 classifiers have"
        )
    return value


def _preprocessor(taken: Preprocessing) -> dict[str, Any]:
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
        "rescale_factor": 1 / _PIXELS,
        "do_normalize": True,
        "image_mean": list(taken.mean),
        "image_std": list(taken.std),
    }
