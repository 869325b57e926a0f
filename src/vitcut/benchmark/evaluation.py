"""How good a model is on a set of images: accuracy, KL divergence to the dense model, confusion."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitcut.benchmark.bootstrap import paired_interval
from vitcut.errors import ConfigError, DataError, ModelError, TaskError
from vitcut.images.load import ImageSet, normalise
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.preprocessing import Preprocessing
from vitcut.progress import say, track
from vitcut.results import AccuracyDifference
from vitcut.shapes import Float, Tensor
from vitcut.task import Task

_MOST_IN_BATCH, _PIXELS_IN_BATCH = 256, 2**21
"""Images per call, and their pixels: 41 images of 224 x 224."""


_MOST_FOR_WARNING = 300


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation:
    """What one model answered on one image set, image by image for paired comparisons."""

    images: int
    accuracy_fine: float | None
    """None if the images are labelled with groups."""
    accuracy_coarse: float
    kl: float | None
    """Mean KL(reference || model) on the task distribution, in nats; None without a reference."""
    confusion: tuple[tuple[int, ...], ...]
    """Images by true group (rows) and predicted group (columns)."""
    correct_fine: NDArray[np.bool_] | None
    """Whether the best fine class is the label, shape [images]; None as for the accuracy."""
    correct_coarse: NDArray[np.bool_]
    """Whether the most probable group is the label's, shape [images]."""
    log_probs: Float[Tensor, "images groups"]
    """The task distribution in float64; the reference for models cut from this one."""
    groups: tuple[str, ...]
    """The names of the groups, in the order of `confusion`."""
    name: str | None = None
    """What the model is called, where `vitcut.evaluate` measured it."""
    against: "Evaluation | None" = None
    """The model that `vitcut.evaluate` was asked to compare with."""
    difference: AccuracyDifference | None = None
    """Coarse accuracy less that of `against`, with its interval."""
    fingerprint: str | None = None
    """Of the images, where `vitcut.evaluate` measured it."""

    def __repr__(self) -> str:
        facts = [f"{self.images} images, coarse accuracy {self.accuracy_coarse:.1%}"]
        if self.accuracy_fine is not None:
            facts.append(f"fine {self.accuracy_fine:.1%}")
        if self.kl is not None:
            facts.append(f"KL {self.kl:.4f}")
        if self.difference is not None:
            low, high = 100 * self.difference.low, 100 * self.difference.high
            facts.append(
                f"{100 * self.difference.difference:+.1f} points against "
                f"{self.difference.against!r} ({low:+.1f} to {high:+.1f})"
            )
        return f"Evaluation({'' if self.name is None else f'{self.name!r}, '}{', '.join(facts)})"


def evaluate(
    model: Callable[[Tensor], Tensor],
    images: ImageSet,
    task: Task,
    preprocessing: Preprocessing,
    *,
    reference: Evaluation | None = None,
) -> Evaluation:
    """Run a model on a set of images, batch by batch.

    Coarse accuracy takes the group with the largest summed probability, which need not be the
    group of the best fine class. A module is put into evaluation mode and then back.

    Args:
        model: Normalised images to fine logits; a module or any function.
        images: In the order of the reference.
        task: Its fine classes are the model's, and its labels the images'.
        preprocessing: The model's; images are normalised by its mean and std, and brought to the
            type and device of the module.
        reference: What the dense model answered on the same images.

    Raises:
        DataError: The set is empty.
        TaskError: The model has another number of classes than the task.
        ModelError: A logit is NaN or infinite.
        ConfigError: The reference is of another shape.
    """
    if not len(images):
        raise DataError("there are no images to evaluate on: expected at least one")
    group_of_class = task.group_of_class
    like = (
        next(model.parameters(), torch.empty(0)) if isinstance(model, nn.Module) else torch.empty(0)
    )
    batch = max(1, min(_MOST_IN_BATCH, _PIXELS_IN_BATCH // preprocessing.image_size**2))
    starts = range(0, len(images), batch)
    with _evaluation_mode(model), torch.inference_mode():
        # Float64 on the CPU, [images classes]: KLs near zero would drown in float32 rounding.
        logits = torch.cat(
            [
                model(
                    normalise(
                        images.read(np.arange(start, min(start + batch, len(images)))),
                        preprocessing,
                        dtype=like.dtype,
                        device=like.device,
                    )
                )
                .detach()
                .to("cpu", torch.float64)
                for start in track(starts, "evaluating", len(starts), unit="batches")
            ]
        )
    if bad := int((~logits.isfinite()).any(dim=1).sum()):
        raise ModelError(
            f"the model gave NaN or infinite logits on {bad} of {len(images)} images: "
            "check its weights"
        )
    if logits.shape[1] != len(group_of_class):
        raise TaskError(
            f"the model has {logits.shape[1]} classes, the task {len(group_of_class)}: "
            "use the task that the model was trained on"
        )
    groups = int(group_of_class.max()) + 1
    log_probs = coarse_log_probs(logits, torch.from_numpy(group_of_class), groups)
    kl = None
    if reference is not None:
        if reference.log_probs.shape != log_probs.shape:
            raise ConfigError(
                f"the reference must have shape {list(log_probs.shape)} (images, groups), got "
                f"{list(reference.log_probs.shape)}: evaluate the dense model on the same images"
            )
        kl = kl_divergence(reference.log_probs.double(), log_probs).mean().item()
    true_groups = task.group_of_label[images.labels]
    predicted_groups = log_probs.argmax(dim=1).numpy()
    confusion = np.zeros((groups, groups), dtype=np.int64)
    np.add.at(confusion, (true_groups, predicted_groups), 1)
    correct_fine = None
    if not task.folders:
        correct_fine = logits.argmax(dim=1).numpy() == images.labels
    correct_coarse = predicted_groups == true_groups
    return Evaluation(
        images=len(images),
        accuracy_fine=None if correct_fine is None else float(correct_fine.mean()),
        accuracy_coarse=float(correct_coarse.mean()),
        kl=kl,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        correct_fine=correct_fine,
        correct_coarse=correct_coarse,
        log_probs=log_probs,
        groups=task.groups,
    )


def compare(
    name: str, found: Evaluation, against: str, other: Evaluation, *, seed: int = 0
) -> AccuracyDifference:
    """How much more accurate one model is than another, image by image.

    Args:
        name: What the first model is called.
        found: Its answers.
        against: What the other model is called.
        other: Its answers on the same images.
        seed: Seed of the bootstrap.
    """
    own, theirs = found.correct_coarse, other.correct_coarse
    low, high = paired_interval(own, theirs, seed=seed)
    return AccuracyDifference(
        point=name,
        against=against,
        images=len(own),
        difference=float(own.mean() - theirs.mean()),
        low=low,
        high=high,
    )


def warn_if_no_better(
    model: Callable[[Tensor], Tensor], images: ImageSet, task: Task, preprocessing: Preprocessing
) -> None:
    """Say so if a model does not beat answering the largest group for every val image.

    Args:
        model: As for `evaluate`.
        images: The val split; at most 300 of its images are used, drawn at random.
        task: As for `evaluate`.
        preprocessing: As for `evaluate`.
    """
    drawn = np.random.default_rng(0).permutation(len(images))[:_MOST_FOR_WARNING]
    some = images.take(np.sort(drawn))
    say_if_no_better(evaluate(model, some, task, preprocessing), some, task, split="val")


def say_if_no_better(found: Evaluation, images: ImageSet, task: Task, *, split: str) -> None:
    """Say so if an evaluation is not shown to beat answering the largest group for every image.

    That is what a model looks like whose classes are in another order.

    Args:
        found: What the model answered.
        images: To these images.
        task: Of the images.
        split: What they are called.
    """
    groups = task.group_of_label[images.labels]
    largest = int(np.bincount(groups).argmax())
    constant = groups == largest
    low, high = paired_interval(found.correct_coarse, constant, seed=0)
    if low <= 0:
        share = float(constant.mean())
        say(
            f"warning: the model answers {found.accuracy_coarse:.1%} of {len(images)} {split} "
            f"images right, always answering {task.groups[largest]!r} {share:.1%} (difference "
            f"{100 * (found.accuracy_coarse - share):+.1f} points, 95 % interval "
            f"{100 * low:+.1f} to {100 * high:+.1f}): it is not shown to know this task; check "
            "the order of its classes (--labels), the task, and how its images are prepared"
        )


@contextmanager
def _evaluation_mode(model: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Switch a module to evaluation, then give each of its submodules its own mode back."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
