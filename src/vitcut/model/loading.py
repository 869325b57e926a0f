"""Dense models, loaded from wherever they are: which reader knows what a user has given.

What a loaded model's parts are called is left to the adapters, cutting it to the compiler.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from vitcut.errors import ModelError
from vitcut.model.checkpoints import load_checkpoint
from vitcut.model.given import NOTHING, TIMM, Given, is_weights_file
from vitcut.model.loaded import LoadedModel, weight_hash
from vitcut.model.saving import CONFIG, FORMAT_VERSION, TENSORS, DenseCard, save_dense
from vitcut.model.timm_folders import load_random, load_timm
from vitcut.model.transformers_folders import WEIGHTS, load_hf_folder
from vitcut.names import SHIPPED_MODEL
from vitcut.store import hash_of_read, sha256_file

__all__ = ["DenseCard", "LoadedModel", "load_model", "save_dense", "weight_hash"]

_HUB = "hf-hub:"
_HF_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", WEIGHTS[1]]
_PICKLED = ["pytorch_model*.bin", WEIGHTS[3]]
_HUB_ERRORS = (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError)


def load_model(spec: str, given: Given = NOTHING) -> LoadedModel:
    """Load a dense model.

    Args:
        spec: A shipped model's name ("animals", whatever lies in the working directory: a folder
            of that name is ``./animals``), a folder of timm or transformers, a run directory (its
            ``dense/`` is taken), ``timm:NAME``, ``hf-hub:REPOSITORY``, ``local-dir:FOLDER``, or a
            file of bare weights.
        given: What a user says of it besides.

    Raises:
        ModelError: There is no such model, it is damaged or of a newer version, or its weights
            are not finite, or not all those of the model and no others.
        ConfigError: What was given is for another kind of model, ``timm:NAME`` cannot be built for
            images of that size, or transformers is not installed.
    """
    given.require_for(spec)
    if is_weights_file(spec):
        return load_checkpoint(Path(spec), given)
    if spec.startswith(TIMM):
        name = spec.removeprefix(TIMM)
        if given.random_weights:
            return load_random(name, given.image_size)
        return load_timm(name, spec, given.image_size)
    if spec.startswith(_HUB):
        return _from_hub(spec)
    return _from_folder(_folder(spec), spec)


def _from_hub(spec: str) -> LoadedModel:
    """A repository of timm or transformers; which, its ``config.json`` says."""
    repository, _, revision = spec.removeprefix(_HUB).partition("@")
    where: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    try:
        config = _read_config(Path(hf_hub_download(filename=CONFIG, **where)))
        if "architecture" in config or "model_type" not in config:
            return load_timm(spec, spec)
        folder = Path(snapshot_download(allow_patterns=_HF_FILES, **where))
        if not any((folder / name).is_file() for name in WEIGHTS):
            folder = Path(snapshot_download(allow_patterns=_PICKLED, **where))
    except _HUB_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load the model {spec!r}: {reason}") from None
    return load_hf_folder(folder, spec)


def _folder(spec: str) -> Path:
    if spec == SHIPPED_MODEL:
        return Path(str(resources.files("vitcut"))) / "assets" / spec
    path = Path(spec.removeprefix("local-dir:"))
    if not path.exists():
        raise ModelError(
            f"no model at {path}: expected a folder with {CONFIG}, a run directory, a file of "
            f"weights, timm:NAME, hf-hub:REPOSITORY, or one of {SHIPPED_MODEL}"
        )
    if not path.is_dir():
        raise ModelError(f"{path} is a file: expected a model folder with {CONFIG}")
    return path / "dense" if (path / "dense").is_dir() else path


def _from_folder(folder: Path, spec: str) -> LoadedModel:
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} holds no {CONFIG}: expected a folder of timm or transformers, with "
            f"{CONFIG} and {TENSORS}"
        )
    config = _read_config(folder / CONFIG)
    hugging_face = "model_type" in config and "architecture" not in config
    if not (hugging_face or (folder / TENSORS).is_file()):
        raise ModelError(f"{folder} holds no {TENSORS}: expected it beside its {CONFIG}")
    if "vitcut" in config:
        _check_own(folder, config)
    if hugging_face:
        return load_hf_folder(folder, spec)
    if "torchvision" in config:
        from vitcut.model.torchvision_models import load_torchvision_folder

        return load_torchvision_folder(folder, spec, config)
    if "architecture" in config:
        return load_timm(f"local-dir:{folder}", spec)
    if "plan" in config:
        raise ModelError(
            f"{folder} is a compact model, expected a dense one: give the model it was cut from"
        )
    raise ModelError(
        f"{folder / CONFIG} names no architecture: expected a dense model of timm (architecture) "
        "or transformers (model_type)"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, expected settings by name")
    return config


def _check_own(folder: Path, config: dict[str, Any]) -> None:
    """What only folders that vitcut wrote say of themselves."""
    library = {key: value for key, value in config.items() if key != "vitcut"}
    own = config["vitcut"]
    version = own.get("format_version") if isinstance(own, dict) else None
    if type(version) is not int:
        raise ModelError(
            f"{folder / CONFIG} is damaged: its entry 'vitcut' has no format_version, expected "
            "an integer: restore the file or train again"
        )
    if version > FORMAT_VERSION:
        raise ModelError(
            f"{folder} has format_version {version}, this vitcut reads up to {FORMAT_VERSION}: "
            "upgrade vitcut"
        )
    if not (folder / TENSORS).is_file():
        raise ModelError(f"{folder} holds no {TENSORS}: copy the whole folder")
    found = {
        TENSORS: (own.get("weights_sha256"), sha256_file(folder / TENSORS)),
        # Folders of before have none.
        CONFIG: (own.get("config_sha256"), hash_of_read(library)),
    }
    for name, (expected, now) in found.items():
        if expected is not None and expected != now:
            raise ModelError(
                f"{folder / name} is not the file that was saved (its SHA-256 differs): restore "
                f"it or train again; if it was changed on purpose, remove 'vitcut' from {CONFIG}"
            )
