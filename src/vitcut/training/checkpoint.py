"""The files of one training: ``training.json``, ``metrics.jsonl`` and ``checkpoints/``.

Every file but the metrics is replaced atomically, and nothing is pickled. The metrics are for
people: the checkpoint holds those that count.
"""

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcut.errors import ArtefactError, ConfigError, one_line, shortage
from vitcut.runs import TRAINING_FILE
from vitcut.settings import config_hash, require_at_least, require_fraction
from vitcut.shapes import Tensor
from vitcut.store import convert, load, save, write_text
from vitcut.tensors import read_tensors, write_tensors

_FORMAT_VERSION = 2
_LAST = Path("checkpoints") / "last.safetensors"
_REMEDY = "delete its training's folder and run again"


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
    """Of the training forward pass."""
    threads: int | None = None
    """CPU threads of torch, in the process that finished."""

    def __post_init__(self) -> None:
        for name in ("accuracy_fine", "accuracy_coarse"):
            if getattr(self, name) is not None:
                require_fraction(name, getattr(self, name))
        for name in ("seconds", "images_per_s"):
            require_at_least(name, getattr(self, name), 0)
        if self.threads is not None:
            require_at_least("threads", self.threads, 1)
        if not 1 <= self.best_epoch <= self.epochs_run:
            raise ConfigError(f"the best of {self.epochs_run} epochs is {self.best_epoch}")


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

    def __post_init__(self) -> None:
        for name in ("accuracy_fine", "accuracy_coarse"):
            if getattr(self, name) is not None:
                require_fraction(name, getattr(self, name))
        for name in ("learning_rate", "seconds", "train_seconds"):
            require_at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class _Marker:
    """The content of ``training.json``."""

    settings_hash: str
    settings: dict[str, Any]
    result: TrainResult | None = None

    def __post_init__(self) -> None:
        if self.settings_hash != config_hash(self.settings):
            raise ConfigError("its settings are not those that its hash is of")


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a checkpoint holds besides tensors."""

    of: str
    """Hash of the training's settings."""
    epochs: tuple[EpochMetrics, ...]
    """All that the state has seen; for the best weights, theirs alone."""


class TrainingFolder:
    """Everything that one training writes and reads back.

    Args:
        root: The folder.
        settings: Everything that the training depends on, as JSON values.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self._root = root
        self._own = _Marker(settings_hash=config_hash(settings), settings=settings)
        self._rows: tuple[EpochMetrics, ...] = ()
        self._metrics = root / "metrics.jsonl"
        self.last = root / _LAST
        """State after the last whole epoch."""
        self.best = root / "checkpoints" / "best.safetensors"
        """Weights of the best epoch."""
        self._next = root / "checkpoints" / "next.safetensors"
        """Weights of a better epoch, until its state is written."""

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
        # A kill before the state is written leaves the earlier state, so the epoch is repeated,
        # perhaps to other weights (on a GPU). So the earlier best weights stay until then: `resume`
        # drops weights and metrics of an epoch that the state has not seen.
        self._rows = (*self._rows[: row.epoch - 1], row)
        if is_best:
            kept = model if average is None else average
            self._write(self._next, kept.state_dict(), (row,))
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row), allow_nan=False) + "\n")
        state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for number, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{number}.{name}": value for name, value in moments.items()}
        if average is not None:
            state |= {f"ema/{name}": tensor for name, tensor in average.state_dict().items()}
        self._write(self.last, state, self._rows)
        if is_best:
            self._next.replace(self.best)

    def resume(
        self, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
    ) -> list[EpochMetrics]:
        """Load the state that `save_epoch` wrote last, if there is one, into its arguments.

        Returns:
            The metrics of the epochs that the state has seen.

        Raises:
            ArtefactError: The state is damaged, or is another training's.
        """
        self._rows = ()
        if self.last.exists():
            tensors, self._rows = self._read(self.last)
            if [row.epoch for row in self._rows] != list(range(1, len(self._rows) + 1)):
                raise ArtefactError(
                    f"{self.last} does not hold all epochs that it has seen: {_REMEDY}"
                )
            parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                parts[part][name] = tensor
            try:
                _load_weights(model, parts["model"])
                _load_moments(optimizer, parts["optimizer"])
                if average is not None:
                    _load_weights(average, parts["ema"])
            except (RuntimeError, ValueError, LookupError) as error:
                if shortage(error):
                    raise
                raise ArtefactError(
                    f"{self.last} does not fit the model that is trained "
                    f"({one_line(error)[:200]}): {_REMEDY}"
                ) from None
        if self._next.exists() and int(os.environ.get("RANK", "0")) == 0:
            if self._rows and self._read(self._next)[1] == self._rows[-1:]:
                self._next.replace(self.best)
            else:
                self._next.unlink()
        # Metrics are appended before the state is written: lines of an epoch that was killed in
        # between, and half lines, follow those that the state knows of.
        lines = [json.dumps(asdict(row), allow_nan=False) + "\n" for row in self._rows]
        write_text(self._metrics, "".join(lines))
        return list(self._rows)

    def load_best(self, model: nn.Module, result: TrainResult) -> None:
        """Load the weights of the best epoch.

        Raises:
            ArtefactError: They are missing, damaged, or of another epoch or training.
        """
        weights, rows = self._read(self.best)
        if [row.epoch for row in rows] != [result.best_epoch]:
            raise ArtefactError(
                f"{self.best} is not of epoch {result.best_epoch}, the best one: {_REMEDY}"
            )
        try:
            _load_weights(model, weights)
        except (RuntimeError, ValueError) as error:
            if shortage(error):
                raise
            raise ArtefactError(
                f"{self.best} does not fit the model ({one_line(error)[:200]}): {_REMEDY}"
            ) from None

    def _write(
        self, path: Path, tensors: dict[str, Tensor], rows: tuple[EpochMetrics, ...]
    ) -> None:
        facts = asdict(_State(of=self._own.settings_hash, epochs=rows))
        write_tensors(path, tensors, facts, version=_FORMAT_VERSION)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], tuple[EpochMetrics, ...]]:
        """Tensors and metrics of a checkpoint, which must be of this training."""
        tensors, facts = read_tensors(
            path, kind="checkpoint", version=_FORMAT_VERSION, remedy=_REMEDY
        )
        state = convert(facts, _State, what=f"{path} is not a checkpoint", remedy=_REMEDY)
        if state.of != self._own.settings_hash:
            raise ArtefactError(f"{path} is a checkpoint of another training: {_REMEDY}")
        return tensors, state.epochs


def _load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights of the model's own types; torch would convert others.

    Raises:
        ValueError: One is of another type.
        RuntimeError: They are of another model.
    """
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and tensor.dtype != own[name].dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {own[name].dtype}")
    model.load_state_dict(weights)


def _load_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Load an optimizer's state, one step and two moments per parameter.

    Raises:
        ValueError: It is not one of these parameters.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in moments.items():
        number, _, name = key.partition(".")
        shape = torch.Size() if name == "step" else parameters[int(number)].shape
        if value.shape != shape or not value.is_floating_point():
            raise ValueError(f"{key} has shape {list(value.shape)}, expected {list(shape)}")
        state[int(number)][name] = value
    if any(found.keys() != {"step", "exp_avg", "exp_avg_sq"} for found in state.values()):
        raise ValueError("the optimizer's state is not that of its parameters")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})


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
    found = load(path, _Marker, kind="training", version=_FORMAT_VERSION)
    # Nothing is lost before the first checkpoint: whoever comes takes the folder.
    kept = found.result is not None or (root / _LAST).exists()
    return found if kept else None


def read_training(root: Path) -> tuple[dict[str, Any], TrainResult]:
    """The settings and the result of a finished training.

    Raises:
        ArtefactError: There is none, it is damaged, or it is not finished.
    """
    found = load(root / TRAINING_FILE, _Marker, kind="training", version=_FORMAT_VERSION)
    if found.result is None:
        raise ArtefactError(f"the training in {root} is not finished: run its command again")
    return found.settings, found.result
