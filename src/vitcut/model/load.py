"""Load a dense model from a module, a folder, a file of weights, or a name."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from vitcut.errors import ConfigError, ModelError
from vitcut.hub import HUB, TIMM, hub_access, require_there
from vitcut.model.adapters import as_classifier, read_weights
from vitcut.model.checkpoints import load_checkpoint
from vitcut.model.foreign import read_config, require_plausible, told_as
from vitcut.model.model import Model
from vitcut.model.saving import CONFIG, FORMAT_VERSION, ORIENTATION, TENSORS
from vitcut.model.timm_folders import load_random, load_timm
from vitcut.model.transformers_folders import WEIGHTS, labels_of, load_hf_folder
from vitcut.names import SHIPPED_MODEL
from vitcut.preprocessing import WHOLE, Preprocessing, numbers, per_channel
from vitcut.settings import require_at_least, require_bounds, require_utf8
from vitcut.store import hash_of_read, sha256_file

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Suffixes of files that hold bare weights, in lower case; .tar as in .pth.tar."""

_HF_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", WEIGHTS[1]]
_TIMM_PICKLED = "pytorch_model.bin"
_PICKLED = ["pytorch_model*.bin", WEIGHTS[3]]


def load(
    model: str | Path | nn.Module,
    *,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    arch: str | None = None,
    num_heads: int | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
) -> Model:
    """Load a model as `vitcut.load_model` does, except from runs that did not train it."""
    means, stds = numbers("mean", mean), numbers("std", std)
    if image_size is not None:
        require_at_least("image-size", image_size, 1)
        # The least is the model's: one patch.
        require_bounds("image_size", max(image_size, 8))
    flags = {
        "arch": arch,
        "num-heads": num_heads,
        "mean": means,
        "std": stds,
        "random-weights": random_weights or None,
        "image-size": image_size,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if isinstance(model, nn.Module):
        for flag in given:
            if flag not in {"mean", "std"}:
                said = flag.replace("-", "_")
                raise ConfigError(f"a module is taken as it was built, got {said}: leave it out")
        return _wrap(model, means, stds)
    other: Any = model  # a caller without a type checker may pass anything
    if not isinstance(other, (str, Path)):
        raise ConfigError(
            f"a model is a module, a path or a name, got {type(other).__name__}: load a state "
            "dict into its module, or save it and give the file and arch"
        )
    require_utf8("model", model)
    name, path = str(model), Path(model)
    is_file = path.suffix.lower() in WEIGHT_SUFFIXES and path.is_file()
    for flag in given:
        if flag in {"arch", "num-heads", "mean", "std"}:
            if not is_file:
                raise ConfigError(
                    f"{flag} is for a file of bare weights ({', '.join(WEIGHT_SUFFIXES)}), got it "
                    f"with {name!r}: leave it out, or correct the path or the file's ending"
                )
        elif not name.startswith(TIMM):
            why = ", whose weights or configuration say the size" if flag == "image-size" else ""
            raise ConfigError(f"{flag} is for timm:NAME, got it with {name!r}{why}: leave it out")
    if is_file:
        return load_checkpoint(path, arch=arch, mean=means, std=stds, num_heads=num_heads)
    if name.startswith(TIMM):
        plain = name.removeprefix(TIMM)
        if random_weights:
            return load_random(plain, image_size)
        return load_timm(plain, name, image_size)
    if name.startswith(HUB):
        return _from_hub(name)
    return _from_folder(name)


def _wrap(
    module: nn.Module, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Model:
    """A copy of a user's module, in float32 on the CPU."""
    if mean is None or std is None:
        raise ConfigError(
            "a module needs mean and std, on the scale 0 to 1, one number each or one per channel: "
            "give those that it was trained with"
        )
    if any(tensor.is_meta for tensor in module.parameters()):
        raise ModelError("the module is on the device meta, without values: load its weights first")
    own = as_classifier(deepcopy(module).float().cpu().eval())
    weights = read_weights(own)
    if not {len(mean), len(std)} <= {1, weights.channels}:
        raise ConfigError(
            f"mean and std need one number each, or {weights.channels}, one per channel, got "
            f"{len(mean)} and {len(std)}"
        )
    turns = type(module).__module__.startswith("transformers.")
    orientation = "apply" if turns else "ignore"
    preprocessing = Preprocessing(
        image_size=weights.image_size,
        mean=per_channel(mean, weights.channels, "mean"),
        std=per_channel(std, weights.channels, "std"),
        framing=replace(WHOLE, channels=weights.channels, orientation=orientation),
    )
    name = type(module).__name__
    labels = labels_of(getattr(module, "config", None), name)
    if labels is not None and len(labels.ids) != weights.num_classes:
        labels = None  # Those of a classifier that was replaced.
    return Model.of(own, name, preprocessing, labels)


def _from_hub(name: str) -> Model:
    """A repository of timm or transformers; its ``config.json`` says which."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    where: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    problem = f"cannot load the model {name!r}"
    with told_as(problem), hub_access():
        config = read_config(Path(hf_hub_download(filename=CONFIG, **where)))
    with told_as(problem), hub_access():
        folder = Path(snapshot_download(allow_patterns=_HF_FILES, **where))
        if not any((folder / file).is_file() for file in WEIGHTS):
            folder = Path(snapshot_download(allow_patterns=_PICKLED, **where))
    require_plausible(config, folder)
    if "architecture" in config or "model_type" not in config:
        return load_timm(name, name)
    return load_hf_folder(folder, name)


def _from_folder(name: str) -> Model:
    """The shipped model, a folder of timm or transformers, or the model that a run trained."""
    if name == SHIPPED_MODEL:
        folder = Path(str(resources.files("vitcut"))) / "assets" / name
    else:
        require_there(name)
        folder = Path(name.removeprefix("local-dir:"))
        if folder.suffix.lower() == ".onnx":
            raise ModelError(
                f"{folder} is an .onnx file, which only predict reads: give the model that it was "
                "made from"
            )
        if not folder.is_dir():
            raise ModelError(
                f"{folder} is a file: expected a model folder with {CONFIG}, or weights in a file "
                f"that ends in {', '.join(WEIGHT_SUFFIXES)}"
            )
        folder = folder / "dense" if (folder / "dense").is_dir() else folder
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} holds no {CONFIG}: expected a folder of timm or transformers, with "
            f"{CONFIG} and {TENSORS}"
        )
    config = read_config(folder / CONFIG)
    hugging_face = "model_type" in config and "architecture" not in config
    # timm's save_for_hf writes this name, unless it is asked for safetensors.
    if not (hugging_face or any((folder / name).is_file() for name in (TENSORS, _TIMM_PICKLED))):
        raise ModelError(f"{folder} holds no {TENSORS}: expected it beside its {CONFIG}")
    require_plausible(config, folder)
    if "vitcut" in config:
        _check_own(folder, config)
    if hugging_face:
        return _turning(config, load_hf_folder(folder, name))
    if "torchvision" in config:
        # Imported here: torchvision's models take seconds to import.
        from vitcut.model.torchvision_models import load_torchvision_folder

        return _turning(config, load_torchvision_folder(folder, name, config))
    if "architecture" in config:
        return _turning(config, load_timm(f"local-dir:{folder}", name))
    if "plan" in config:
        raise ModelError(
            f"{folder} is a compact model, expected a dense one: give the model it was cut from"
        )
    raise ModelError(
        f"{folder / CONFIG} names no architecture: expected a dense model of timm (architecture) "
        "or transformers (model_type)"
    )


def _turning(config: dict[str, Any], model: Model) -> Model:
    """The model, whose pictures are turned as its folder says, or else as its library does."""
    taken = model.preprocessing
    stated = config.get(ORIENTATION, taken.framing.orientation)
    framing = replace(taken.framing, orientation=stated)
    return replace(model, preprocessing=replace(taken, framing=framing))


def _check_own(folder: Path, config: dict[str, Any]) -> None:
    """Check version and hashes of a folder that vitcut wrote."""
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
    library = {key: value for key, value in config.items() if key != "vitcut"}
    found = {
        TENSORS: (own.get("weights_sha256"), sha256_file(folder / TENSORS)),
        # Folders of earlier versions have no hash of their configuration.
        CONFIG: (own.get("config_sha256"), hash_of_read(library)),
    }
    others = own.get("files_sha256", {})
    for file, expected in others.items() if isinstance(others, dict) else ():
        path = folder / Path(file).name
        found[path.name] = (expected, sha256_file(path) if path.is_file() else None)
    for file, (expected, now) in found.items():
        if expected is not None and expected != now:
            raise ModelError(
                f"{folder / file} is not the file that was saved (its SHA-256 differs): restore "
                f"it or train again; if it was changed on purpose, remove 'vitcut' from {CONFIG}"
            )
