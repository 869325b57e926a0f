"""Where a training keeps what it needs to go on: weights, optimiser state, metrics, the result.

Each file is written atomically, and nothing is pickled. When to write is left to `loop`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitcut.errors import ArtefactError
from vitcut.shapes import Tensor
from vitcut.store import atomic_path, read_json, write_json, write_text

_FORMAT_VERSION = 1
_MARKER = "training.json"


class TrainingFolder:
    """The files of one training: ``training.json``, ``metrics.jsonl`` and ``checkpoints/``."""

    def __init__(self, root: Path, *, settings_hash: str, settings: dict[str, Any]) -> None:
        self._root = root
        self._settings_hash = settings_hash
        self._settings = settings
        self._marker = root / _MARKER
        self._metrics = root / "metrics.jsonl"
        self.last = root / "checkpoints" / "last.safetensors"
        """State after the last whole epoch."""
        self.best = root / "checkpoints" / "best.safetensors"
        """Weights of the best epoch."""

    def open(self) -> dict[str, Any] | None:
        """Claim the folder for these settings; before its first checkpoint it is anyone's.

        Returns:
            The result, where this training is finished.

        Raises:
            ArtefactError: The folder holds the training of other settings.
        """
        content = self._read_marker()
        if content is None or (content.get("result") is None and not self.last.exists()):
            self._write_marker(None)
            return None
        found = content.get("settings_hash")
        if found != self._settings_hash:
            raise ArtefactError(
                f"{self._root} holds a training with other settings, images or starting weights "
                f"(hash {found}, this one has {self._settings_hash}): choose another folder or "
                "delete it"
            )
        return content.get("result")

    def finish(self, result: dict[str, Any]) -> None:
        """Record the result: from now on the training is not redone."""
        self._write_marker(result)

    def read_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """The rows of the first ``epochs`` epochs; what follows them is cut off the file.

        Raises:
            ArtefactError: The file lacks rows, or holds something else.
        """
        text = self._metrics.read_text(encoding="utf-8") if self._metrics.exists() else ""
        lines = text.splitlines(keepends=True)[:epochs]
        try:
            rows = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            rows = []
        if [row["epoch"] for row in rows] != list(range(1, epochs + 1)):
            raise ArtefactError(
                f"{self._metrics} does not hold the {epochs} epochs that its checkpoint has "
                "seen: delete the training's folder and run again"
            )
        write_text(self._metrics, "".join(lines))
        return rows

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line."""
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")

    def _read_marker(self) -> dict[str, Any] | None:
        if not self._marker.exists():
            return None
        return read_json(self._marker, kind="training", newest_version=_FORMAT_VERSION)

    def _write_marker(self, result: dict[str, Any] | None) -> None:
        content = {
            "format_version": _FORMAT_VERSION,
            "settings_hash": self._settings_hash,
            "settings": self._settings,
            "result": result,
        }
        write_json(self._marker, content)


def read_training(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the result of a finished training.

    Raises:
        ArtefactError: There is none, it is damaged, or it is not finished.
    """
    path = root / _MARKER
    content = read_json(path, kind="training", newest_version=_FORMAT_VERSION)
    settings, result = content.get("settings"), content.get("result")
    if result is None:
        raise ArtefactError(f"the training in {root} is not finished: run its command again")
    if not isinstance(settings, dict) or not isinstance(result, dict):
        raise ArtefactError(f"{path} is damaged: expected settings and a result")
    return settings, result


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON values into one safetensors file, atomically.

    Raises:
        ArtefactError: The file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(plain, temporary, metadata={"vitcut": json.dumps(facts)})
    except SafetensorError as error:
        raise ArtefactError(f"cannot write {path}: {error}; is the disk full?") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        ArtefactError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            facts = json.loads(stream.metadata()["vitcut"])
            return {name: stream.get_tensor(name) for name in stream.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtefactError(
            f"{path} is not a readable checkpoint ({error}): delete its training's folder and "
            "run again"
        ) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter number; learning rates follow from the schedule."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value for number, part in state.items() for name, value in part.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors under ``prefix/name``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors that stand under ``prefix/``, without it."""
    start = f"{prefix}/"
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
