"""Dense models to disk, as folders that `loading` reads back, whatever library they are of."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitcut.errors import ModelError
from vitcut.framing import WHOLE, Framing
from vitcut.model.adapters import as_classifier, library_of
from vitcut.preprocessing import Preprocessing
from vitcut.store import atomic_folder, sha256_file, sha256_json, write_json, write_text

FORMAT_VERSION = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_SAVABLE = ("timm", "torchvision", "transformers")


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
    framing: Framing = WHOLE
    """How its images are made from pictures."""
    text: str
    """The model card: the content of README.md."""


def save_dense(model: nn.Module, folder: Path, *, card: DenseCard) -> None:
    """Write a model in its library's own format; a folder of that name is replaced.

    timm reads a timm model again with ``create_model("local-dir:FOLDER", pretrained=True)``,
    transformers one of its own with ``from_pretrained``; torchvision has no such format, so that
    only ``load_model`` reads those.

    Args:
        model: Of timm, torchvision or transformers.
        folder: Where ``config.json``, ``model.safetensors`` and ``README.md`` go.
        card: What to say beside the weights.

    Raises:
        ModelError: The model is of a class of its own.
    """
    require_savable(model)
    with atomic_folder(folder) as fresh:
        config = _save(as_classifier(model), fresh, card)
        # transformers keeps the entry of the folder that a model was read from.
        config.pop("vitcut", None)
        config["vitcut"] = {
            "format_version": FORMAT_VERSION,
            "task": card.task_name,
            "groups": list(card.group_names),
            "weights_sha256": sha256_file(fresh / TENSORS),
            "config_sha256": sha256_json(config),
        }
        write_json(fresh / CONFIG, config)
        write_text(fresh / "README.md", card.text)


def require_savable(model: nn.Module) -> None:
    """Refuse a model that `save_dense` cannot write.

    Raises:
        ModelError: It is of a class of its own.
    """
    if library_of(model) not in _SAVABLE:
        raise ModelError(
            f"a {type(model).__name__} cannot be saved as a folder that vitcut reads back, only "
            f"models of {', '.join(_SAVABLE)} can: save its state_dict() yourself; a repair leaves "
            "the dense model out with --repair-dense false"
        )


def _save(model: nn.Module, folder: Path, card: DenseCard) -> dict[str, Any]:
    """Write the weights and what the library needs; returns what ``config.json`` is to hold."""
    taken = Preprocessing(
        image_size=card.image_size, mean=card.mean, std=card.std, framing=card.framing
    )
    library = library_of(model)
    if library == "transformers":
        from vitcut.model.hf_folders import save_hf_folder

        save_hf_folder(model, folder, taken, card.class_ids)
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if library == "torchvision":
        from vitcut.model.torchvision_folders import save_torchvision_folder

        config = save_torchvision_folder(model, folder, taken)
        return {**config, "class_ids": list(card.class_ids), "class_names": list(card.class_names)}
    from vitcut.model.timm_folders import save_timm_folder

    class_names = dict(zip(card.class_ids, card.class_names, strict=True))
    return save_timm_folder(model, folder, taken, class_names)
