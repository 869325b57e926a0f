"""Models for software other than vitcut: `export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcut.compact.info import preprocessing_of
from vitcut.deployment import for_use
from vitcut.exports.settings import ExportSettings
from vitcut.inputs import (
    for_images,
    require,
    require_classes_of,
    require_made_for,
)

if TYPE_CHECKING:
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.exports.export import Exported
    from vitcut.images.load import Images
    from vitcut.model.model import Model


def export(
    model: "Model | CompactViT | Cut",
    images: "Images | None" = None,
    *,
    settings: ExportSettings = ExportSettings(),
    out: str | Path = "runs/export",
) -> "list[Exported]":
    """Write a model as files for other software, each checked against torch.

    Args:
        model: From `load_model`, `cut` or ``CompactViT.from_pretrained``.
        images: The images of the model's task, which files are checked on; without them, random
            ones are used. A dense model keeps the classes of their task only.
        settings: Targets, and how they are written.
        out: Directory; each target has a folder in it, such as ``onnx/``, with the file, labels,
            a README that says how to use it, and ``export.json``.

    Raises:
        ConfigError: A target's package is not installed, or int8 is asked for without images.
        TaskError: The model's classes are not the task's.
        ExactnessError: A target computes something else than torch; it is not written.
        ArtefactError: ``out`` cannot be written to, or holds something else.
    """
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.exports.export import export_targets, make_subject
    from vitcut.model.model import Model

    check_export({"settings": settings, "out": out})
    if isinstance(model, (Cut, CompactViT)):
        compact = model.model if isinstance(model, Cut) else model
        if images is not None:
            require_classes_of(compact, images.task)
            require_made_for(preprocessing_of(compact.info), images)
        module, info = for_use(compact)
    else:
        dense, task = require(model, Model), None
        if images is not None:
            dense, task = for_images(dense, images), images.task
        module, info = for_use(dense, task)
    subject = make_subject(module, info, images, settings)
    return export_targets(subject, Path(out), settings)


def check_export(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `export` that cannot work, before anything is loaded.

    Raises:
        ConfigError: A target's package is not installed.
        ArtefactError: ``out`` cannot be written to, or holds something else.
    """
    from vitcut.exports.export import require_packages, require_writable

    require_packages(given["settings"].to)
    require_writable(Path(given["out"]), given["settings"].to)
