"""The README of an exported folder: what the file is, how to use it, how it was checked."""

from typing import Any

from vitcut.compact.card import prepared
from vitcut.compact.info import ModelInfo
from vitcut.errors import plain_markdown
from vitcut.exports.target import Written
from vitcut.preprocessing import Preprocessing


def export_card(
    info: ModelInfo, taken: Preprocessing, written: Written, about: dict[str, Any]
) -> str:
    """The README of one target's folder.

    Args:
        info: Classes, groups and origin.
        taken: Its preprocessing.
        written: What the target made.
        about: The content of export.json.
    """
    use = written.use
    if "```" not in use:
        packages = " ".join(dict.fromkeys(["numpy", "pillow", *written.needs]))
        use = f"    pip install {packages}\n\n```python\n{_snippet(taken, use, about)}```\n"
    origin = (
        ""
        if info.source_model is None
        else f", made from the model {plain_markdown(info.source_model)}"
    )
    groups = ""
    if info.group_names:
        groups = (
            f" in {len(info.group_names)} groups: {plain_markdown(', '.join(info.group_names))}"
        )
    parity = about["parity"]
    tools = ", ".join(f"{name} {version}" for name, version in about["tools"].items())
    return f"""# An image classifier for {about["target"]}

`{about["file"]}` is a Vision Transformer{origin}, exported by
[vitcut](https://pypi.org/project/vitcut/). It knows {len(info.class_names)} classes{groups}.
[labels.txt](labels.txt) names the classes in the order of its logits, one per line;
[export.json](export.json) holds everything on this page for programs.

## Classify a picture

{use}
## What it takes

{prepared(taken)}
Images per call: {about["batch"]}. Precision: {about["precision"]}.

## How it was checked

On {parity["images"]} {about["parity_on"]}: the largest difference of
{parity["of"]}, is {parity["max_abs_diff"]:.2g}, and {parity["labels_equal"]} of {
        parity["images"]
    } answers are the same.
{_beside_float32(about.get("beside_float32"), about["precision"])}
Made with {tools}. `{about["file"]}` has the SHA-256
`{about["sha256"]}`.
"""


def _beside_float32(report: dict[str, Any] | None, precision: str) -> str:
    if report is None:
        return ""
    accuracy = report["accuracy"]
    lines = [
        f"\n| {report['val_images']} val images, one thread | float32 | {precision} |",
        "|---|---|---|",
        f"| accuracy | {accuracy['float32']:.1%} | {accuracy[precision]:.1%} |",
    ]
    for batch, each in report["latency_ms"].items():
        lines.append(f"| ms, batch {batch} | {each['float32']:.3g} | {each[precision]:.3g} |")
    if report["advice"]:
        lines.append(f"\n**{report['advice']}.**")
    return "\n".join(lines) + "\n"


def _snippet(taken: Preprocessing, use: str, about: dict[str, Any]) -> str:
    """A whole program that classifies one picture."""
    framing, size = taken.framing, taken.image_size
    turned = framing.orientation == "apply"
    mode = "L" if framing.channels == 1 else "RGB"
    sides = "picture.size" if framing.fit == "squash" else "[min(picture.size)] * 2"
    repeated = ""
    if about["batch"] not in {"dynamic", 1}:
        repeated = f"images = images.repeat({about['batch']}, 0)  # it takes so many at once\n"
    return f"""import json

import numpy as np
from PIL import Image{", ImageOps" if turned else ""}

picture = Image.open("picture.jpg")
picture = {"ImageOps.exif_transpose(picture)" if turned else "picture"}.convert("{mode}")
width, height = ({framing.shown_fraction(size)!r} * side for side in {sides})
left, top = (picture.width - width) / 2, (picture.height - height) / 2
box = (left, top, left + width, top + height)
picture = picture.resize(({size}, {size}), Image.Resampling.{framing.interpolation.upper()}, box)
pixels = np.asarray(picture, dtype=np.float32).reshape({size}, {size}, {framing.channels})
images = (pixels / 255 - np.float32({list(taken.mean)})) / np.float32({list(taken.std)})
images = np.ascontiguousarray(images.transpose(2, 0, 1)[None])
{repeated}
{use}

odds = np.exp(logits[0] - logits[0].max())
probabilities = odds / odds.sum()
about = json.load(open("export.json", encoding="utf-8"))
names = about["class_names"]
if about["group_of_class"]:
    probabilities = np.bincount(about["group_of_class"], probabilities)
    names = about["group_names"]
for at in probabilities.argsort()[::-1][:3]:
    print(f"{{probabilities[at]:.1%}} {{names[at]}}")
"""
