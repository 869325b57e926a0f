"""Training batches: a fixed order, varied images and soft targets for each epoch and step.

All that is random is a function of the seed, the epoch and the step alone, so a resumed training
needs no generator state. The variations themselves are left to `augment` and to timm.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset

from vitcut.errors import ConfigError
from vitcut.images.images import ImageSet
from vitcut.runtime import seed_everything
from vitcut.shapes import Float, Tensor
from vitcut.training.augment import (
    cutmix,
    draw_cutmix_box,
    normalize,
    shift_and_flip,
    soft_targets,
)
from vitcut.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step reads."""

    inputs: Float[Tensor, "images channels y x"]
    """Normalised images."""
    targets: Float[Tensor, "images classes"]
    """Fine class probabilities; each row sums to one."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of every batch that this process computes: one in `count`."""

    rank: int = 0
    count: int = 1


class TrainingBatches:
    """The batches of every epoch.

    Args:
        images: The training images.
        config: The recipe.
        num_classes: Width of the targets.
        device: Where batches go.
        share: Which part of each batch to make.

    Raises:
        ConfigError: The images do not fill one batch, or a batch cannot be shared evenly.
    """

    def __init__(
        self,
        images: ImageSet,
        config: TrainSettings,
        *,
        num_classes: int,
        device: torch.device,
        share: Share,
    ) -> None:
        if len(images) < config.batch_size:
            raise ConfigError(
                f"batch_size must be at most the {len(images)} training images, "
                f"got {config.batch_size}: give a smaller batch size"
            )
        if config.batch_size % share.count:
            raise ConfigError(
                f"batch_size must be a multiple of the {share.count} processes, "
                f"got {config.batch_size}"
            )
        self.steps = len(images) // config.batch_size
        """Batches per epoch."""
        self._images = images
        self._config = config
        self._num_classes = num_classes
        self._device = device
        self._share = share
        self._labels = torch.from_numpy(images.labels).to(device)
        # A GPU would wait for the disk: there the bytes of all images stay in its memory.
        self._bytes = torch.from_numpy(images.all()).to(device) if device.type == "cuda" else None

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; torch, numpy and Python are seeded anew before each."""
        if self._config.augmentation == "reference":
            yield from self._reference(epoch)
        else:
            yield from self._light(epoch)

    def _light(self, epoch: int) -> Iterator[Batch]:
        for step, rows in enumerate(self._rows(epoch)):
            self._seed(epoch, step)
            images, targets = self._read(rows), self._targets(rows)
            if self._config.augmentation == "light":
                images, targets = self._vary(images, targets)
            inputs = normalize(images, self._config.mean, self._config.std)
            yield Batch(inputs=inputs, targets=targets)

    def _reference(self, epoch: int) -> Iterator[Batch]:
        plan = list(self._rows(epoch))
        loader = DataLoader(
            _TransformedImages(self._images, self._config, epoch),
            batch_sampler=[rows.tolist() for rows in plan],
            num_workers=self._config.workers,
        )
        mix = Mixup(
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            label_smoothing=self._config.label_smoothing,
            num_classes=self._num_classes,
        )
        for step, (rows, inputs) in enumerate(zip(plan, loader, strict=True)):
            self._seed(epoch, step)
            mixed, targets = mix(inputs.to(self._device), self._labels[torch.from_numpy(rows)])
            yield Batch(inputs=mixed, targets=targets)

    def _rows(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng([self._config.seed, epoch]).permutation(len(self._images))
        size = self._config.batch_size
        for step in range(self.steps):
            batch = order[step * size : (step + 1) * size]
            yield batch[self._share.rank :: self._share.count]

    def _seed(self, epoch: int, step: int) -> None:
        seed_everything(_mixed_seed(self._config.seed, epoch, step, self._share.rank))

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        if self._bytes is not None:
            return self._bytes[torch.from_numpy(rows).to(self._device)]
        return torch.from_numpy(self._images.read(rows))

    def _targets(self, rows: NDArray[np.int64]) -> Tensor:
        labels = self._labels[torch.from_numpy(rows).to(self._device)]
        return soft_targets(labels, self._num_classes, self._config.label_smoothing)

    def _vary(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        count, most = len(images), self._config.max_shift_px
        images = shift_and_flip(
            images,
            down=torch.randint(-most, most + 1, (count,)).to(self._device),
            right=torch.randint(-most, most + 1, (count,)).to(self._device),
            flipped=(torch.rand(count) < 0.5).to(self._device),
        )
        if torch.rand(()).item() >= self._config.cutmix_fraction:
            return images, targets
        box = draw_cutmix_box(images.shape[1], images.shape[2])
        return cutmix(images, targets, box=box)


class _TransformedImages(Dataset[Tensor]):
    """Images through the reference's transforms, each seeded by itself: any worker will do."""

    def __init__(self, images: ImageSet, config: TrainSettings, epoch: int) -> None:
        self._images = images
        self._seed = config.seed
        self._epoch = epoch
        height, width = images.array.shape[1:3]
        self._transform: Any = create_transform(
            (3, height, width),
            is_training=True,
            scale=(0.6, 1.0),
            interpolation="bicubic",
            color_jitter=0.0,
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            mean=config.mean,
            std=config.std,
        )

    def __getitem__(self, row: int) -> Tensor:
        seed = _mixed_seed(self._seed, self._epoch, row)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the transforms draw from it
        torch.manual_seed(seed)
        return self._transform(Image.fromarray(self._images.read([row])[0]))


def _mixed_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
