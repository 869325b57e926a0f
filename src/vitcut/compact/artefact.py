"""The model directory: config.json, tensors, circuit, fill and card. Never pickle."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitcut.circuit import Circuit
from vitcut.compact.card import model_card
from vitcut.compact.info import ModelInfo
from vitcut.compact.plan import Plan
from vitcut.errors import ArtefactError, printable, shortage
from vitcut.hub import HUB_ID, hub_access
from vitcut.shapes import Tensor
from vitcut.store import (
    FOLDER_REMEDY,
    atomic_folder,
    atomic_path,
    convert,
    read_json,
    sealed,
    sha256_file,
    write_json,
    write_text,
)
from vitcut.tensors import require_finite, unshared

FORMAT_VERSION = 7
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
CIRCUIT, FILL = "circuit.json", "fill.safetensors"
LABELS = "labels.txt"


def save_folder(
    folder: Path,
    *,
    plan: Plan,
    info: ModelInfo,
    tensors: Mapping[str, Tensor],
    circuit: str | Path | None,
    fill: str | Path | None,
    card: str | None,
    origin: Path | None,
) -> None:
    """Write a model directory: see ``CompactViT.save_pretrained``.

    Args:
        folder: Where.
        plan: What the model computes.
        info: What else a user of the model needs to know.
        tensors: Its weights.
        circuit: Path or text; None takes that of ``origin``, if it has one.
        fill: Path.
        card: Text; None takes that of ``origin``, if these are the weights that it was written for.
        origin: The model directory that the model was loaded from.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file, expected a directory or nothing")
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise ArtefactError(f"{folder} exists and is not a model directory: choose another --out")
    if circuit is None and origin is not None and (origin / CIRCUIT).is_file():
        circuit = origin / CIRCUIT
    with atomic_folder(folder) as fresh:
        if circuit is not None and str(circuit).lstrip().startswith("{"):
            write_text(fresh / CIRCUIT, str(circuit))
        elif circuit is not None:
            _copy(circuit, fresh / CIRCUIT)
        if fill is not None:
            _copy(fill, fresh / FILL)
        weights = fill_folder(fresh, plan=plan, info=info, tensors=tensors)
        if card is None and origin is not None and (origin / CARD).is_file():
            same = (origin / CONFIG).is_file() and recorded_hash(origin) == weights
            card = (origin / CARD).read_text(encoding="utf-8") if same else None
        if card is not None:
            write_text(fresh / CARD, card)


def fill_folder(fresh: Path, *, plan: Plan, info: ModelInfo, tensors: Mapping[str, Tensor]) -> str:
    """Write a model into a new folder, and bind it to the circuit and the fill that lie there.

    Its card says nothing of how it was made and measured, which is for others to add.

    They are bound by what they compute, so that one model has the same hashes however long it took
    to find, and wherever it lies.

    Returns:
        The SHA-256 of its weights, in hex, which is also in its configuration.
    """
    path = fresh / TENSORS
    plain = unshared(tensors)
    try:
        with atomic_path(path) as temporary:
            save_file(plain, temporary)
    except SafetensorError as error:
        if shortage(error):
            raise
        raise ArtefactError(
            f"cannot write {TENSORS} into {fresh.parent}: {error}; is the disk full?"
        ) from None
    weights_hash = sha256_file(path)
    described = {
        "model_sha256": weights_hash,
        "circuit": None,
        "fill": None,
        **asdict(info),
        "plan": plan.to_dict(),
    }
    if (fresh / CIRCUIT).exists():
        described["circuit"] = Circuit.load(fresh / CIRCUIT).fingerprint
    if (fresh / FILL).exists():
        described["fill"] = sha256_file(fresh / FILL)
    write_json(fresh / CONFIG, sealed(described, FORMAT_VERSION))
    if info.class_names:
        write_labels(fresh / LABELS, info.class_names)
    write_text(fresh / CARD, model_card(info))
    return weights_hash


def write_labels(path: Path, names: Sequence[str]) -> None:
    """Write class names as ``load_model(labels=...)`` reads them: one a line, in logit order."""
    lines = [printable(" ".join(name.split())) for name in names]
    write_text(path, "\n".join(lines) + "\n")


def recorded_hash(folder: Path, name: str = "model_sha256") -> str | None:
    """What a model directory says of the hash of its weights, or of its ``fill``."""
    return read_json(
        folder / CONFIG, kind="compact model", version=FORMAT_VERSION, remedy=FOLDER_REMEDY
    )[name]


def load_folder(folder: Path) -> tuple[Plan, ModelInfo, dict[str, Tensor]]:
    """Read the plan, the information and the tensors of a model directory.

    Its fill is not looked at: it can be larger than the model, which runs without it.

    Raises:
        ArtefactError: A file is missing, damaged, altered or of another version, or not the one
            that the others were saved with.
    """
    if not (folder / CONFIG).exists():
        # A run directory has models in it, which may be what was meant.
        models = [path.parent for path in [folder / "model" / CONFIG] if path.exists()]
        models += [path.parent for path in sorted(folder.glob(f"points/*/model/{CONFIG}"))]
        where = f"it is a run directory, give one of its models: {', '.join(map(str, models))}"
        expected = f"expected a model directory that vitcut wrote, with {CONFIG} and {TENSORS}"
        raise ArtefactError(f"no compact model at {folder}: {where if models else expected}")
    config = read_json(
        folder / CONFIG, kind="compact model", version=FORMAT_VERSION, remedy=FOLDER_REMEDY
    )
    path, plan = folder / TENSORS, config.pop("plan", None)
    bound = {name: config.pop(name, None) for name in ("model_sha256", "circuit", "fill")}
    if not path.is_file():
        raise ArtefactError(f"{folder} lacks {TENSORS}: copy the whole model directory")
    if sha256_file(path) != bound["model_sha256"]:
        raise ArtefactError(f"{path} was altered: its hash is not the one in {CONFIG}")
    circuit = folder / CIRCUIT
    if circuit.exists() and Circuit.load(circuit).fingerprint != bound["circuit"]:
        raise ArtefactError(
            f"the circuit in {folder} is not the one that the model was saved with: restore it, "
            "or remove it"
        )
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        if shortage(error):
            raise
        raise ArtefactError(f"{path} is not readable: {error}") from None
    types = {str(tensor.dtype) for tensor in tensors.values()}
    if len(types) > 1 or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ArtefactError(
            f"{path} must hold floating-point numbers of one type, got {', '.join(sorted(types))}"
        )
    require_finite(tensors, path)
    try:
        read = Plan.from_dict(plan)
        what = "its information does not fit"
        info = convert(config, ModelInfo, what=what, remedy="save the model again")
        info.require_fit(read)
    except ArtefactError as error:
        raise ArtefactError(f"{folder / CONFIG}: {error}") from None
    return read, info, tensors


def resolve_folder(folder_or_hub_id: str | Path, *, revision: str | None) -> Path:
    """A local model directory, downloaded from the Hugging Face hub if need be.

    Raises:
        ArtefactError: There is none.
    """
    folder = Path(folder_or_hub_id)
    if folder.exists():
        return folder
    name = str(folder_or_hub_id)
    if isinstance(folder_or_hub_id, Path) or not HUB_ID.fullmatch(name):
        raise ArtefactError(f"no model directory at {name}: expected one that vitcut wrote")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Whoever loads a model from the Hub runs it; a fill can be larger than the model.
    files = [CONFIG, TENSORS, CIRCUIT, CARD]
    try:
        with hub_access():
            return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if shortage(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(f"no model directory at {name}, nor a hub model: {reason}") from None


def _copy(path: str | Path, to: Path) -> None:
    try:
        with atomic_path(to) as temporary:
            shutil.copyfile(path, temporary)
    except OSError as error:
        if shortage(error):
            raise
        raise ArtefactError(f"cannot read the {to.stem} {path}: {error}") from None
