"""The model directory: config.json, tensors, circuit, fill and card. Never pickle."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitcut.compact.plan import Plan
from vitcut.errors import ArtefactError, ConfigError
from vitcut.preprocessing import Framing, Preprocessing
from vitcut.shapes import Tensor
from vitcut.store import (
    atomic_folder,
    atomic_path,
    hash_of_read,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)

FORMAT_VERSION = 6
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
CIRCUIT, FILL = "circuit.json", "fill.safetensors"
_HASH = "config_sha256"
_UNHASHED = {"format_version", "model_sha256"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a user of a model needs to know besides its tensors."""

    preprocessing: Preprocessing | None = None
    """How pictures become what the model takes; None where that is not known."""
    class_names: tuple[str, ...] = ()
    """One per logit; empty if unknown."""
    group_names: tuple[str, ...] = ()
    group_of_class: tuple[int, ...] = ()
    """The group number of each class."""
    source_model: str | None = None
    """What the model was cut from."""
    source_sha256: str | None = None
    """Hash of the weights it was cut from."""


def save_folder(
    folder: Path,
    *,
    plan: Plan,
    info: ModelInfo,
    tensors: Mapping[str, Tensor],
    circuit: str | Path | None,
    fill: str | Path | None,
    card: str | None,
) -> None:
    """Write a model directory: see ``CompactViT.save_pretrained``."""
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file, expected a directory or nothing")
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise ArtefactError(f"{folder} exists and is not a model directory: choose another --out")
    # Whatever cannot be read is refused before anything is written.
    beside: dict[str, bytes] = {}
    if circuit is not None:
        is_text = str(circuit).lstrip().startswith("{")
        beside[CIRCUIT] = str(circuit).encode() if is_text else _read(circuit, "circuit")
    if fill is not None:
        beside[FILL] = _read(fill, "fill")
    described = {**asdict(info), "plan": plan.to_dict()}
    with atomic_folder(folder) as temporary:
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            # One key of metadata: safetensors writes several in random order.
            with atomic_path(temporary / TENSORS) as path:
                save_file(plain, path, metadata={_HASH: sha256_json(described)})
        except SafetensorError as error:
            raise ArtefactError(
                f"cannot write {TENSORS} into {folder.parent}: {error}; is the disk full?"
            ) from None
        # The hashes bind both files to each other: the config's is in the tensors' file.
        version = {"format_version": FORMAT_VERSION}
        hashes = {"model_sha256": sha256_file(temporary / TENSORS)}
        write_json(temporary / CONFIG, {**version, **hashes, **described})
        for name, content in beside.items():
            with atomic_path(temporary / name) as path:
                path.write_bytes(content)
        if card is not None:
            write_text(temporary / CARD, card)


def load_folder(folder: Path) -> tuple[Plan, ModelInfo, dict[str, Tensor]]:
    """Read the plan, the information and the tensors of a model directory.

    Raises:
        ArtefactError: A file is missing, damaged, altered or of another version.
    """
    if not (folder / CONFIG).exists():
        # A run directory has models in it, which may be what was meant.
        models = [path.parent for path in [folder / "model" / CONFIG] if path.exists()]
        models += [path.parent for path in sorted(folder.glob(f"points/*/model/{CONFIG}"))]
        where = f"it is a run directory, give one of its models: {', '.join(map(str, models))}"
        expected = f"expected a model directory that vitcut wrote, with {CONFIG} and {TENSORS}"
        raise ArtefactError(f"no compact model at {folder}: {where if models else expected}")
    config = read_json(folder / CONFIG, kind="compact model", newest_version=FORMAT_VERSION)
    if config["format_version"] < FORMAT_VERSION:
        raise ArtefactError(
            f"{folder / CONFIG} has format_version {config['format_version']}, this vitcut reads "
            f"{FORMAT_VERSION}: cut the model again from its circuit"
        )
    path = folder / TENSORS
    if not path.is_file():
        raise ArtefactError(f"{folder} lacks {TENSORS}: copy the whole model directory")
    if sha256_file(path) != config.get("model_sha256"):
        raise ArtefactError(f"{path} was altered: its hash is not the one in {CONFIG}")
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} is not readable: {error}") from None
    described = {key: config[key] for key in config.keys() - _UNHASHED}
    if hash_of_read(described) != metadata.get(_HASH):
        raise ArtefactError(
            f"{folder / CONFIG} was altered: it is not the one that {TENSORS} was saved with"
        )
    values: dict[str, Any] = {}
    for name in (item.name for item in fields(ModelInfo)):
        if name not in config:
            raise ArtefactError(f"{folder / CONFIG} lacks {name}: save the model again")
        values[name] = tuple(config[name]) if isinstance(config[name], list) else config[name]
    try:
        taken: Any = values["preprocessing"]
        if taken is not None:
            taken |= {name: tuple(taken[name]) for name in ("mean", "std")}
            taken["framing"] = Framing(**taken["framing"])
            values["preprocessing"] = Preprocessing(**taken)
    except (TypeError, KeyError, ConfigError) as error:
        raise ArtefactError(
            f"the preprocessing in {folder / CONFIG} is not one that this vitcut knows "
            f"({error!r}): upgrade vitcut, or save the model again"
        ) from None
    return Plan.from_dict(config["plan"]), ModelInfo(**values), tensors


def resolve_folder(folder_or_hub_id: str | Path, *, revision: str | None) -> Path:
    """A local model directory, downloaded from the Hugging Face hub if need be.

    Raises:
        ArtefactError: There is none.
    """
    folder = Path(folder_or_hub_id)
    if folder.exists():
        return folder
    name = str(folder_or_hub_id)
    if isinstance(folder_or_hub_id, Path) or not _HUB_ID.fullmatch(name):
        raise ArtefactError(f"no model directory at {name}: expected one that vitcut wrote")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [CONFIG, TENSORS, CIRCUIT, FILL, CARD]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(f"no model directory at {name}, nor a hub model: {reason}") from None


def _read(path: str | Path, kind: str) -> bytes:
    try:
        content = Path(path).read_bytes()
        if kind == "circuit":
            content.decode()
        return content
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot read the {kind} {path}: {error}") from None
