"""The README.md of a model directory: what the model is for, and how it is used."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from vitcut.compact.info import ModelInfo
from vitcut.errors import plain_markdown
from vitcut.preprocessing import Preprocessing

_LISTED = 20
"""Of more groups, or more classes of a group, the others are in labels.txt."""
_NON_COMMERCIAL = "other"
"""The licence of the Hub's list for one that is not in it; it has a name beside it."""
_UNKNOWN = "licence unknown"
IMAGENET_TERMS = "ImageNet's terms, which allow non-commercial research"
_PLACE = re.compile(r'(?<=^for found in vitcut\.predict\()"\."', re.MULTILINE)
"""Where the lines that classify a picture name the model."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from, as far as is known; names without paths."""

    model: str | None = None
    """What it was made from."""
    license: str | None = None
    """That of the model's weights: a licence of the Hub's list, or `IMAGENET_TERMS`."""
    base_model: str | None = None
    """The model's id on the Hub."""
    pictures: str | None = None
    """What it was fitted to and measured on."""
    pictures_license: str | None = None
    dataset: str | None = None
    """The id of the pictures on the Hub."""


def model_card(
    info: ModelInfo,
    *,
    title: str = "A cut Vision Transformer",
    verdict: str = "",
    made: str = "Cut by vitcut.",
    measured: str = "",
    origin: Origin | None = None,
) -> str:
    """The text of a model card. What comes from outside is escaped, except in given Markdown.

    Args:
        info: Preprocessing, classes and groups.
        title: Markdown, of one line.
        verdict: Markdown: how small, how fast and how good the model is.
        made: Markdown: how it was made.
        measured: Markdown, with tables.
        origin: The model and the pictures that it was made from; by default what ``info`` says.
    """
    origin = origin or Origin(model=info.source_model)
    groups = ", ".join(map(plain_markdown, info.group_names[:_LISTED]))
    groups += ", ..." if len(info.group_names) > _LISTED else ""
    purpose = "It classifies pictures."
    if groups:
        like = "those that it was fitted to"
        like = like if origin.pictures is None else f"those of {plain_markdown(origin.pictures)}"
        purpose = (
            f"It tells {len(info.group_names)} groups apart: {groups}. It is meant for pictures "
            f"like {like}; a picture of anything else gets one of these groups too."
        )
    sections = {
        "Use": _use(info),
        "Classes and groups": "\n".join(_classes(info)),
        "Pictures": (
            f"{prepared(info.preprocessing)} `vitcut.predict` does all of this."
            if info.preprocessing
            else ""
        ),
        "How it was made": made,
        "Measured": measured or "Nothing was measured of this copy.",
        "Files": _FILES,
        "Origin and terms": _terms(origin),
    }
    told = [_front_matter(origin), f"# {title}", verdict, purpose]
    told += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(part.strip() for part in told if part) + "\n"


def naming(card: str, hub_id: str) -> str:
    """The same card, with the lines that classify a picture for a model on the Hub."""
    return _PLACE.sub(f'"{hub_id}"', card)


def _front_matter(origin: Origin) -> str:
    """What the Hub reads."""
    told: dict[str, object] = {
        "library_name": "vitcut",
        "pipeline_tag": "image-classification",
        "license": origin.license or "unknown",
    }
    if IMAGENET_TERMS in {origin.license, origin.license or origin.pictures_license}:
        told |= {"license": _NON_COMMERCIAL, "license_name": "imagenet-non-commercial-research"}
    if origin.base_model is not None:
        told["base_model"] = origin.base_model
    if origin.dataset is not None:
        told["datasets"] = [origin.dataset]
    told["tags"] = ["vision-transformer", "circuit", "pruning"]
    return f"---\n{yaml.safe_dump(told, sort_keys=False, allow_unicode=True)}---"


def _use(info: ModelInfo) -> str:
    num_classes = len(info.class_names) or "all"
    return f"""`pip install vitcut` brings what this needs. In the directory of this file:

```python
import vitcut

for found in vitcut.predict(".", ["picture.jpg"]):
    print(found.group, f"{{found.probability:.1%}}")
```

On the command line: `vitcut predict . picture.jpg`. As a module of torch,
`vitcut.CompactViT.from_pretrained(".")` computes the logits of
{num_classes} classes from normalised images."""


def _classes(info: ModelInfo) -> Iterator[str]:
    if not info.class_names:
        yield "The model does not name its classes."
        return
    yield "`labels.txt` names the classes, one a line, in the order of the logits. The probability"
    yield "of a group is the sum of the softmax over its classes.\n"
    sizes = Counter(info.group_of_class)
    for group, name in list(enumerate(info.group_names))[:_LISTED]:
        own = [
            text
            for text, of in zip(info.class_names, info.group_of_class, strict=True)
            if of == group
        ]
        listed = "; ".join(map(plain_markdown, own[:_LISTED]))
        more = f"; and {len(own) - _LISTED} more" if len(own) > _LISTED else ""
        alone = own == [name]
        yield f"- {plain_markdown(name)}" + ("" if alone else f" ({sizes[group]}): {listed}{more}")
    if len(info.group_names) > _LISTED:
        yield f"- and {len(info.group_names) - _LISTED} more"


def prepared(taken: Preprocessing) -> str:
    """How a picture becomes what the model takes, in words."""
    side, framing = taken.image_size, taken.framing
    colours = "grey" if framing.channels == 1 else "RGB"
    scaled = int(side / framing.crop_fraction + 1e-6)
    if framing.fit == "squash":
        fitted = f"Both sides are scaled to {scaled} pixels ({framing.interpolation})"
    else:
        fitted = f"The shorter side is scaled to {scaled} pixels ({framing.interpolation})"
    whole = framing.fit == "squash" and scaled == side
    kept = "" if whole else f", and the central {side} x {side} pixels are kept"
    turned = "turned as its EXIF entry says"
    turned = turned if framing.orientation == "apply" else "taken as it is stored, not turned"
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (taken.mean, taken.std))
    return f"""A picture is {turned}, and converted to {colours}. {fitted}{kept}. Values from 0 to 1
are normalised: less {mean}, divided by {std}."""


_FILES = """The model is `config.json` and `model.safetensors`; nothing else is read to run it.
`circuit.json` says what was kept of the dense model. `fill.safetensors`, where there is one, holds
the linear maps that were fitted for what was cut: they are in the weights already, and needed only
to build the masked model again. `cut.json` says how the cut was checked."""


def _terms(origin: Origin) -> str:
    model, pictures = (
        "unknown"
        if name is None
        else f"{plain_markdown(name)} ({plain_markdown(terms or _UNKNOWN)})"
        for name, terms in (
            (origin.model, origin.license),
            (origin.pictures, origin.pictures_license),
        )
    )
    return f"""- Made from: {model}
- Pictures: {pictures}

The weights inherit the terms of both. What is unknown here may be known elsewhere."""
