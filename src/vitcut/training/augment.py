"""Image variations on whole batches of bytes; what is varied how much is drawn by the caller.

Everything here is a pure function of tensors on any device. Batches are left to `batches`.
"""

import torch
import torch.nn.functional as F

from vitcut.shapes import Bool, Float, Int, Tensor, UInt8


def shift_and_flip(
    images: UInt8[Tensor, "images height width channels"],
    *,
    down: Int[Tensor, "images"],
    right: Int[Tensor, "images"],
    flipped: Bool[Tensor, "images"],
) -> UInt8[Tensor, "images height width channels"]:
    """Move each image, filling the gap with its mirror, then mirror the chosen ones left-right.

    Args:
        images: Bytes.
        down: Pixels to move each image down; below the height in size.
        right: Pixels to move each image to the right; below the width in size.
        flipped: Which images are mirrored.
    """
    height, width = images.shape[1:3]
    rows = _mirrored(torch.arange(height, device=images.device) - down[:, None], height)
    columns = _mirrored(torch.arange(width, device=images.device) - right[:, None], width)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    number = torch.arange(len(images), device=images.device)[:, None, None]
    return images[number, rows[:, :, None], columns[:, None, :]]


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
        CutMix, arXiv:1905.04899, with the fraction taken from the pixels really pasted.
    """
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, top:bottom, left:right] = images.roll(1, 0)[:, top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (images.shape[1] * images.shape[2])
    return mixed, torch.lerp(targets, targets.roll(1, 0), pasted)


def draw_cutmix_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a box of uniform area around a uniform centre, clipped; from torch's generator."""
    side, centre_y, centre_x = torch.rand(3).tolist()
    half_height, half_width = side**0.5 * height / 2, side**0.5 * width / 2
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
    """One-hot targets, a part of each spread evenly over all classes."""
    hot = F.one_hot(labels, num_classes).float()
    return hot * (1 - smoothing) + smoothing / num_classes


def normalize(
    images: UInt8[Tensor, "images height width channels"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Tensor, "images channels y x"]:
    """Bring bytes on a device to a model's range: (pixel / 255 - mean) / std."""
    shift = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, device=images.device).view(-1, 1, 1)
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255).sub_(shift).div_(scale)


def _mirrored(index: Int[Tensor, "images size"], size: int) -> Int[Tensor, "images size"]:
    """Bring positions outside 0 to size - 1 back by reflection, the border pixel not repeated."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)
