"""Tensors in sealed safetensors files: hashed at writing, verified at reading. Never pickle."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitcut.errors import ArtefactError, shortage
from vitcut.shapes import Tensor
from vitcut.store import REMEDY, atomic_path, sealed, unsealed

_KEY = "vitcut"
"""The one key in the metadata: several would be written in random order."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, version: int
) -> None:
    """Write tensors and JSON values into one sealed safetensors file, atomically.

    Raises:
        ArtefactError: The file cannot be written.
    """
    plain = unshared(tensors)
    whole = sealed({**facts, "tensors": hash_tensors(sorted(plain.items()))}, version)
    try:
        with atomic_path(path) as temporary:
            save_file(plain, temporary, metadata={_KEY: json.dumps(whole)})
    except SafetensorError as error:
        if shortage(error):
            raise
        raise ArtefactError(f"cannot write {path}: {error}; is the disk full?") from None


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors writes them: dense, on the CPU, and copies where they share memory."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return found


def read_tensors(
    path: Path, *, kind: str, version: int, remedy: str = REMEDY
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON values that `write_tensors` wrote.

    Args:
        path: The file.
        kind: What it holds, for messages: "checkpoint", "fill", ...
        version: The ``format_version`` that the caller understands.
        remedy: What to do if it is damaged.

    Raises:
        ArtefactError: The file is missing, damaged, altered, or of another version; or a tensor
            holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            whole = json.loads((stored.metadata() or {}).get(_KEY, "null"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if shortage(error) and not isinstance(error, RecursionError):
            raise
        raise ArtefactError(f"{path} is not a readable {kind}: {error}; {remedy}") from None
    facts = unsealed(whole, path, kind=kind, version=version, oldest=version, remedy=remedy)
    if facts.pop("tensors", None) != hash_tensors(sorted(tensors.items())):
        raise ArtefactError(
            f"{path} was altered: its hash is not the one that it was written with; {remedy}"
        )
    require_finite(tensors, path)
    return tensors, facts


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that hold NaN or infinity.

    Raises:
        ArtefactError: One does.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtefactError(
                f"{path} holds numbers that are not finite, in {name}: restore it, or make it again"
            )


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, types and values of tensors, in hex."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        # As bytes, because numpy has no bfloat16.
        plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()
