"""Training batches: data order, augmentation and soft targets.

Everything random depends on the seed, the epoch and the step alone, so a resumed training needs no
generator state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset

from vitcut.errors import ConfigError
from vitcut.images.load import ImageSet
from vitcut.runtime import seed_everything
from vitcut.shapes import Bool, Float, Int, Tensor, UInt8
from vitcut.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The input of one training step."""

    inputs: Float[Tensor, "images channels y x"]
    """Normalised images."""
    targets: Float[Tensor, "images classes"]
    """Probabilities of the fine classes, or of the groups if images are labelled with these; each
    row sums to one."""


class TrainingBatches:
    """The batches of every epoch.

    Args:
        images: The training images.
        settings: The recipe.
        mean: Subtracted per channel, on the scale 0 to 1.
        std: Divided by per channel, on the scale 0 to 1.
        num_classes: Width of the targets.
        device: Where batches go.
        rank: Which process this is; it makes its part of every batch.
        num_processes: How many processes share a batch.

    Raises:
        ConfigError: The images do not fill one batch, or a batch cannot be shared evenly.
    """

    def __init__(
        self,
        images: ImageSet,
        settings: TrainSettings,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
        device: torch.device,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if len(images) < settings.batch_size:
            raise ConfigError(
                f"batch_size must be at most the {len(images)} training images, "
                f"got {settings.batch_size}: give a smaller batch size"
            )
        if settings.batch_size % num_processes:
            raise ConfigError(
                f"batch_size must be a multiple of the {num_processes} processes, "
                f"got {settings.batch_size}"
            )
        self.steps = len(images) // settings.batch_size
        """Batches per epoch."""
        self._images, self._mean, self._std = images, mean, std
        self._settings, self._num_classes, self._device = settings, num_classes, device
        self._rank, self._num_processes = rank, num_processes
        self._labels = torch.from_numpy(images.labels).to(device)
        # A GPU would wait for the disk, so it holds the bytes of all images in its memory.
        self._bytes = torch.from_numpy(images.all()).to(device) if device.type == "cuda" else None

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch; torch, numpy and Python are seeded anew before each."""
        settings, size = self._settings, self._settings.batch_size
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self._images))
        batches = [order[step * size : (step + 1) * size] for step in range(self.steps)]
        # Every process draws the same order and takes its own rows: [batch_size / num_processes].
        batches = [rows[self._rank :: self._num_processes] for rows in batches]
        if settings.augmentation == "reference":
            yield from self._reference(epoch, batches)
            return
        for step, rows in enumerate(batches):
            self._seed(epoch, step)
            positions = torch.from_numpy(rows).to(self._device)
            if self._bytes is None:
                images = torch.from_numpy(self._images.read(rows))
            else:
                images = self._bytes[positions]
            targets = soft_targets(
                self._labels[positions], self._num_classes, settings.label_smoothing
            )
            if settings.augmentation == "light":
                count, most = len(rows), settings.shift_px(min(images.shape[1:3]))
                # Drawn on the CPU, so that a seed means the same on every device.
                images = shift_and_flip(
                    images,
                    down=torch.randint(-most, most + 1, (count,)).to(self._device),
                    right=torch.randint(-most, most + 1, (count,)).to(self._device),
                    flipped=(torch.rand(count) < 0.5).to(self._device),
                )
                if torch.rand(()).item() < settings.cutmix_fraction:
                    box = draw_cutmix_box(images.shape[1], images.shape[2])
                    images, targets = cutmix(images, targets, box=box)
            yield Batch(inputs=normalize(images, self._mean, self._std), targets=targets)

    def _reference(self, epoch: int, batches: list[NDArray[np.int64]]) -> Iterator[Batch]:
        transform = create_transform(
            (3, *self._images.array.shape[1:3]),
            is_training=True,
            scale=(0.6, 1.0),
            interpolation="bicubic",
            color_jitter=0.0,
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            mean=self._mean,
            std=self._std,
        )
        loader = DataLoader(
            _ReferenceImages(self._images, transform, self._settings.seed, epoch),
            batch_sampler=[rows.tolist() for rows in batches],
            num_workers=self._settings.workers,
        )
        mix = Mixup(
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            label_smoothing=self._settings.label_smoothing,
            num_classes=self._num_classes,
        )
        for step, (rows, inputs) in enumerate(zip(batches, loader, strict=True)):
            self._seed(epoch, step)
            mixed, targets = mix(inputs.to(self._device), self._labels[torch.from_numpy(rows)])
            yield Batch(inputs=mixed, targets=targets)

    def _seed(self, epoch: int, step: int) -> None:
        seed_everything(_mixed_seed(self._settings.seed, epoch, step, self._rank))


class _ReferenceImages(Dataset[Tensor]):
    """Images through timm's training transforms."""

    def __init__(self, images: ImageSet, transform: Any, seed: int, epoch: int) -> None:
        self._images, self._transform = images, transform
        self._seed, self._epoch = seed, epoch

    def __getitem__(self, row: int) -> Tensor:
        # One seed per image: the result does not depend on how many workers share the images.
        seed_everything(_mixed_seed(self._seed, self._epoch, row))
        return self._transform(Image.fromarray(self._images.read([row])[0]))


def _mixed_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def shift_and_flip(
    images: UInt8[Tensor, "images height width channels"],
    *,
    down: Int[Tensor, "images"],
    right: Int[Tensor, "images"],
    flipped: Bool[Tensor, "images"],
) -> UInt8[Tensor, "images height width channels"]:
    """Move each image, fill the gap with its mirror image, then mirror the chosen ones left-right.

    Args:
        images: Bytes.
        down: Pixels to move each image down; below the height in size.
        right: Pixels to move each image to the right; below the width in size.
        flipped: Which images are mirrored.
    """
    height, width = images.shape[1:3]
    # Where each output pixel comes from: rows [images, height], columns [images, width].
    rows = _mirrored(torch.arange(height, device=images.device) - down[:, None], height)
    columns = _mirrored(torch.arange(width, device=images.device) - right[:, None], width)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    number = torch.arange(len(images), device=images.device)[:, None, None]
    return images[number, rows[:, :, None], columns[:, None, :]]


def _mirrored(index: Int[Tensor, "images size"], size: int) -> Int[Tensor, "images size"]:
    """Reflect positions outside 0 to size - 1 back inside; the border pixel is not repeated."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)


def cutmix(
    images: UInt8[Tensor, "images height width channels"],
    targets: Float[Tensor, "images classes"],
    *,
    box: tuple[int, int, int, int],
) -> tuple[
    UInt8[Tensor, "images height width channels"],
    Float[Tensor, "images classes"],
]:
    """Paste a box of each image's predecessor into it, and mix the targets by the pasted area.

    Args:
        images: Bytes, in random order, so that the predecessor is a random image.
        targets: Class probabilities.
        box: Top, bottom, left, right in pixels; bottom and right excluded.

    Source:
        CutMix, arXiv:1905.04899. The fraction is that of the pixels actually pasted.
    """
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, top:bottom, left:right] = images.roll(1, 0)[:, top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (images.shape[1] * images.shape[2])
    return mixed, torch.lerp(targets, targets.roll(1, 0), pasted)


def draw_cutmix_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a box of uniform area around a uniform centre, clipped to the image."""
    area, centre_y, centre_x = torch.rand(3).tolist()
    half_height, half_width = area**0.5 * height / 2, area**0.5 * width / 2
    y, x = centre_y * height, centre_x * width
    return (
        max(round(y - half_height), 0),
        min(round(y + half_height), height),
        max(round(x - half_width), 0),
        min(round(x + half_width), width),
    )


def soft_targets(
    labels: Int[Tensor, "images"], num_classes: int, smoothing: float
) -> Float[Tensor, "images classes"]:
    """One-hot targets, with the fraction ``smoothing`` spread evenly over all classes."""
    hot = F.one_hot(labels, num_classes).float()
    return hot * (1 - smoothing) + smoothing / num_classes


def normalize(
    images: UInt8[Tensor, "images height width channels"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Tensor, "images channels y x"]:
    """Bring bytes to a model's input range, on their device: (pixel / 255 - mean) / std."""
    shift = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, device=images.device).view(-1, 1, 1)
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255).sub_(shift).div_(scale)
