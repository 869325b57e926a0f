"""Writes dense models to disk, as folders in their library's own format."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vitcut.errors import ModelError
from vitcut.framing import WHOLE, Framing
from vitcut.model.adapters import LIBRARIES, as_classifier, library_of
from vitcut.model.loaded import Preprocessing
from vitcut.store import atomic_folder, sha256_file, sha256_json, write_json, write_text

FORMAT_VERSION = 1
CONFIG, TENSORS = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class DenseCard:
    """What the folder of a dense model holds besides its weights."""

    task_name: str
    class_ids: tuple[str, ...]
    """Ids of the fine classes, in the order of the logits."""
    class_names: tuple[str, ...]
    """Human-readable names of the fine classes, in the same order."""
    group_names: tuple[str, ...]
    """Names of the task's coarse groups."""
    image_size: int
    """Height and width, in pixels."""
    mean: tuple[float, ...]
    """Subtracted per channel, on the scale 0 to 1."""
    std: tuple[float, ...]
    """Divided by per channel, on the scale 0 to 1."""
    framing: Framing = WHOLE
    """How images are made from pictures."""
    text: str
    """The model card, which becomes README.md."""


def save_dense(model: nn.Module, folder: Path, *, card: DenseCard) -> None:
    """Write a model in its library's own format; an existing folder of that name is replaced.

    A timm model can be read with ``timm.create_model("local-dir:FOLDER", pretrained=True)``, one
    of transformers with ``from_pretrained``. torchvision has no folder format, so only
    ``load_model`` reads those.

    Args:
        model: A model of timm, torchvision or transformers.
        folder: Where ``config.json``, ``model.safetensors`` and ``README.md`` go.
        card: What to write besides the weights.

    Raises:
        ModelError: The model's class is not one of those libraries'.
    """
    require_savable(model)
    model, library = as_classifier(model), library_of(model)
    taken = Preprocessing(
        image_size=card.image_size, mean=card.mean, std=card.std, framing=card.framing
    )
    with atomic_folder(folder) as fresh:
        if library == "transformers":
            from vitcut.model.transformers_folders import save_hf_folder

            save_hf_folder(model, fresh, taken, card.class_ids)
            config = json.loads((fresh / CONFIG).read_text(encoding="utf-8"))
        elif library == "torchvision":
            from vitcut.model.torchvision_models import save_torchvision_folder

            config = save_torchvision_folder(model, fresh, taken)
            config |= {"class_ids": list(card.class_ids), "class_names": list(card.class_names)}
        else:
            from vitcut.model.timm_folders import save_timm_folder

            class_names = dict(zip(card.class_ids, card.class_names, strict=True))
            config = save_timm_folder(model, fresh, taken, class_names)
        # transformers keeps unknown entries of the folder that a model was read from; the hash
        # below is of the library's entries alone.
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
        ModelError: Its class is not one of timm, torchvision or transformers.
    """
    if library_of(model) not in LIBRARIES:
        raise ModelError(
            f"a {type(model).__name__} cannot be saved as a folder that vitcut reads back, only "
            f"models of {', '.join(LIBRARIES)} can: save its state_dict() yourself; a repair "
            "leaves the dense model out with --repair-dense false"
        )
