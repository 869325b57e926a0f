"""A model that takes a picture of any size as bytes, and gives the probabilities of its groups."""

import math

import torch
from torch import nn

from vitcut.compact.info import ModelInfo, preprocessing_of
from vitcut.preprocessing import Preprocessing
from vitcut.shapes import Float, Tensor, UInt8

_REACH = {
    "nearest": 0.0,
    "box": 0.5,
    "bilinear": 1.0,
    "hamming": 1.0,
    "bicubic": 2.0,
    "lanczos": 3.0,
}
"""How far from its centre Pillow's filters are not zero, in pixels of the larger scale."""
_GREY = (19595.0, 38470.0, 7471.0)
"""Pillow's shares of red, green and blue in grey, of 65,536."""


class PictureModel(nn.Module):
    """A model with its preprocessing before it, and the sum over groups behind.

    Pictures are scaled as `vitcut.images.decoding.decode` scales them, up to rounding. Pillow's
    resampling is linear in each direction, so it is two products with matrices whose entries follow
    from the picture's height and width: rows first to ``image_size`` columns, then columns.

    Source:
        Pillow's Resample.c. Pillow rounds to bytes after each direction, and so does this. Its
        coefficients have 22 bits, here those of float32. Newer versions of it scale the columns of
        tall pictures first, which can change a byte by a few units.
    """

    scale: Tensor
    shift: Tensor
    groups: Tensor | None
    """Which class belongs to which group, shape [classes, groups]; None if each is its own."""

    def __init__(
        self, model: nn.Module, info: ModelInfo, *, places: torch.dtype = torch.float64
    ) -> None:
        """Put the parts together.

        Args:
            model: Normalised images to logits.
            info: Preprocessing and groups; without groups, each class is one.
            places: What the places of pixels are computed in.

        Raises:
            ConfigError: It does not say how images are prepared.
        """
        super().__init__()
        self.model, self.preprocessing, self.places = model, preprocessing_of(info), places
        taken = self.preprocessing
        scale = 255 * torch.tensor(taken.std, dtype=torch.float64)
        shift = torch.tensor(taken.mean, dtype=torch.float64) * 255
        self.register_buffer("scale", scale.view(-1, 1, 1).float())
        self.register_buffer("shift", shift.view(-1, 1, 1).float())
        groups = None
        if info.group_of_class:
            groups = nn.functional.one_hot(torch.tensor(info.group_of_class)).float()
        self.register_buffer("groups", groups)

    def forward(
        self, pictures: UInt8[Tensor, "one height width three"]
    ) -> Float[Tensor, "one groups"]:
        """Probabilities of a picture's groups."""
        images = (self.scaled(pictures) - self.shift) / self.scale
        probabilities = self.model(images).softmax(-1)
        return probabilities if self.groups is None else probabilities @ self.groups

    def scaled(
        self, pictures: UInt8[Tensor, "one height width three"]
    ) -> Float[Tensor, "one channels y x"]:
        """The pixels that the model sees, from 0 to 255."""
        pixels = pictures.permute(0, 3, 1, 2).float()
        if self.preprocessing.framing.channels == 1:
            share = torch.tensor(_GREY).view(3, 1, 1)
            pixels = (((pixels * share).sum(1, keepdim=True) + 32768) / 65536).floor()
        # Each length as a tensor, which an exported graph computes with: the last index plus one.
        height, width = (
            torch.arange(length, dtype=self.places)[-1:] + 1 for length in pictures.shape[1:3]
        )
        if self.preprocessing.framing.fit == "crop":
            shorter = torch.minimum(height, width)
            shown = shorter, shorter
        else:
            shown = height, width
        columns = resampling(pictures.shape[2], width, shown[1], self.preprocessing)
        rows = resampling(pictures.shape[1], height, shown[0], self.preprocessing)
        return _byte(rows @ _byte(pixels @ columns.T))


def _byte(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)


def resampling(
    number: int, length: Tensor, side: Tensor, preprocessing: Preprocessing
) -> Float[Tensor, "size number"]:
    """The matrix that crops and scales one direction of a picture as Pillow does.

    Args:
        number: Pixels of the picture in this direction.
        length: The same as a tensor of shape [1]; all is computed in its type.
        side: Of the part of the picture that the model's whole images stand for, of which
            ``crop_fraction`` is shown.
        preprocessing: Image size, crop and filter.
    """
    size, kind = preprocessing.image_size, preprocessing.framing.interpolation
    extent = side * preprocessing.framing.shown_fraction(size)
    step = extent / size
    centres = (length - extent) / 2 + (torch.arange(size, dtype=length.dtype) + 0.5) * step
    places = torch.arange(number, dtype=length.dtype)
    if kind == "nearest":
        return (places == centres.floor()[:, None]).float()
    # Pictures that shrink are smoothed: the filter is as wide as an output pixel.
    wide = step.clamp(min=1.0)
    first = (centres - _REACH[kind] * wide + 0.5).floor()
    last = (centres + _REACH[kind] * wide + 0.5).floor()
    weights = _filter(kind, (places - centres[:, None] + 0.5) / wide)
    inside = (places >= first[:, None]) & (places < last[:, None])
    weights = torch.where(inside, weights, torch.zeros_like(weights))
    return (weights / weights.sum(1, keepdim=True)).float()


def _filter(kind: str, x: Tensor) -> Tensor:
    """Pillow's filters at distances from their centre."""
    far, nothing = x.abs(), torch.zeros_like(x)
    match kind:
        case "box":
            return torch.where((x > -0.5) & (x <= 0.5), torch.ones_like(x), nothing)
        case "bilinear":
            return (1 - far).clamp(min=0)
        case "bicubic":
            outer = torch.where(far < 2, (((far - 5) * far + 8) * far - 4) * -0.5, nothing)
            return torch.where(far < 1, (1.5 * far - 2.5) * far * far + 1, outer)
        case "hamming":
            window = _sinc(far) * (0.54 + 0.46 * torch.cos(math.pi * far))
            return torch.where(far < 1, window, nothing)
        case _:
            return torch.where(far < 3, _sinc(far) * _sinc(far / 3), nothing)


def _sinc(x: Tensor) -> Tensor:
    turned = torch.where(x == 0, torch.ones_like(x), math.pi * x)
    return torch.where(x == 0, torch.ones_like(x), torch.sin(turned) / turned)
