"""Hugging Face's folders: configuration, weights and labels, read and written.

How images are made is left to `hf_preprocessing`, what a loaded model's parts are called to
`transformers_models`.
"""

import json
import pickle
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vitcut.errors import ConfigError, ModelError
from vitcut.labels import Labels
from vitcut.model.adapters import adapter_of, as_classifier
from vitcut.model.hf_preprocessing import PREPROCESSOR, Preprocessor, processor_settings
from vitcut.model.loaded import told_misfits
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing
from vitcut.progress import say
from vitcut.store import write_json

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, in its order."""
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError,
    ZeroDivisionError, IndexError, SafetensorError,
)  # fmt: skip
"""What transformers and its readers raise for settings or weights that do not fit."""


def load_hf_folder(folder: Path, spec: str) -> Model:
    """Load an image classifier of transformers; code that the folder brings is never run.

    Args:
        folder: With ``config.json``, weights and ``preprocessor_config.json``.
        spec: What was asked for.

    Raises:
        ModelError: A file is missing or damaged, there is no such classifier, or the weights are
            not all of them and no others.
        ConfigError: transformers is not installed.
    """
    try:
        adapter_of("transformers")
    except ConfigError as error:
        raise ConfigError(f"cannot load the model {spec!r}: {error}") from None
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"{folder} holds no weights: expected {WEIGHTS[0]}, beside its config.json"
        )
    processor = Preprocessor(folder)
    module = _load(folder, spec)
    channels = _number(_tower(module), "num_channels", folder)
    size = _fitted_size(module, processor.made_size(), folder)
    taken = processor.preprocessing(size, channels)
    return Model.of(as_classifier(module), spec, taken, _labels(module.config, spec))


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
    write_json(folder / PREPROCESSOR, processor_settings(taken))


def _load(folder: Path, spec: str) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        with _quiet():
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
    misfits = {
        "missing": missing,
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": [
            f"{key} {list(stored)} instead of {list(wanted)}"
            for key, stored, wanted in sorted(info["mismatched_keys"])
        ],
    }
    told = told_misfits(misfits)
    if told:
        untrained = any("classifier." in key for key in missing)
        remedy = (
            "it has no trained classifier: give one that was fine-tuned to classify"
            if untrained
            else "restore the folder, or correct its config.json"
        )
        raise ModelError(f"the weights in {folder} are not those of a {kind}: {told}; {remedy}")


def _fitted_size(module: Any, made: int | None, folder: Path) -> int:
    """The image size of the preprocessor, to which DINOv2's positions are brought."""
    own = _number(_tower(module), "image_size", folder)
    if made is None or made == own:
        return own
    if not type(module).__name__.startswith("Dinov2"):
        raise ModelError(
            f"{folder / PREPROCESSOR} makes images of {made} pixels, the model takes {own}: "
            "correct the one that is wrong"
        )
    say(f"model: positions brought from {own} to {made} pixels, as DINOv2 does on every image")
    _resample_positions(module, made)
    return made


def _resample_positions(module: Any, size: int) -> None:
    """What ``Dinov2Embeddings.forward`` does to positions for images of another size, once."""
    embeddings = module.base_model.embeddings
    patches = embeddings.patch_embeddings
    side = size // patches.patch_size[0]
    tokens = torch.empty(1, side**2 + 1, embeddings.position_embeddings.shape[-1])
    with torch.no_grad():
        position = embeddings.interpolate_pos_encoding(tokens, size, size)
    embeddings.position_embeddings = nn.Parameter(position.clone())
    patches.image_size, patches.num_patches = (size, size), side**2
    module.config.image_size = size


def _tower(module: Any) -> Any:
    """The configuration of what sees: CLIP's also knows a text model."""
    return getattr(module.config, "vision_config", module.config)


def _labels(config: Any, spec: str) -> Labels | None:
    """The label texts, which are ids and names at once; LABEL_0 and so on say nothing."""
    numbers = sorted(config.id2label)
    texts = tuple(str(config.id2label[number]) for number in numbers)
    if all(text == f"LABEL_{number}" for number, text in zip(numbers, texts, strict=True)):
        return None
    return Labels(owner=f"model {spec!r}", ids=texts, names=texts)


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
