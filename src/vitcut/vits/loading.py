"""Dense models on disk: saves them as timm local directories, loads them from wherever they are.

What a loaded model's parts are called is left to the adapters, cutting it to the compiler.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

from vitcut.errors import ConfigError, ModelError
from vitcut.files import atomic_folder, sha256_file, write_json, write_text
from vitcut.vits.checkpoints import SUFFIXES, build_random, load_checkpoint
from vitcut.vits.weights import hash_tensors

_FORMAT_VERSION = 1
_SHIPPED = ("animals",)
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError,
    SafetensorError, HfHubHTTPError,
)  # fmt: skip
"""What timm and its readers raise for weights or settings that do not fit."""


@dataclass(frozen=True, kw_only=True)
class DenseCard:
    """What a dense model's folder says beside its weights."""

    task_name: str
    class_ids: tuple[str, ...]
    """Of the fine classes, in the order of the logits."""
    class_names: tuple[str, ...]
    """What a person calls them, in the same order."""
    group_names: tuple[str, ...]
    """The task's coarse groups."""
    image_size: int
    """Height and width, in pixels."""
    mean: tuple[float, ...]
    """Subtracted per channel, on the scale 0 to 1."""
    std: tuple[float, ...]
    """Divided by per channel, on the scale 0 to 1."""
    text: str
    """The model card: the content of README.md."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A dense model and what is known of it."""

    model: nn.Module
    """In eval mode, on the CPU."""
    name: str
    """What was asked for."""
    class_ids: tuple[str, ...] | None
    """In the order of the logits; None where the source does not say."""
    class_names: tuple[str, ...] | None
    """In the order of the logits; None where the source does not say."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    """Height and width, in pixels."""
    weight_hash: str
    """SHA-256 over names, shapes, types and values of the weights, in hex."""


def save_dense(model: nn.Module, folder: Path, *, card: DenseCard) -> None:
    """Write a model that timm built as a timm local directory; a folder of that name is replaced.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same logits.

    Args:
        model: Built by ``timm.create_model``.
        folder: Where ``config.json``, ``model.safetensors`` and ``README.md`` go.
        card: What to say beside the weights.
    """
    with atomic_folder(folder) as fresh:
        save_for_hf(
            model,
            str(fresh),
            safe_serialization=True,
            model_config={
                "label_names": list(card.class_ids),
                "label_descriptions": dict(zip(card.class_ids, card.class_names, strict=True)),
            },
            data_config={
                "input_size": (len(card.mean), card.image_size, card.image_size),
                "mean": card.mean,
                "std": card.std,
                "crop_pct": 1.0,
                "interpolation": "bicubic",
            },
        )
        config = json.loads((fresh / _CONFIG).read_text(encoding="utf-8"))
        # timm copies these from the architecture's own pretrained weights, which these are not.
        for inherited in ("tag", "license"):
            config["pretrained_cfg"].pop(inherited, None)
        config["vitcut"] = {
            "format_version": _FORMAT_VERSION,
            "task": card.task_name,
            "groups": list(card.group_names),
            "weights_sha256": sha256_file(fresh / _WEIGHTS),
        }
        write_json(fresh / _CONFIG, config)
        write_text(fresh / "README.md", card.text)


def load_model(spec: str, *, arch: str | None = None, random_weights: bool = False) -> LoadedModel:
    """Load a dense model.

    Args:
        spec: A shipped model's name ("animals", whatever lies in the working directory: a folder
            of that name is ``./animals``), a timm local directory, a run directory (its
            ``dense/`` is taken), ``timm:NAME``, ``hf-hub:REPOSITORY``, ``local-dir:FOLDER``, or a
            file of bare weights.
        arch: The timm architecture of a file of bare weights.
        random_weights: Build ``timm:NAME`` without its weights, and without network.

    Raises:
        ModelError: There is no such model, it is damaged or of a newer version, or its weights
            are not finite.
        ConfigError: ``arch`` or ``random_weights`` belong to another kind of model.
    """
    path = Path(spec)
    is_file = path.suffix in SUFFIXES and path.is_file()
    if arch is not None and not is_file:
        raise ConfigError(
            f"arch is for a file of bare weights ({', '.join(SUFFIXES)}), got it with {spec!r}: "
            "leave it out, or correct the path"
        )
    if random_weights and not spec.startswith("timm:"):
        raise ConfigError(f"random-weights is for timm:NAME, got it with {spec!r}: leave it out")
    if is_file:
        return _described(load_checkpoint(path, arch), spec)
    if random_weights:
        return _described(build_random(spec.removeprefix("timm:")), spec)
    if spec.startswith(("timm:", "hf-hub:")):
        return _loaded(spec, spec.removeprefix("timm:"))
    folder = _folder(spec)
    _check_folder(folder)
    return _loaded(spec, f"local-dir:{folder}")


def weight_hash(model: nn.Module) -> str:
    """The SHA-256 over names, shapes, types and values of a model's weights, in hex."""
    return hash_tensors(model.state_dict().items())


def _folder(spec: str) -> Path:
    if spec in _SHIPPED:
        return Path(str(resources.files("vitcut"))) / "assets" / spec
    path = Path(spec.removeprefix("local-dir:"))
    if not path.exists():
        raise ModelError(
            f"no model at {path}: expected a folder with {_CONFIG}, a run directory, "
            f"timm:NAME, hf-hub:REPOSITORY, or one of {', '.join(_SHIPPED)}"
        )
    if not path.is_dir():
        raise ModelError(f"{path} is a file: expected a model folder with {_CONFIG}")
    return path / "dense" if (path / "dense").is_dir() else path


def _check_folder(folder: Path) -> None:
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} holds no {name}: expected a timm local directory with {_CONFIG} and "
                f"{_WEIGHTS}"
            )
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder / _CONFIG} is not readable JSON: {error}") from None
    if not isinstance(config, dict) or "architecture" not in config:
        raise ModelError(
            f"{folder / _CONFIG} names no architecture: expected a dense model that timm can build"
        )
    if "vitcut" in config:
        _check_own(folder, config["vitcut"])


def _check_own(folder: Path, own: Any) -> None:
    """What only folders that vitcut wrote say of themselves."""
    version = own.get("format_version") if isinstance(own, dict) else None
    if type(version) is not int:
        raise ModelError(
            f"{folder / _CONFIG} is damaged: its entry 'vitcut' has no format_version, expected "
            "an integer: restore the file or train again"
        )
    if version > _FORMAT_VERSION:
        raise ModelError(
            f"{folder} has format_version {version}, this vitcut reads up to {_FORMAT_VERSION}: "
            "upgrade vitcut"
        )
    expected = own.get("weights_sha256")
    if expected is not None and expected != sha256_file(folder / _WEIGHTS):
        raise ModelError(
            f"{folder / _WEIGHTS} is not the file that was saved (its SHA-256 differs): restore "
            "it or train again"
        )


def _loaded(spec: str, timm_name: str) -> LoadedModel:
    try:
        model = timm.create_model(timm_name, pretrained=True).eval()
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load the model {spec!r}: {reason}") from None
    return _described(model, spec)


def _described(model: Any, spec: str) -> LoadedModel:
    _refuse_not_finite(model, spec)
    data: dict[str, Any] = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    if height != width:
        raise ModelError(f"{spec!r} takes images of {height} x {width}, expected square ones")
    class_ids, class_names = _labels(model)
    return LoadedModel(
        model=model,
        name=spec,
        class_ids=class_ids,
        class_names=class_names,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        image_size=height,
        weight_hash=weight_hash(model),
    )


def _labels(model: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    ids = model.pretrained_cfg.get("label_names")
    if not isinstance(ids, (list, tuple)):
        return None, None
    names = model.pretrained_cfg.get("label_descriptions") or {}
    if not isinstance(names, dict):
        raise ModelError(
            f"the model's label_descriptions are a {type(names).__name__}, expected "
            f"{{label: description}}: mend {_CONFIG}"
        )
    return tuple(ids), tuple(str(names.get(class_id, class_id)) for class_id in ids)


def _refuse_not_finite(model: nn.Module, spec: str) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{spec!r} has weights that are not finite, in {name}: expected a whole, trained "
                "model"
            )
