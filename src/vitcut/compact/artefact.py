"""The model directory: config.json, tensors, circuit, fill and card. Never pickle.

Building the module that the tensors belong to is left to ``model.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitcut.compact.plan import Plan
from vitcut.errors import ArtefactError, ConfigError
from vitcut.framing import WHOLE, Framing
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
OLDEST_VERSION = 6
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
CIRCUIT, FILL = "circuit.json", "fill.safetensors"
_HASH = "config_sha256"
_FRAMING = "framing"
_UNHASHED = {"format_version", "model_sha256"}
_IN_A_RUN = (f"model/{CONFIG}", f"points/*/model/{CONFIG}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a user of a model needs to know besides its tensors."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel: subtracted from pixels between 0 and 1."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel: divided by afterwards."""
    class_names: tuple[str, ...] = ()
    """One per logit; empty if unknown."""
    group_names: tuple[str, ...] = ()
    group_of_class: tuple[int, ...] = ()
    """The group number of each class."""
    source_model: str | None = None
    """What the model was cut from."""
    source_sha256: str | None = None
    """Hash of the weights it was cut from."""
    framing: Framing = WHOLE
    """How its images were made from pictures, before mean and std."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What a model directory holds."""

    plan: Plan
    info: ModelInfo
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What lies beside a model for people: where it comes from, and what it is."""

    circuit: str | Path | None = None
    """The ``circuit.json`` that the model was compiled from: its path, or its text."""
    fill: str | Path | None = None
    """The ``fill.safetensors`` that stood in for what the circuit cuts."""
    card: str | None = None
    """The model card's text, for ``README.md``."""


def save_folder(folder: Path, model: StoredModel, beside: Companions) -> None:
    """Write a model directory; it appears as a whole or not at all.

    Raises:
        ArtefactError: ``folder`` exists and is no model directory, the circuit or the
            fill is missing, or the tensors cannot be written.
    """
    if folder.exists() and not (folder / CONFIG).is_file() and any(_children(folder)):
        raise ArtefactError(f"{folder} exists and is no model directory: choose another --out")
    circuit, fill = _read_circuit(beside.circuit), _read_fill(beside.fill)
    with atomic_folder(folder) as temporary:
        described = {**asdict(model.info), "plan": model.plan.to_dict()}
        _write_tensors(temporary / TENSORS, model.tensors, config_sha256=sha256_json(described))
        write_json(
            temporary / CONFIG,
            {
                "format_version": FORMAT_VERSION,
                "model_sha256": sha256_file(temporary / TENSORS),
                **described,
            },
        )
        if circuit is not None:
            write_text(temporary / CIRCUIT, circuit)
        if fill is not None:
            with atomic_path(temporary / FILL) as path:
                path.write_bytes(fill)
        if beside.card is not None:
            write_text(temporary / CARD, beside.card)


def load_folder(folder: Path) -> StoredModel:
    """Read a model directory.

    Raises:
        ArtefactError: A file is missing, damaged, altered or of another version.
    """
    if not (folder / CONFIG).exists():
        raise ArtefactError(f"no compact model at {folder}: {_where_else(folder)}")
    config = read_json(folder / CONFIG, kind="compact model", newest_version=FORMAT_VERSION)
    if config["format_version"] < OLDEST_VERSION:
        raise ArtefactError(
            f"{folder / CONFIG} has format_version {config['format_version']}, this vitcut reads "
            f"{OLDEST_VERSION} to {FORMAT_VERSION}: cut the model again from its circuit"
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
    return StoredModel(
        plan=Plan.from_dict(config["plan"]), info=_read_info(config), tensors=tensors
    )


def require_shapes(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, origin: Path
) -> None:
    """Refuse tensors that are not the ones a plan needs.

    Raises:
        ArtefactError: A tensor is missing, too many, or has another shape.
    """
    for name in sorted(set(expected) ^ set(tensors)):
        verb = "lacks" if name in expected else "has an unknown"
        raise ArtefactError(f"{origin / TENSORS} {verb} tensor {name}: save the model again")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ArtefactError(
                f"{origin / TENSORS}: {name} has shape {list(tensor.shape)}, the plan needs "
                f"{list(expected[name].shape)}: save the model again"
            )


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


def upload_folder(folder: Path, hub_id: str, *, private: bool) -> str:
    """Upload a model directory to the Hugging Face hub and return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(hub_id, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=hub_id, folder_path=folder)
    return str(commit.commit_url)


def _where_else(folder: Path) -> str:
    """What to load instead of a folder without a model, such as a run directory."""
    found = [path.parent for models in _IN_A_RUN for path in sorted(folder.glob(models))]
    if not found:
        return f"expected a model directory that vitcut wrote, with {CONFIG} and {TENSORS}"
    return f"it is a run directory, give one of its models: {', '.join(map(str, found))}"


def _read_circuit(circuit: str | Path | None) -> str | None:
    if circuit is None or str(circuit).lstrip().startswith("{"):
        return None if circuit is None else str(circuit)
    try:
        return Path(circuit).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot read the circuit {circuit}: {error}") from None


def _read_fill(fill: str | Path | None) -> bytes | None:
    if fill is None:
        return None
    try:
        return Path(fill).read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read the fill {fill}: {error}") from None


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], *, config_sha256: str) -> None:
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        # One key of metadata: safetensors writes several in random order.
        with atomic_path(path) as temporary:
            save_file(plain, temporary, metadata={_HASH: config_sha256})
    except SafetensorError as error:
        raise ArtefactError(
            f"cannot write {path.name} into {path.parent.parent}: {error}; is the disk full?"
        ) from None


def _read_info(config: dict[str, Any]) -> ModelInfo:
    values: dict[str, Any] = {}
    for item in fields(ModelInfo):
        if item.name in config:
            value = config[item.name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
        # Models of before framings were written were all cut from whole pictures, the default.
        elif item.name != _FRAMING:
            raise ArtefactError(f"{CONFIG} lacks {item.name}: save the model again")
    if _FRAMING in values:
        values[_FRAMING] = _read_framing(values[_FRAMING])
    return ModelInfo(**values)


def _read_framing(value: Any) -> Framing:
    try:
        return Framing(**value)
    except (TypeError, ConfigError) as error:
        raise ArtefactError(
            f"the {_FRAMING} in {CONFIG} is not one that this vitcut knows ({error}): upgrade "
            "vitcut, or save the model again"
        ) from None


def _children(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is a file, expected a directory or nothing")
    return list(folder.iterdir())
