"""The training loop: trains, fine-tunes and retrains, resumes exactly, keeps the best epoch."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.overrides import TorchFunctionMode

from vitcut.errors import ArtefactError, ConfigError, ModelError, shortage
from vitcut.images.load import Images
from vitcut.metrics import coarse_log_probs
from vitcut.model.model import weight_hash
from vitcut.preprocessing import Preprocessing
from vitcut.progress import Meter, say
from vitcut.runtime import choose_device, choose_precision, set_threads
from vitcut.settings import as_plain, require_here, require_positive
from vitcut.shapes import Float, Tensor
from vitcut.task import Task
from vitcut.training.batches import Batch, TrainingBatches, normalize
from vitcut.training.checkpoint import EpochMetrics, TrainingFolder, TrainResult, begun_training
from vitcut.training.settings import TrainSettings

S = TypeVar("S", bound=TrainSettings)

_READ_LOSS_EVERY = 10
"""Steps; reading it makes a GPU wait."""
_VAL_BATCH_SIZE = 256


@runtime_checkable
class Loss(Protocol):
    """A loss of one batch; fine-tuning brings its own."""

    @property
    def identity(self) -> str:
        """Names the loss and everything it depends on; a training resumes only under the same."""
        ...

    def __call__(self, batch: Batch, logits: Float[Tensor, "images classes"]) -> Float[Tensor, ""]:
        """The mean loss over the images of a batch."""
        ...


class SoftCrossEntropy:
    """Cross-entropy with soft targets; timm's ``SoftTargetCrossEntropy`` computes the same."""

    identity = "soft cross-entropy"

    def __call__(self, batch: Batch, logits: Float[Tensor, "images classes"]) -> Float[Tensor, ""]:
        """The mean over the images, in nats."""
        return F.cross_entropy(logits, batch.targets)


class GroupCrossEntropy:
    """Cross-entropy of the task distribution, with targets over groups.

    For one group as the target, it is -log of the summed probability of the group's classes.
    """

    identity = "soft cross-entropy of groups"

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, batch: Batch, logits: Float[Tensor, "images classes"]) -> Float[Tensor, ""]:
        """The mean over the images, in nats."""
        group_of_class = torch.from_numpy(self._task.group_of_class).to(logits.device)
        groups = coarse_log_probs(logits, group_of_class, len(self._task.groups))
        return F.cross_entropy(groups, batch.targets)


def train(
    model: nn.Module,
    images: Images,
    settings: TrainSettings,
    out: Path,
    *,
    preprocessing: Preprocessing,
    loss: Loss | None = None,
    layer_decay: float = 1.0,
) -> TrainResult:
    """Train a model in place, or finish or reread a training that ``out`` holds.

    Run again after a kill with the same model and settings, it continues after the last whole
    epoch and ends with the same weights as without the kill, bit for bit on a CPU.

    Args:
        model: Gives logits of the task's fine classes. Afterwards it is in eval mode, on the device
            where it was, with the weights of the best epoch (coarse accuracy, then fine).
        images: Trained on ``train``, chosen on ``val``; ``test`` is not read.
        settings: The recipe.
        out: A folder for ``training.json``, ``metrics.jsonl`` and ``checkpoints/``.
        preprocessing: How images are normalised.
        loss: What to minimise; soft cross-entropy with the labels if None.
        layer_decay: The learning rate of a layer, as a fraction of the next one's.

    Raises:
        ArtefactError: ``out`` holds another training, or is damaged.
        ConfigError: The recipe does not fit the images or the machine.
        ModelError: The model gives another number of classes, or the loss is no longer finite.
    """
    for value in preprocessing.std:
        require_positive("std", value)
    require_here(settings)
    set_threads(settings.threads)
    settings = for_machine(settings, out)
    loss = loss or (GroupCrossEntropy(images.task) if images.task.folders else SoftCrossEntropy())
    home = next(model.parameters()).device
    known = training_settings(model, images, settings, loss, preprocessing=preprocessing)
    if layer_decay != 1:
        known["layer_decay"] = layer_decay
    folder = TrainingFolder(out, known)
    result = folder.open()
    if result is None:
        result = _Training(
            model,
            images,
            settings,
            folder,
            loss,
            preprocessing=preprocessing,
            layer_decay=layer_decay,
        ).run()
        folder.finish(result)
    folder.load_best(model, result)
    model.to(home).eval()
    return result


def for_machine(settings: S, out: Path) -> S:
    """The settings with what they leave open, chosen for this machine; the precision is printed.

    Args:
        settings: The recipe.
        out: The training's folder. A training that it holds keeps what it began with.

    Raises:
        ArtefactError: What the folder holds is damaged.
    """
    if settings.precision != "auto" and settings.compile is not None:
        return settings
    device = choose_device(settings.device)
    precision, why = choose_precision(device)
    # On CPUs, compiled steps are no faster: 780 images/s against 806 (animals, bfloat16), 289
    # against 330 (float32, AVX2), after 20 s of compiling.
    chosen: dict[str, Any] = {"precision": precision, "compile": device.type == "cuda"}
    begun = begun_training(out)
    if begun is not None:
        chosen, why = begun.get("config") or {}, "as this training began"
        if chosen.get("precision") not in {"float32", "bfloat16"} or not isinstance(
            chosen.get("compile"), bool
        ):
            raise ArtefactError(
                f"the training in {out} does not say its precision: delete it and run again"
            )
    if settings.precision == "auto":
        say(f"precision: {chosen['precision']} ({why})")
        settings = replace(settings, precision=chosen["precision"])
    if settings.compile is None:
        settings = replace(settings, compile=chosen["compile"])
    return settings


def training_settings(
    model: nn.Module,
    images: Images,
    settings: TrainSettings,
    loss: Loss,
    *,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """Everything that a training depends on, as JSON values; ``training.json`` holds it."""
    return {
        "config": {
            **{k: v for k, v in as_plain(settings).items() if k != "device"},
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
        },
        "loss": loss.identity,
        "images": images.fingerprint,
        "start": weight_hash(model),
    }


class _Training:
    """A training that is not finished."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        settings: TrainSettings,
        folder: TrainingFolder,
        loss: Loss,
        *,
        preprocessing: Preprocessing,
        layer_decay: float,
    ) -> None:
        self._images, self._preprocessing = images, preprocessing
        self._settings, self._folder, self._loss = settings, folder, loss
        device = choose_device(settings.device)
        # accelerate allows one precision per process, autocast one per training: so always "no".
        self._accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self._device = self._accelerator.device
        if self._accelerator.num_processes == 1:
            require_device(device, self._device)
        train, num_targets = images.train, len(images.task.class_ids)
        if images.task.folders:
            labels = images.task.group_of_label[train.labels]
            train, num_targets = replace(train, labels=labels), len(images.task.groups)
        self._batches = TrainingBatches(
            train,
            settings,
            mean=preprocessing.mean,
            std=preprocessing.std,
            num_classes=num_targets,
            device=self._device,
            rank=self._accelerator.process_index,
            num_processes=self._accelerator.num_processes,
        )
        self._model = model.to(self._device)
        _require_fit(model, images, settings, self._device)
        optimizer, self._schedule = create_optimizer(
            model, settings, self._batches.steps, layer_decay=layer_decay
        )
        prepared, self._optimizer = self._accelerator.prepare(model, optimizer)
        # Only training steps go through the compiled and distributed wrappers. The plain model
        # shares their weights: it is evaluated and saved, so no wrapper shows in weight names.
        self._forward = torch.compile(prepared) if settings.compile else prepared
        # The weight average is a copy of the model, so evaluating it does not disturb the training.
        decay = settings.ema_decay
        self._ema = None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True)
        self._average = None if self._ema is None else self._ema.module

    def run(self) -> TrainResult:
        """Train from the last checkpoint, or from the start, to the end."""
        epochs = self._settings.epochs
        patience = self._settings.patience or epochs
        images_per_epoch = self._batches.steps * self._settings.batch_size
        rows = self._folder.resume(
            model=self._model, optimizer=self._optimizer, average=self._average
        )
        with (
            _unfused_attention(self._model, self._settings, self._device),
            Meter("Train", (epochs - len(rows)) * images_per_epoch, unit="images") as meter,
        ):
            while len(rows) < epochs and (not rows or len(rows) - _best(rows).epoch < patience):
                rows.append(self._epoch(len(rows), meter))
                if self._accelerator.is_main_process:
                    self._folder.save_epoch(
                        rows[-1],
                        model=self._model,
                        optimizer=self._optimizer,
                        average=self._average,
                        is_best=_best(rows) is rows[-1],
                    )
                self._accelerator.wait_for_everyone()
        best = _best(rows)
        return TrainResult(
            best_epoch=best.epoch,
            accuracy_fine=best.accuracy_fine,
            accuracy_coarse=best.accuracy_coarse,
            epochs_run=len(rows),
            seconds=sum(row.seconds for row in rows),
            images_per_s=images_per_epoch * len(rows) / sum(row.train_seconds for row in rows),
            precision=self._settings.precision,
            threads=torch.get_num_threads(),
        )

    def _epoch(self, epoch: int, meter: Meter) -> EpochMetrics:
        start = time.perf_counter()
        self._model.train()
        steps, mean_loss = self._batches.steps, math.nan
        total = torch.zeros((), device=self._device)
        for step, batch in enumerate(self._batches.epoch(epoch), start=1):
            total += self._step(epoch * steps + step - 1, batch)
            note = None
            if step % _READ_LOSS_EVERY == 0 or step == steps:
                # Over the steps of the epoch so far, and over all processes.
                reduced: Any = self._accelerator.reduce(total / step, reduction="mean")
                if not math.isfinite(mean_loss := reduced.item()):
                    raise ModelError(
                        f"the training loss is {mean_loss} at epoch {epoch + 1}, step {step}, "
                        "expected a finite number: lower learning_rate, or set precision to float32"
                    )
                note = f"epoch {epoch + 1}/{self._settings.epochs}, loss {mean_loss:.4f}"
            meter.advance(self._settings.batch_size, note=note)
        train_seconds = time.perf_counter() - start
        fine, coarse = val_accuracies(
            self._model if self._average is None else self._average,
            self._images,
            preprocessing=self._preprocessing,
            accelerator=self._accelerator,
        )
        return EpochMetrics(
            epoch=epoch + 1,
            loss=mean_loss,
            accuracy_fine=fine,
            accuracy_coarse=coarse,
            learning_rate=max(group["lr"] for group in self._optimizer.param_groups),
            seconds=time.perf_counter() - start,
            train_seconds=train_seconds,
        )

    def _step(self, number: int, batch: Batch) -> Tensor:
        """One step; its number counts over all epochs."""
        self._schedule.step_update(number)
        with training_precision(self._settings, self._device):
            logits = self._forward(batch.inputs)
        loss = self._loss(batch, logits.float())
        self._optimizer.zero_grad()
        self._accelerator.backward(loss)
        self._optimizer.step()
        if self._ema is not None:
            self._ema.update(self._model, step=number)
        return loss.detach()


def _best(rows: list[EpochMetrics]) -> EpochMetrics:
    """The first epoch with the highest coarse, then fine, accuracy."""
    return max(rows, key=lambda row: (row.accuracy_coarse, row.accuracy_fine or 0, -row.epoch))


def val_accuracies(
    model: nn.Module,
    images: Images,
    *,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
) -> tuple[float | None, float]:
    """Fine and coarse accuracy on the val split, as fractions of 1.

    The fine one is None if the images are labelled with groups.

    Args:
        model: Computes in float32; left in eval mode.
        images: Each process evaluates its part of ``val``.
        preprocessing: How images are normalised.
        accelerator: Adds up over the processes.
    """
    model.eval()
    device = accelerator.device
    task = images.task
    group_of_class = torch.from_numpy(task.group_of_class).to(device)
    group_of_label = torch.from_numpy(task.group_of_label).to(device)
    own = np.arange(len(images.val))[accelerator.process_index :: accelerator.num_processes]
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    for start in range(0, len(own), _VAL_BATCH_SIZE):
        rows = own[start : start + _VAL_BATCH_SIZE]
        pixels = torch.from_numpy(images.val.read(rows)).to(device)
        labels = torch.from_numpy(images.val.labels[rows]).to(device)
        with torch.no_grad():
            logits = model(normalize(pixels, preprocessing.mean, preprocessing.std))
            coarse = coarse_log_probs(logits, group_of_class, len(task.groups))
        fine_hits = logits.argmax(1) == labels
        coarse_hits = coarse.argmax(1) == group_of_label[labels]
        correct += torch.stack([fine_hits.sum(), coarse_hits.sum()])
    total: Any = accelerator.reduce(correct, reduction="sum")
    fine, coarse = (total.double() / len(images.val)).tolist()
    return None if task.folders else fine, coarse


def create_optimizer(
    model: nn.Module,
    settings: TrainSettings,
    steps_per_epoch: int,
    *,
    layer_decay: float = 1.0,
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """AdamW with weight decay on weight matrices only, and its learning rates.

    The schedule warms up linearly, then follows a cosine to zero. It is a function of the step that
    ``step_update(step)`` is given, so it has no state to save. With layer decay, the classifier
    has the full learning rate, and each layer before it that fraction of the next one's.
    """
    if settings.learning_rate is None:
        raise ConfigError("learning_rate is None, expected a number: only a repair chooses its own")
    optimizer = create_optimizer_v2(
        model,
        "adamw",
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        layer_decay=None if layer_decay == 1 else layer_decay,
    )
    warmup = round(settings.warmup * steps_per_epoch)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs * steps_per_epoch - warmup,
        warmup_t=warmup,
        warmup_lr_init=settings.learning_rate / 100,
        warmup_prefix=True,
        lr_min=0.0,
        t_in_epochs=False,
    )
    return optimizer, schedule


def require_device(asked: torch.device, found: torch.device) -> None:
    """Refuse a training on another device than the one that was asked for.

    accelerate chooses it once for a process: the CPU after a training on the CPU, the first GPU
    whatever the number, and a GPU of their own for each of several processes.

    Raises:
        ConfigError: The devices differ.
    """
    # Without a number, any GPU will do.
    if asked.type != found.type or asked.index not in {None, found.index or 0}:
        raise ConfigError(
            f"device is {str(asked)!r}, but accelerate trains on {str(found)!r} in this process: "
            "start a new process for another kind of device, and choose a GPU by "
            "CUDA_VISIBLE_DEVICES"
        )


def _require_fit(
    model: nn.Module, images: Images, settings: TrainSettings, device: torch.device
) -> None:
    height, width, channels = images.train.array.shape[1:]
    if channels != 3 and settings.augmentation == "reference":
        raise ConfigError(
            f"augmentation 'reference' varies colours, the images have {channels} channel: use "
            "'light' or 'none'"
        )
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, channels, height, width, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        if shortage(error):
            raise
        raise ModelError(
            f"the model does not take images of {height} x {width} pixels and {channels} "
            f"channels: {' '.join(str(error).split())}"
        ) from None
    if settings.augmentation == "light" and settings.shift_px(min(height, width)) >= min(
        height, width
    ):
        raise ConfigError(
            f"max_shift_px must be below the images' {min(height, width)} pixels, got "
            f"{settings.max_shift_px}: nothing of a picture would be left"
        )
    wanted = len(images.task.class_ids)
    if logits.shape[1] != wanted:
        raise ModelError(
            f"the model gives {logits.shape[1]} classes, task {images.task.name!r} has {wanted}: "
            "give the model a classifier of that width"
        )


@contextmanager
def training_precision(settings: TrainSettings, device: torch.device) -> Generator[None]:
    """Run forward passes in the precision of the settings, with the attention that is fastest.

    On a CPU in bfloat16, torch's fused attention is slower than plain products. Compact models
    avoid it anyway; this is for timm's models: the teacher, and the dense model that gets the same
    repair. The function computed is the same.
    """
    low = settings.precision == "bfloat16"
    plain = low and device.type == "cpu" and not settings.compile
    with (
        _PlainAttention() if plain else nullcontext(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=low),
    ):
        yield


class _PlainAttention(TorchFunctionMode):
    """Replaces ``scaled_dot_product_attention`` wherever a model calls it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if (
            func is not F.scaled_dot_product_attention
            # Calls with a mask, dropout or anything else but a scale are left to torch.
            or len(args) != 3
            or any(value for name, value in given.items() if name != "scale")
        ):
            return func(*args, **given)
        q, k, v = args
        scale = given.get("scale")
        factor = float(q.shape[-1] ** -0.5) if scale is None else scale
        return torch.softmax((q * factor) @ k.transpose(-2, -1), dim=-1) @ v


@contextmanager
def _unfused_attention(
    model: nn.Module, settings: TrainSettings, device: torch.device
) -> Generator[None]:
    """Let torch.compile see inside timm's attention: 1.7 times as fast on a CPU in bfloat16."""
    parts: list[Any] = list(model.modules()) if settings.compile and device.type == "cpu" else []
    chosen = [part for part in parts if getattr(part, "fused_attn", False) is True]
    for part in chosen:
        part.fused_attn = False
    try:
        yield
    finally:
        for part in chosen:
            part.fused_attn = True
