"""Write dense models to disk, as folders in their library's own format."""

import json
from pathlib import Path

from torch import nn

from vitcut.errors import ModelError
from vitcut.labels import Labels
from vitcut.model.adapters import LIBRARIES, as_classifier, library_of
from vitcut.preprocessing import Preprocessing
from vitcut.store import atomic_folder, sha256_file, sha256_json, write_json, write_text

FORMAT_VERSION = 1
ORIENTATION = "orientation"
"""The entry in a configuration that says to turn pictures otherwise than its library does."""
CONFIG, TENSORS = "config.json", "model.safetensors"


def save_dense(
    model: nn.Module, folder: Path, *, preprocessing: Preprocessing, labels: Labels, card: str
) -> None:
    """Write a model in its library's own format; an existing folder of that name is replaced.

    A timm model can be read with ``timm.create_model("local-dir:FOLDER", pretrained=True)``, one
    of transformers with ``from_pretrained``. torchvision has no folder format, so only
    ``load_model`` reads those.

    Args:
        model: A model of timm, torchvision or transformers.
        folder: Where ``config.json``, ``model.safetensors`` and ``README.md`` go.
        preprocessing: The model's preprocessing.
        labels: The classes, in the order of the logits.
        card: The model card, which becomes README.md.

    Raises:
        ModelError: The model's class is not one of those libraries'.
    """
    require_savable(model)
    model, library = as_classifier(model), library_of(model)
    with atomic_folder(folder) as fresh:
        if library == "transformers":
            from vitcut.model.transformers_folders import save_hf_folder

            save_hf_folder(model, fresh, preprocessing, labels.ids)
            config = json.loads((fresh / CONFIG).read_text(encoding="utf-8"))
        elif library == "torchvision":
            from vitcut.model.torchvision_models import save_torchvision_folder

            config = save_torchvision_folder(model, fresh, preprocessing)
            config |= {"class_ids": list(labels.ids), "class_names": list(labels.names)}
        else:
            from vitcut.model.timm_folders import save_timm_folder

            class_names = dict(zip(labels.ids, labels.names, strict=True))
            config = save_timm_folder(model, fresh, preprocessing, class_names)
        usual = "apply" if library == "transformers" else "ignore"
        if preprocessing.framing.orientation != usual:
            config[ORIENTATION] = preprocessing.framing.orientation
        # transformers keeps unknown entries of the folder that a model was read from; the hash
        # below is of the library's entries alone.
        config.pop("vitcut", None)
        config["vitcut"] = {
            "format_version": FORMAT_VERSION,
            "weights_sha256": sha256_file(fresh / TENSORS),
            "config_sha256": sha256_json(config),
            "files_sha256": {
                item.name: sha256_file(item)
                for item in sorted(fresh.iterdir())
                if item.name not in {CONFIG, TENSORS}
            },
        }
        write_json(fresh / CONFIG, config)
        write_text(fresh / "README.md", card)


def require_savable(
    model: nn.Module,
    *,
    remedy: str = "save its state_dict() yourself; a repair leaves the dense model out with "
    "--repair-dense false",
) -> None:
    """Refuse a model that `save_dense` cannot write.

    Args:
        model: The model.
        remedy: What to do instead, for the message.

    Raises:
        ModelError: Its class is not one of timm, torchvision or transformers.
    """
    if library_of(model) not in LIBRARIES:
        raise ModelError(
            f"a {type(model).__name__} cannot be saved as a folder that vitcut reads back, only "
            f"models of {', '.join(LIBRARIES)} can: {remedy}"
        )
