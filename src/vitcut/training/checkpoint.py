"""The files of one training: ``training.json``, ``metrics.jsonl`` and ``checkpoints/``.

Every file but the metrics is replaced atomically, and nothing is pickled.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vitcut.errors import ArtefactError
from vitcut.runs import TRAINING_FILE
from vitcut.settings import config_hash
from vitcut.shapes import Tensor
from vitcut.store import atomic_path, load, save, write_text

_FORMAT_VERSION = 1
_LAST = Path("checkpoints") / "last.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a training ended; accuracies are on the val split, as fractions of 1."""

    best_epoch: int
    """Counted from 1; its weights are the result."""
    accuracy_fine: float | None
    """Of the best epoch; None if the images are labelled with groups."""
    accuracy_coarse: float
    """Of the best epoch."""
    epochs_run: int
    """Fewer than asked for after early stopping."""
    seconds: float
    """Of all epochs with evaluation, summed over every run of a resumed training."""
    images_per_s: float
    """Training images per second of training steps."""
    precision: str | None = None
    """Of the training forward pass; None in files of earlier versions."""
    threads: int | None = None
    """CPU threads of torch, in the process that finished; None in files of earlier versions."""


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``; accuracies are on the val split, as fractions of 1."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Mean over the steps of the epoch."""
    accuracy_fine: float | None
    accuracy_coarse: float
    learning_rate: float
    """At the last step."""
    seconds: float
    """Evaluation included."""
    train_seconds: float
    """Evaluation excluded."""


@dataclass(frozen=True, kw_only=True)
class _Marker:
    """The content of ``training.json``."""

    settings_hash: str
    settings: dict[str, Any]
    result: TrainResult | None = None


class TrainingFolder:
    """Everything that one training writes and reads back.

    Args:
        root: The folder.
        settings: Everything that the training depends on, as JSON values.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self._root = root
        self._own = _Marker(settings_hash=config_hash(settings), settings=settings)
        self._metrics = root / "metrics.jsonl"
        self.last = root / _LAST
        """State after the last whole epoch."""
        self.best = root / "checkpoints" / "best.safetensors"
        """Weights of the best epoch."""

    def open(self) -> TrainResult | None:
        """Claim the folder for these settings.

        Returns:
            The result if this training is already finished, else None.

        Raises:
            ArtefactError: The folder holds a training of other settings.
        """
        found = _read_marker(self._root)
        if found is None:
            save(self._root / TRAINING_FILE, self._own, version=_FORMAT_VERSION)
            return None
        if found.settings_hash != self._own.settings_hash:
            raise ArtefactError(
                f"{self._root} holds a training with other settings, images or starting weights "
                f"(hash {found.settings_hash}, this one has {self._own.settings_hash}): choose "
                "another folder or delete it"
            )
        return found.result

    def finish(self, result: TrainResult) -> None:
        """Record the result; from now on `open` returns it."""
        save(self._root / TRAINING_FILE, replace(self._own, result=result), version=_FORMAT_VERSION)

    def save_epoch(
        self,
        row: EpochMetrics,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
        is_best: bool,
    ) -> None:
        """Write what an epoch came to: its weights if they are the best, its metrics, the state.

        Weights, the optimizer's state, the weight average and the number of epochs are the whole
        state. Learning rates follow from the step, and batches and dropout from seed, epoch and
        step.

        Args:
            row: The metrics of the epoch.
            model: The trained weights.
            optimizer: Of the model.
            average: The averaged weights, which take the place of the model's where they are kept.
            is_best: Whether this is the best epoch so far.
        """
        # The state goes last. A kill before it leaves the earlier state, so the epoch is repeated;
        # `resume` cuts off its metrics, and the same epoch writes the same best weights again.
        if is_best:
            kept = model if average is None else average
            write_tensors(self.best, kept.state_dict(), {})
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row), allow_nan=False) + "\n")
        state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for number, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{number}.{name}": value for name, value in moments.items()}
        if average is not None:
            state |= {f"ema/{name}": tensor for name, tensor in average.state_dict().items()}
        write_tensors(self.last, state, {"epochs": row.epoch})

    def resume(
        self, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
    ) -> list[EpochMetrics]:
        """Load the state that `save_epoch` wrote last, if there is one, into its arguments.

        Returns:
            The metrics of the epochs that the state has seen.

        Raises:
            ArtefactError: The state is damaged, or does not fit the metrics.
        """
        epochs = 0
        if self.last.exists():
            tensors, facts = read_tensors(self.last)
            epochs = facts["epochs"]
            parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                parts[part][name] = tensor
            model.load_state_dict(parts["model"])
            state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
            for key, value in parts["optimizer"].items():
                number, _, name = key.partition(".")
                state[int(number)][name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
            if average is not None:
                average.load_state_dict(parts["ema"])
        # Metrics are appended before the state is written: lines of an epoch that was killed in
        # between, and half lines, follow those that the state knows of.
        text = self._metrics.read_text(encoding="utf-8") if self._metrics.exists() else ""
        lines = text.splitlines(keepends=True)[:epochs]
        try:
            rows = [msgspec.json.decode(line, type=EpochMetrics) for line in lines]
        except msgspec.DecodeError:
            rows = []
        if [row.epoch for row in rows] != list(range(1, epochs + 1)):
            raise ArtefactError(
                f"{self._metrics} does not hold the {epochs} epochs that its checkpoint has "
                "seen: delete the training's folder and run again"
            )
        write_text(self._metrics, "".join(lines))
        return rows


def begun_training(root: Path) -> dict[str, Any] | None:
    """The settings of a training that a folder holds, finished or not; None if it holds none.

    Raises:
        ArtefactError: It is damaged.
    """
    found = _read_marker(root)
    return None if found is None else found.settings


def _read_marker(root: Path) -> _Marker | None:
    path = root / TRAINING_FILE
    if not path.exists():
        return None
    found = _without_device(load(path, _Marker, kind="training", version=_FORMAT_VERSION))
    # Nothing is lost before the first checkpoint: whoever comes takes the folder.
    kept = found.result is not None or (root / _LAST).exists()
    return found if kept else None


def _without_device(found: _Marker) -> _Marker:
    """Earlier versions recorded the device, with which a training could not go on elsewhere."""
    config = found.settings.get("config", {})
    if "device" not in config:
        return found
    config = {key: value for key, value in config.items() if key != "device"}
    settings = {**found.settings, "config": config}
    return replace(found, settings=settings, settings_hash=config_hash(settings))


def read_training(root: Path) -> tuple[dict[str, Any], TrainResult]:
    """The settings and the result of a finished training.

    Raises:
        ArtefactError: There is none, it is damaged, or it is not finished.
    """
    found = _without_device(
        load(root / TRAINING_FILE, _Marker, kind="training", version=_FORMAT_VERSION)
    )
    if found.result is None:
        raise ArtefactError(f"the training in {root} is not finished: run its command again")
    return found.settings, found.result


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
    """Read the tensors and the JSON values that `write_tensors` wrote.

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
