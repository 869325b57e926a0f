"""Repair: a cut model is fine-tuned with the dense model as teacher."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.images.load import Images
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.model.model import weight_hash
from vitcut.preprocessing import Preprocessing
from vitcut.shapes import Float, Tensor
from vitcut.task import Task
from vitcut.training.batches import Batch
from vitcut.training.checkpoint import TrainResult
from vitcut.training.loop import for_machine, train, training_precision
from vitcut.training.settings import FinetuneSettings


def repair(
    model: nn.Module,
    teacher: nn.Module,
    images: Images,
    settings: FinetuneSettings,
    out: Path,
    *,
    preprocessing: Preprocessing,
) -> TrainResult:
    """Train a model in place with the dense model as teacher.

    Args:
        model: Compact or dense; afterwards it has the weights of the best epoch.
        teacher: The dense model; not changed.
        images: Of the task of both.
        settings: The recipe and the weights of the loss.
        out: A folder for the training's files. Run again after a kill, the training continues.
        preprocessing: How images are normalised.

    Raises:
        ArtefactError: ``out`` holds another training, or is damaged.
        ConfigError: The recipe does not fit the images or the machine.
        ModelError: The model gives another number of classes, or the loss is no longer finite.
    """
    settings = for_machine(settings, out)
    loss = Distillation(teacher, images.task, settings)
    return train(model, images, settings, out, preprocessing=preprocessing, loss=loss)


class Distillation:
    """KL divergence to a teacher plus cross-entropy, on the same augmented images.

    For teacher p and student q over the fine classes, P and Q over the groups, targets t::

        loss = coarse_weight * KL(P || Q) + fine_weight * KL(p || q) - label_weight * sum t log q

    each term the mean over the images of a batch, in nats.

    Args:
        teacher: Gives logits of the same fine classes as the student; copied, frozen, in eval mode.
        task: Has the fine classes of both. If its images are labelled with groups, targets are over
            these, and the last term has Q in place of q.
        settings: The weights of the terms; precision and compilation are the training's.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, at temperature 1. Deviation: the first term is
        between the task distributions, which is what a circuit has to keep.
    """

    def __init__(
        self,
        teacher: nn.Module,
        task: Task,
        settings: FinetuneSettings,
    ) -> None:
        self._settings = settings
        self._group_of_class = torch.from_numpy(task.group_of_class)
        self._num_groups = len(task.groups)
        self._group_labels = bool(task.folders)
        # A copy: where a dense model is repaired, student and teacher start as the same module.
        self._teacher = deepcopy(teacher).eval().requires_grad_(requires_grad=False)
        self._hash = weight_hash(teacher)
        self._answer: Any = None

    @property
    def identity(self) -> str:
        """Names the terms with their weights, and the teacher by the hash of its weights."""
        settings = self._settings
        return (
            f"{settings.coarse_weight!r} KL(coarse) + {settings.fine_weight!r} KL(fine) + "
            f"{settings.label_weight!r} soft cross-entropy"
            f"{' of groups' if self._group_labels else ''}, teacher {self._hash}"
        )

    def __call__(self, batch: Batch, logits: Float[Tensor, "images classes"]) -> Float[Tensor, ""]:
        """The weighted sum of the terms, in nats."""
        settings = self._settings
        answers = self._coarse(logits) if self._group_labels else logits
        loss = settings.label_weight * F.cross_entropy(answers, batch.targets)
        if settings.coarse_weight or settings.fine_weight:
            taught = self._ask(batch.inputs)
            coarse = kl_divergence(self._coarse(taught), self._coarse(logits)).mean()
            fine = kl_divergence(taught.log_softmax(-1), logits.log_softmax(-1)).mean()
            loss = loss + settings.coarse_weight * coarse + settings.fine_weight * fine
        return loss

    def _coarse(self, logits: Tensor) -> Tensor:
        self._group_of_class = self._group_of_class.to(logits.device)
        return coarse_log_probs(logits, self._group_of_class, self._num_groups)

    @torch.no_grad()
    def _ask(self, inputs: Tensor) -> Tensor:
        """The teacher's logits in float32, computed in the training's precision."""
        if self._answer is None:
            # The training chooses the device, so the teacher follows its first batch.
            self._teacher.to(inputs.device)
            self._answer = torch.compile(self._teacher) if self._settings.compile else self._teacher
        with training_precision(self._settings, inputs.device):
            return self._answer(inputs).float()
