"""The pictures of each class of a source, in the order in which a person looks at them."""

import hashlib
import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vitcut.errors import DataError
from vitcut.images.decoding import decode
from vitcut.images.drawn import SOURCE_WORD, drawn_images
from vitcut.images.sources import open_source
from vitcut.labels import Labels
from vitcut.preprocessing import Framing
from vitcut.progress import Meter
from vitcut.wordnet import imagenet_names, with_wordnet_ids

if TYPE_CHECKING:
    from vitcut.model.model import Model

_DRAWN = 36
"""Pictures of each drawn class."""
_LOOKED_AT = 50
"""A model answers up to so many pictures of each class."""
_QUALITY = 80


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """What is known of a source's classes, and their pictures."""

    labels: Labels
    """The classes, by sorted id."""
    shown: tuple[tuple[int, ...], ...]
    """Positions of each class's pictures in the source, those to show first first."""
    read: Callable[[int], bytes]
    """The image file at a position."""
    taken_for: dict[int, str] = field(default_factory=dict[int, str])
    """What a model takes pictures for that it does not take for what most of their class are."""
    answers: tuple[str, ...] = ()
    """What a model answers to each class's pictures, most often first; empty without a model."""

    def thumbnail(self, position: int, side: int) -> bytes:
        """A picture as a JPEG file that fits into a square; none is enlarged.

        Raises:
            DataError: It cannot be read.
        """
        whole = decode(self.read(position), None, Framing(orientation="apply")).pixels
        image, written = Image.fromarray(whole), io.BytesIO()
        image.thumbnail((side, side))
        image.save(written, "JPEG", quality=_QUALITY)
        return written.getvalue()


@contextmanager
def open_gallery(
    source: str | None, *, image_column: str | None = None, label_column: str | None = None
) -> Generator[Gallery]:
    """List the pictures of each class, in an order that chance gives and that is always the same.

    Args:
        source: As `DataSettings` has it.
        image_column: The column of pictures in parquet files; None finds it.
        label_column: The column of classes in parquet files; None finds it.

    Raises:
        DataError: The source cannot be used.
    """
    if source == SOURCE_WORD:
        pixels, class_ids = drawn_images(images_per_class=_DRAWN, seed=0, image_size=96)
        names = {str(own): str(own) for own in class_ids}

        def read_drawn(position: int) -> bytes:
            written = io.BytesIO()
            Image.fromarray(pixels[position]).save(written, "PNG")
            return written.getvalue()

        yield _gallery(names, [(str(own), f"{at}") for at, own in enumerate(class_ids)], read_drawn)
        return
    columns = {"image_column": image_column, "label_column": label_column}
    with open_source(source, **columns) as opened:
        records = [(record.class_id, record.path) for record in opened.records]
        yield _gallery(opened.class_names, records, opened.read)


def _gallery(
    class_names: dict[str, str], records: list[tuple[str, str]], read: Callable[[int], bytes]
) -> Gallery:
    ids, known = tuple(sorted(class_names)), imagenet_names()
    names = tuple(
        known.get(own, own) if class_names[own] == own else class_names[own] for own in ids
    )
    shown: dict[str, list[int]] = {own: [] for own in ids}
    # Neighbours in a folder are often alike.
    for at in sorted(range(len(records)), key=lambda at: _scattered(records[at][1])):
        shown[records[at][0]].append(at)
    labels = with_wordnet_ids(Labels(owner="the data", ids=ids, names=names))
    return Gallery(labels=labels, shown=tuple(tuple(shown[own]) for own in ids), read=read)


def _scattered(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()


def odd_first(gallery: Gallery, model: "Model", *, first: int) -> Gallery:
    """Show the pictures first whose answers differ most from the average answer of their class.

    Measured by KL(answer || average), over the first fifty pictures of each class. Nothing needs
    to be known of how the model's classes are related to the data's.

    Args:
        gallery: Classes and pictures.
        model: Its classes need not be the data's.
        first: How many pictures a page shows at first. The second half of them are those that
            differ least: from odd ones alone nobody recognises a class.
    """
    import torch

    from vitcut.images.load import normalise

    taken = model.preprocessing
    count = model.weights.num_classes
    names = [name.split(",")[0] for name in model.labels.names] if model.labels else []
    names = names or [f"class {number}" for number in range(count)]
    parameter = next(model.module.parameters())
    shown, answers, taken_for = list[tuple[int, ...]](), list[str](), dict[int, str]()
    with Meter("Looking for odd pictures", len(gallery.shown), unit="classes") as meter:
        for own in gallery.shown:
            pixels: dict[int, np.ndarray] = {}
            for at in own[:_LOOKED_AT]:
                try:
                    picture = decode(gallery.read(at), taken.image_size, taken.framing)
                except DataError:
                    continue
                pixels[at] = picture.pixels
            meter.advance()
            if not pixels:
                shown.append(own)
                answers.append("")
                continue
            batch = normalise(
                np.stack([*pixels.values()]), taken, dtype=parameter.dtype, device=parameter.device
            )
            with torch.inference_mode():
                logits = model.module(batch).to("cpu", torch.float64)
            logs = logits.log_softmax(dim=1)
            average = logs.exp().mean(dim=0).clamp_min(torch.finfo(torch.float64).tiny).log()
            oddness = (logs.exp() * (logs - average)).sum(dim=1).tolist()
            best = logs.argmax(dim=1)
            times = torch.bincount(best, minlength=count)
            order = sorted(zip(oddness, pixels, strict=True), key=lambda pair: -pair[0])
            odd = [at for _, at in order]
            ranked = dict.fromkeys([*odd[: first // 2], *odd[::-1][: first - first // 2], *odd])
            shown.append((*ranked, *(at for at in own if at not in pixels)))
            usual = int(times.argmax())
            taken_for |= {
                at: names[answer]
                for at, answer in zip(pixels, best.tolist(), strict=True)
                if answer != usual
            }
            most = times.argsort(descending=True, stable=True)[:3].tolist()
            told = [f"{names[at]} {times[at] / len(pixels):.0%}" for at in most if times[at]]
            answers.append(", ".join(told))
    return replace(gallery, shown=tuple(shown), taken_for=taken_for, answers=tuple(answers))
