"""Hugging Face's folders: configuration, weights, labels and preprocessing, read and written."""

import json
import pickle
import re
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from vitcut.errors import ConfigError, ModelError
from vitcut.labels import Labels
from vitcut.model.adapters import adapter_of, as_classifier
from vitcut.model.foreign import labels_in, read_config, told_as, told_misfits
from vitcut.model.model import Model
from vitcut.preprocessing import Fit, Framing, Preprocessing, per_channel
from vitcut.progress import say
from vitcut.store import write_json

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, in its order."""
_PREPROCESSOR = "preprocessor_config.json"
_TOP = 255
"""The highest value of a pixel."""
_PROCESSORS = ("Bit", "CLIP", "DeiT", "ViT")
_PROCESSOR_OF_MODEL = {
    "vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit", "clip": "CLIP",
}  # fmt: skip
"""The processor of a model whose settings name none, by ``model_type``."""
_YES_NO = (
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "default_to_square",
)  # fmt: skip
_DEFAULTED = (
    *_YES_NO, "size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std",
)  # fmt: skip


def load_hf_folder(folder: Path, spec: str) -> Model:
    """Load an image classifier of transformers; code that the folder contains is never run.

    Args:
        folder: With ``config.json``, weights and ``preprocessor_config.json``.
        spec: What the user asked for.

    Raises:
        ModelError: A file is missing or damaged, there is no such classifier, or the weights are
            not exactly those of the classifier.
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
    processor = _Processor(folder / _PREPROCESSOR)
    module = _load_classifier(folder, spec)

    # CLIP's configuration has one of a text model beside that of its vision tower.
    vision = getattr(module.config, "vision_config", module.config)
    sizes: dict[str, int] = {}
    for key in ("num_channels", "image_size"):
        value = getattr(vision, key, None)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int:
            raise ModelError(
                f"{folder / 'config.json'} has {key} {value!r}: expected one number, as ViT, DeiT "
                "and DINOv2 classifiers have"
            )
        sizes[key] = value
    size, made = sizes["image_size"], processor.made_size
    if made is not None and made != size:
        if not type(module).__name__.startswith("Dinov2"):
            raise ModelError(
                f"{processor.path} makes images of {made} pixels, the model takes {size}: "
                "correct the one that is wrong"
            )
        say(f"model: positions brought from {size} to {made} pixels, as DINOv2 does on every image")
        _resample_positions(module, made)
        size = made
    taken = processor.preprocessing(size, sizes["num_channels"])

    return Model.of(as_classifier(module), spec, taken, labels_of(module.config, spec))


def labels_of(config: Any, spec: str) -> Labels | None:
    """The classes that a configuration of transformers names.

    Texts are ids and names at once; the default LABEL_0, LABEL_1, ... and numbers mean nothing.

    Args:
        config: Of a model.
        spec: What the user asked for.
    """
    id2label = getattr(config, "id2label", None) or {}
    found = labels_in(f"id2label in the config.json of {spec}", f"model {spec!r}", id2label)
    unsaid = all(own in {f"LABEL_{at}", str(at)} for at, own in enumerate(found.ids))
    return None if unsaid else found


def save_hf_folder(
    model: nn.Module, folder: Path, taken: Preprocessing, class_ids: tuple[str, ...]
) -> None:
    """Write a classifier in the format of ``from_pretrained``, with its preprocessing.

    Args:
        model: As `load_hf_folder` returned it.
        folder: An existing folder.
        taken: The model's preprocessing.
        class_ids: In the order of the logits.
    """
    with _quiet():
        inner: Any = model.get_submodule("model")
        inner.save_pretrained(folder, max_shard_size="1TB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {str(number): name for number, name in enumerate(class_ids)}
    config["label2id"] = {name: number for number, name in enumerate(class_ids)}
    write_json(folder / "config.json", config)

    size, framing = taken.image_size, taken.framing
    scaled = round(size / framing.shown_fraction(size))
    squashed = framing.fit == "squash"
    processor = {
        "image_processor_type": "ViTImageProcessor" if squashed else "BitImageProcessor",
        "do_resize": True,
        "size": {"height": scaled, "width": scaled} if squashed else {"shortest_edge": scaled},
        "resample": Image.Resampling[framing.interpolation.upper()].value,
        "do_center_crop": not squashed or scaled != size,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / _TOP,
        "do_normalize": True,
        "image_mean": list(taken.mean),
        "image_std": list(taken.std),
    }
    write_json(folder / _PREPROCESSOR, processor)


def _load_classifier(folder: Path, spec: str) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        with told_as(f"cannot load the model {spec!r} with transformers"), _quiet():
            module, info = AutoModelForImageClassification.from_pretrained(
                folder,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                ignore_mismatched_sizes=True,  # all misfits are reported below
                dtype=torch.float32,
            )
    except pickle.UnpicklingError:
        raise ModelError(
            f"the weights in {folder} hold more than weights, so that loading them could run code "
            f"that they contain, or are damaged: get them as {WEIGHTS[0]}"
        ) from None

    # transformers only warns of these: above all of a classifier that was never trained.
    missing = info["missing_keys"]
    if told := told_misfits(missing, info["unexpected_keys"], info["mismatched_keys"]):
        remedy = "restore the folder, or correct its config.json"
        if any("classifier." in key for key in missing):
            remedy = "it has no trained classifier: give one that was fine-tuned to classify"
        kind = type(module).__name__
        raise ModelError(f"the weights in {folder} are not those of a {kind}: {told}; {remedy}")
    return module


def _resample_positions(module: Any, size: int) -> None:
    """Do once what ``Dinov2Embeddings.forward`` does to positions for images of another size."""
    embeddings = module.base_model.embeddings
    patches = embeddings.patch_embeddings
    side = size // patches.patch_size[0]
    # Only the shape of the tokens is looked at: [1, class token + patches, width].
    tokens = torch.empty(1, side**2 + 1, embeddings.position_embeddings.shape[-1])
    with torch.no_grad():
        position = embeddings.interpolate_pos_encoding(tokens, size, size)
    embeddings.position_embeddings = nn.Parameter(position.clone())
    patches.image_size, patches.num_patches = (size, size), side**2
    module.config.image_size = size


@contextmanager
def _quiet() -> Generator[None]:
    """Silence transformers' progress bars and load report; what is wrong becomes an error."""
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


class _Processor:
    """The settings of an image processor; what is not understood is refused.

    Raises:
        ModelError: The file is missing or damaged, or the kind of processor is unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ModelError(
                f"{path.parent} holds no {path.name}, which says how images are scaled and "
                "normalised: save the image processor that the model was trained with into it"
            )
        written = read_config(path)
        names = ("image_processor_type", "feature_extractor_type")
        named = next((written[name] for name in names if name in written), None)
        if named is None:
            model_type = str(read_config(path.parent / "config.json").get("model_type"))
            named = _PROCESSOR_OF_MODEL.get(model_type, f"a model {model_type!r}")
        kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(named))
        if kind not in _PROCESSORS:
            raise ModelError(
                f"{path} is of {kind}, expected one of "
                f"{', '.join(f'{name}ImageProcessor' for name in _PROCESSORS)}"
            )
        # What is not written, or null, is the default of the processor's class.
        own_class: Any = getattr(import_module("transformers"), f"{kind}ImageProcessor")
        content: dict[str, Any] = {name: getattr(own_class, name, None) for name in _DEFAULTED}
        content |= {name: value for name, value in written.items() if value is not None}
        for name, value in content.items():
            if name in _YES_NO and not (value is None or isinstance(value, bool)):
                raise ModelError(f"{path} has {name} {value!r}, expected true or false")
        if content["do_pad"]:
            raise ModelError(
                f"{path} has do_pad, and vitcut does not pad: remove it if it changes "
                "nothing, or save the processor without it"
            )
        self._settings = content

        # What is scaled to how many pixels before the crop; None if nothing is.
        crops, size = content["do_center_crop"], content["size"]
        self._fit: Fit = "crop"
        self._scaled: int | None = None
        if content["do_resize"]:
            if isinstance(size, dict) and "shortest_edge" in size:
                size = size["shortest_edge"]
            elif type(size) is not int or content["default_to_square"]:
                self._fit = "squash"
            self._scaled = self._square("size", size)
        elif crops:
            raise ModelError(f"{path} crops images that it does not scale: expected do_resize")
        # Height and width of its images; None if they keep their own size.
        self.made_size = self._square("crop_size", content["crop_size"]) if crops else self._scaled

    def preprocessing(self, size: int, channels: int) -> Preprocessing:
        """The preprocessing for a model of this image size and number of channels."""
        # Convert mean and deviation to the scale 0 to 1. A processor that multiplies pixels by f
        # and normalises by (x - m) / s computes (x - m / 255f) / (s / 255f) on that scale.
        factor = self._settings["rescale_factor"] if self._settings["do_rescale"] else 1.0
        if type(factor) not in {int, float} or not factor > 0:
            raise ModelError(f"{self.path} has rescale_factor {factor!r}, expected a number > 0")
        top = 1.0 if abs(factor * _TOP - 1) < 1e-6 else factor * _TOP
        mean, std = (0.0,) * channels, (1 / top,) * channels
        if self._settings["do_normalize"]:
            found: list[tuple[float, ...]] = []
            for key in ("image_mean", "image_std"):
                values = per_channel(self._settings[key], channels, f"{key} in {self.path}")
                found.append(tuple(value / top for value in values))
            mean, std = found

        scaled = size if self._scaled is None else self._scaled
        number = self._settings["resample"]
        if number not in range(6):
            raise ModelError(f"{self.path} has resample {number!r}, expected 0 to 5")
        interpolation: Any = Image.Resampling(number).name.lower()
        if scaled < size:
            raise ModelError(
                f"{self.path} scales images to {scaled} pixels and crops {size}, which pads "
                "them: vitcut does not pad; correct size or crop_size"
            )
        try:
            framing = Framing(
                channels=channels,
                fit=self._fit,
                crop_fraction=size / scaled,
                interpolation=interpolation,
                orientation="apply",
            )
            return Preprocessing(image_size=size, mean=mean, std=std, framing=framing)
        except ConfigError as error:
            raise ModelError(f"{error} in {self.path}") from None

    def _square(self, key: str, value: Any) -> int:
        if isinstance(value, dict) and value.keys() >= {"height", "width"}:
            value = (value["height"], value["width"])
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{self.path} has {key} {value!r}: expected one number of pixels, or a square's "
                "height and width"
            )
        return value
