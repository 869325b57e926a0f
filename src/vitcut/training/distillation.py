"""The loss of a repair: a model learns the dense model's answers, and the labels beside them.

Augmentation, optimiser and epochs are left to the loop.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.model.loading import weight_hash
from vitcut.shapes import Float, Int, Tensor
from vitcut.training.attention import fast_attention
from vitcut.training.batches import Batch
from vitcut.training.settings import FinetuneSettings


class Distillation:
    """KL divergence to a teacher plus cross-entropy, on the same augmented images.

    For teacher p and student q over the fine classes, P and Q over the groups, targets t::

        loss = coarse_weight * KL(P || Q) + fine_weight * KL(p || q) - label_weight * sum t log q

    each term the mean over the images of a batch, in nats.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, at temperature 1. Deviation: the first term is
        between the task distributions, which is what a circuit has to keep.
    """

    def __init__(
        self, teacher: nn.Module, group_of_class: Int[Tensor, "classes"], config: FinetuneSettings
    ) -> None:
        """Take a copy of the teacher, frozen and in eval mode.

        Args:
            teacher: Gives logits of the same fine classes as the student.
            group_of_class: The group number of each fine class.
            config: The weights of the terms; precision and compilation are the training's.
        """
        self._config = config
        self._group_of_class = group_of_class
        self._num_groups = int(group_of_class.max()) + 1
        self._teacher = deepcopy(teacher).eval().requires_grad_(requires_grad=False)
        self._hash = weight_hash(teacher)
        self._answer: Any = None

    @property
    def identity(self) -> str:
        """Names the terms with their weights, and the teacher by the hash of its weights."""
        config = self._config
        return (
            f"{config.coarse_weight!r} KL(coarse) + {config.fine_weight!r} KL(fine) + "
            f"{config.label_weight!r} soft cross-entropy, teacher {self._hash}"
        )

    def __call__(self, batch: Batch, logits: Float[Tensor, "images classes"]) -> Float[Tensor, ""]:
        """The weighted sum of the terms, in nats."""
        config = self._config
        loss = config.label_weight * F.cross_entropy(logits, batch.targets)
        if config.coarse_weight or config.fine_weight:
            taught = self._ask(batch.inputs)
            coarse = kl_divergence(self._coarse(taught), self._coarse(logits)).mean()
            fine = kl_divergence(taught.log_softmax(-1), logits.log_softmax(-1)).mean()
            loss = loss + config.coarse_weight * coarse + config.fine_weight * fine
        return loss

    def _coarse(self, logits: Tensor) -> Tensor:
        self._group_of_class = self._group_of_class.to(logits.device)
        return coarse_log_probs(logits, self._group_of_class, self._num_groups)

    @torch.no_grad()
    def _ask(self, inputs: Tensor) -> Tensor:
        """The teacher's logits in float32, computed in the training's precision."""
        if self._answer is None:
            self._teacher.to(inputs.device)
            compiled = self._config.compile
            self._answer = torch.compile(self._teacher) if compiled else self._teacher
        low = self._config.precision == "bfloat16"
        device = inputs.device.type
        with (
            fast_attention(self._config, inputs.device),
            torch.autocast(device, dtype=torch.bfloat16, enabled=low),
        ):
            return self._answer(inputs).float()
