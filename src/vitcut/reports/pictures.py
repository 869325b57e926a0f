"""Test images that a report shows: what models answer on them, and where heads look."""

import base64
import binascii
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitcut import store
from vitcut.benchmark.evaluation import Evaluation
from vitcut.benchmark.points import Points, evaluate_points
from vitcut.errors import ConfigError
from vitcut.images.load import Images, normalise
from vitcut.images.stratified import choose_evenly
from vitcut.model import forward
from vitcut.model.model import Model
from vitcut.model.weights import ViTWeights
from vitcut.names import LETTERS
from vitcut.results import CLASS_ONLY, DENSE
from vitcut.runs import PICTURES_FILE
from vitcut.settings import require_fraction
from vitcut.shapes import Float, Tensor

SAMPLES = 6
"""Images of which the attention is kept."""
_CHANGED_PER_POINT, _MOST_CHANGED = 6, 48
_SIDE, _QUALITY = 96, 75
"""Of a thumbnail, in pixels, and of its WebP."""
_MOST_GRID = 16
"""Attention to more patches per side is averaged: pages stay small."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One test image."""

    image: str
    """WebP in base64."""
    group: int
    answers: tuple[int, ...]
    """The group that each model answers, in the order of `Pictures.points`."""
    probabilities: tuple[float, ...]
    """Of these answers."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where the readout looks in the dense model, by head, on the first pictures."""

    asks: str
    """Which queries: ``class token``, or ``patches`` for their mean."""
    layers: int
    heads: int
    grid: int
    """Cells per side."""
    peaks: tuple[float, ...]
    """The largest attention to a cell, by picture, layer and head."""
    values: str
    """By picture, layer, head and cell, as bytes in base64: 255 is the peak."""

    def __post_init__(self) -> None:
        cells = len(_unpack(self.values))
        if min(self.layers, self.heads, self.grid) < 1 or cells != len(self.peaks) * self.grid**2:
            raise ConfigError("the attention has another number of values than it says")
        if len(self.peaks) % (self.layers * self.heads):
            raise ConfigError("the attention has other peaks than heads")
        for peak in self.peaks:
            require_fraction("a peak of the attention", peak)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The content of ``pictures.json``: what a report shows of the test images."""

    groups: tuple[str, ...]
    points: tuple[str, ...]
    """The models, the dense one first."""
    changed: tuple[int, ...]
    """How many test images each model answers otherwise than the dense one."""
    gained: tuple[int, ...]
    """How many of these it gets right, where the dense model was wrong."""
    lost: tuple[int, ...]
    """The other way round."""
    pictures: tuple[Picture, ...]
    """Samples of every group, then images whose answer changed."""
    attention: Attention | None

    def __post_init__(self) -> None:
        counts = {len(self.points), len(self.changed), len(self.gained), len(self.lost)}
        for picture in self.pictures:
            _unpack(picture.image)
            counts |= {len(picture.answers), len(picture.probabilities)}
            if not all(
                0 <= group < len(self.groups) for group in (picture.group, *picture.answers)
            ):
                raise ConfigError("a picture is of a group that there is none of")
            for probability in picture.probabilities:
                require_fraction("the probability of an answer", probability)
        if len(counts) > 1:
            raise ConfigError("a picture has another number of answers than there are models")
        for total, gained, lost in zip(self.changed, self.gained, self.lost, strict=True):
            if min(gained, lost) < 0 or gained + lost > total:
                raise ConfigError("more answers are gained and lost than changed")

    @classmethod
    def of(cls, model: Model, images: Images, found: Mapping[str, Evaluation]) -> "Pictures":
        """Choose some test images, and keep what a report shows of them.

        Args:
            model: The dense model.
            images: The images of the task.
            found: What each model answered on their test split, by name; the dense one's first.
        """
        names = [name for name in found if name != CLASS_ONLY]
        log_probs = torch.stack([found[name].log_probs for name in names])
        sure, answers = (value.numpy() for value in log_probs.exp().max(dim=2))
        truth = images.task.group_of_label[images.test.labels]
        right, changed = answers == truth, answers != answers[names.index(DENSE)]
        samples = choose_evenly(truth, min(SAMPLES, len(truth)), seed=0)
        chosen = list(dict.fromkeys([*samples.tolist(), *_surest(changed, sure)]))
        arrays = images.test.read(chosen)
        pictures = [
            Picture(
                image=_thumbnail(array),
                group=int(truth[at]),
                answers=tuple(answers[:, at].tolist()),
                probabilities=tuple(np.round(sure[:, at], 4).tolist()),
            )
            for at, array in zip(chosen, arrays, strict=True)
        ]
        return cls(
            groups=images.task.groups,
            points=tuple(names),
            changed=tuple(changed.sum(axis=1).tolist()),
            gained=tuple((changed & right).sum(axis=1).tolist()),
            lost=tuple((changed & right[names.index(DENSE)]).sum(axis=1).tolist()),
            pictures=tuple(pictures),
            attention=_attention(model, arrays[: len(samples)]),
        )

    def save(self, path: Path) -> None:
        """Write ``pictures.json`` atomically."""
        store.save(path, self, version=1)

    @classmethod
    def load(cls, path: Path) -> "Pictures":
        """Read what `save` wrote.

        Raises:
            ArtefactError: The file is missing, damaged, or of a newer version.
        """
        return store.load(path, cls, kind="pictures", version=1)


def evaluate_and_keep(
    model: Model, images: Images, points: Points, run: Path
) -> dict[str, Evaluation]:
    """What the dense model and each point answer on the test images; some are kept for the report.

    Args:
        model: The dense model.
        images: The images of the task.
        points: The points, as for `measure`.
        run: The run directory, which gets ``pictures.json``.
    """
    found = evaluate_points(model, images, points)
    Pictures.of(model, images, found).save(run / PICTURES_FILE)
    return found


def _surest(changed: NDArray[np.bool_], sure: NDArray[np.float64]) -> list[int]:
    """Images whose answer changed, of each model in turn those of which both were surest."""
    order = np.argsort(-np.where(changed, sure * sure[0], 0.0), axis=1, kind="stable")
    turns = order[:, :_CHANGED_PER_POINT].T
    counts = changed.sum(axis=1)
    chosen = [
        int(at)
        for rank, turn in enumerate(turns)
        for at, count in zip(turn, counts, strict=True)
        if rank < count
    ]
    return list(dict.fromkeys(chosen))[:_MOST_CHANGED]


def _thumbnail(array: NDArray[np.uint8]) -> str:
    """An image, at most 96 pixels wide, as WebP; of more than three channels the first three."""
    picture = Image.fromarray(array[..., 0] if array.shape[2] < 3 else array[..., :3])
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "WEBP", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()


@torch.inference_mode()
def _attention(model: Model, arrays: NDArray[np.uint8]) -> Attention:
    weights = model.weights
    pixels = normalise(arrays, model.preprocessing, dtype=weights.dtype, device=weights.device)
    # One by one: all patterns of large images at once take hundreds of megabytes.
    maps = torch.cat([class_attention(weights, one[None]) for one in pixels])
    grid = math.isqrt(maps.shape[-1])
    maps = maps.float().cpu().unflatten(-1, (grid, grid))
    if grid > _MOST_GRID:
        # Averages of patches; the sum over a cell would depend on how many it covers.
        maps = torch.nn.functional.adaptive_avg_pool2d(maps.flatten(0, 1), _MOST_GRID)
        maps = maps.unflatten(0, (len(arrays), -1))
    maps = maps.unflatten(1, (len(weights.blocks), -1))
    peaks = maps.amax(dim=(-2, -1), keepdim=True)
    levels = (255 * maps / peaks.clamp_min(1e-12)).round().to(torch.uint8)
    return Attention(
        asks="class token" if weights.num_read else "patches",
        layers=maps.shape[1],
        heads=maps.shape[2],
        grid=maps.shape[-1],
        peaks=tuple(round(peak, 5) for peak in peaks.flatten().tolist()),
        values=base64.b64encode(levels.numpy().tobytes()).decode(),
    )


def class_attention(
    weights: ViTWeights, pixels: Float[Tensor, "images channels y x"]
) -> Float[Tensor, "images layers_heads patches"]:
    """How much the class token attends to each patch, in every head of the dense model.

    Without a token that the classifier reads, the mean over all patches that ask.
    """
    stream = forward.embed(weights, pixels)
    asking = slice(0, 1) if weights.num_read else slice(weights.num_prefix, None)
    found: list[Tensor] = []
    for block in weights.blocks:
        attn, normed = block.attn, forward.normalise(block.attn_norm, stream)[None]
        q, k, v = (forward.project(attn, letter, normed) for letter in LETTERS)
        pattern = forward.attend(q, k, attn.scale)
        found.append(pattern[:, :, asking, weights.num_prefix :].mean(2).transpose(0, 1))
        stream = stream + forward.write(attn, pattern @ v).sum(0) + attn.out_bias
        normed = forward.normalise(block.mlp_norm, stream)
        stream = stream + forward.run_mlp(block.mlp, normed) + block.mlp.out_bias
    return torch.cat(found, dim=1)


def _unpack(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("a picture is not in base64") from None
