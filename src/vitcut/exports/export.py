"""Write a model as files that other software runs, each checked against torch."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from torch import nn

from vitcut.compact.artefact import LABELS, write_labels
from vitcut.compact.info import ModelInfo, preprocessing_of
from vitcut.errors import ArtefactError, ConfigError, ModelError
from vitcut.exports.cards import export_card
from vitcut.exports.settings import ExportSettings
from vitcut.exports.target import EXTRA_OF, TARGETS, Subject, Written
from vitcut.extras import require_extra
from vitcut.images.load import Images, normalise
from vitcut.names import TargetName
from vitcut.progress import say
from vitcut.runtimes.session import frozen_copy, require_parity
from vitcut.store import atomic_folder, sha256_file, write_json, write_text

FORMAT_VERSION = 1
EXPORT_FILE, CARD_FILE = "export.json", "README.md"
_EXAMPLES, _CALIBRATION = 32, 128
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One target's folder."""

    target: TargetName
    folder: Path
    about: dict[str, Any] = field(repr=False)
    """The content of its export.json."""


def require_packages(targets: tuple[TargetName, ...]) -> None:
    """Refuse targets whose packages are not installed.

    Raises:
        ConfigError: One is not.
    """
    for target in targets:
        extra = EXTRA_OF[target]
        if extra is not None:
            require_extra(extra, what=f"target {target}")


def require_writable(out: Path, targets: tuple[TargetName, ...]) -> None:
    """Refuse a directory that exports cannot be written into, before anything is computed.

    Raises:
        ArtefactError: It is a file, may not be written to, or holds something else.
    """
    around = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not around.is_dir():
        raise ArtefactError(f"{around} is a file, expected a directory: choose another --out")
    if not os.access(around, os.W_OK | os.X_OK):
        raise ArtefactError(f"no permission to write into {around}: choose another --out")
    for target in targets:
        folder = out / target
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            if not (folder / EXPORT_FILE).is_file():
                raise ArtefactError(f"{folder} exists and is no export: choose another --out")
            if not os.access(folder, os.W_OK):
                raise ArtefactError(f"no permission to replace {folder}: choose another --out")


def make_subject(
    module: nn.Module, info: ModelInfo, images: Images | None, settings: ExportSettings
) -> Subject:
    """What targets get: real images where there are some, else random ones.

    Raises:
        ConfigError: int8 is asked for, which needs images; or nothing says how images are made.
        ModelError: The model cannot be run on them, or gives no finite numbers.
    """
    taken = preprocessing_of(info)
    if images is None and settings.precision == "int8":
        raise ConfigError(
            "int8 needs images to find the ranges of its numbers, got none: give --source"
        )
    count = _CALIBRATION if settings.precision == "int8" else _EXAMPLES
    if images is not None:
        chosen = images.calibration(min(count, len(images.train)), seed=_SEED)
        pixels = chosen.all()
    else:
        shape = (count, taken.image_size, taken.image_size, taken.framing.channels)
        pixels = np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8)
    model = frozen_copy(module).cpu()
    examples = normalise(pixels, taken)
    with torch.inference_mode():
        logits = model(examples[:2])
    if not logits.isfinite().all():
        raise ModelError("the model gave NaN or infinite logits: check its weights")
    return Subject(
        module=model,
        info=info,
        examples=examples,
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)),
        images=images,
    )


def export_targets(subject: Subject, out: Path, settings: ExportSettings) -> list[Exported]:
    """Write each target into its folder, and replace an earlier export there.

    A folder appears when all its files are written and its logits have been compared.

    Raises:
        ExactnessError: A target computes something else than torch.
    """
    made, taken = list[Exported](), preprocessing_of(subject.info)
    for target in settings.to:
        say(f"export: writing {target}")
        write = resolve_name(f"{TARGETS[target]}:write")
        with atomic_folder(out / target) as folder:
            written = write(subject, folder, settings)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            about: dict[str, Any] = {
                "format_version": FORMAT_VERSION,
                "target": target,
                "file": str(written.file.relative_to(folder)),
                "bytes": sum(path.stat().st_size for path in files),
                "sha256": sha256_file(written.file),
                "files": {
                    str(path.relative_to(folder)): {
                        "bytes": path.stat().st_size,
                        "sha256": sha256_file(path),
                    }
                    for path in files
                },
                "precision": settings.precision,
                "batch": settings.batch,
                **written.details,
                "parity": written.parity or compare(subject, written, target),
                "parity_on": "random images" if subject.images is None else "real images",
                "tools": written.tools,
                **asdict(subject.info),
            }
            write_json(folder / EXPORT_FILE, about)
            write_labels(folder / LABELS, subject.info.class_names)
            write_text(folder / CARD_FILE, export_card(subject.info, taken, written, about))
        advice = about.get("beside_float32", {}).get("advice")
        if advice:
            say(f"export: {advice}")
        made.append(Exported(target=target, folder=out / target, about=about))
    return made


def compare(subject: Subject, written: Written, target: TargetName) -> dict[str, Any]:
    """How far a file's logits are from torch's, and how many of its answers are the same.

    Raises:
        ExactnessError: They differ by more than rounding, and should not.
    """
    if written.run is None:
        raise TypeError(f"{target} has neither logits nor a comparison of its own")
    got = written.run(subject.examples)
    with torch.inference_mode():
        expected = torch.cat([subject.module(part) for part in subject.examples.split(32)])
    if written.exact:
        require_parity(got, expected, runtime=target)
    elif not got.isfinite().all():
        raise ModelError(f"{target} gave NaN or infinite logits: use precision float32")
    return {
        "of": "logits, against torch",
        "images": len(got),
        "max_abs_diff": float((got - expected).abs().max()),
        "labels_equal": int((got.argmax(-1) == expected.argmax(-1)).sum()),
    }
