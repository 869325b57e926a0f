"""Accuracy on the val split after each epoch; reporting on test is left to `benchmark`."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from vitcut.images.images import TaskImages
from vitcut.metrics import coarse_log_probs
from vitcut.training.augment import normalize
from vitcut.training.settings import TrainSettings

_BATCH_SIZE = 256


class ValSet:
    """The val images, each process holding its share."""

    def __init__(self, images: TaskImages, config: TrainSettings, accelerator: Accelerator) -> None:
        self._images = images.val
        self._config = config
        self._accelerator = accelerator
        self._num_groups = len(images.task.groups)
        self._group_of_class = torch.from_numpy(images.task.group_of_class).to(accelerator.device)

    def accuracies(self, model: nn.Module) -> tuple[float, float]:
        """Fine and coarse accuracy as fractions of 1; the model is left in eval mode."""
        model.eval()
        share = np.arange(len(self._images))[self._accelerator.process_index :: self._count]
        correct = torch.zeros(2, dtype=torch.int64, device=self._accelerator.device)
        for start in range(0, len(share), _BATCH_SIZE):
            correct += self._correct(model, share[start : start + _BATCH_SIZE])
        total: Any = self._accelerator.reduce(correct, reduction="sum")
        fine, coarse = (total.double() / len(self._images)).tolist()
        return fine, coarse

    @property
    def _count(self) -> int:
        return self._accelerator.num_processes

    @torch.no_grad()
    def _correct(self, model: nn.Module, rows: np.ndarray) -> torch.Tensor:
        device = self._accelerator.device
        pixels = torch.from_numpy(self._images.read(rows)).to(device)
        labels = torch.from_numpy(self._images.labels[rows]).to(device)
        logits = model(normalize(pixels, self._config.mean, self._config.std))
        coarse = coarse_log_probs(logits, self._group_of_class, self._num_groups)
        fine_hits = logits.argmax(1) == labels
        coarse_hits = coarse.argmax(1) == self._group_of_class[labels]
        return torch.stack([fine_hits.sum(), coarse_hits.sum()])
