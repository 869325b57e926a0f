"""Classify pictures with an exported model: ONNX Runtime, Pillow and the numpy that both need.

pip install onnxruntime pillow
python classify.py runs/export/onnx picture.jpg ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

folder, *pictures = map(Path, sys.argv[1:])
about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
if about.get("with_preprocessing"):
    sys.exit("the model takes whole pictures: the README beside it has the program for that")
taken, options = about["preprocessing"], onnxruntime.SessionOptions()
size, framing = taken["image_size"], taken["framing"]
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(folder / "model.onnx", options)
names = about["group_names"] or about["class_names"]
# The part of each side that is shown: a picture is first scaled to whole pixels, then cropped.
shown = size / int(size / framing["crop_fraction"] + 1e-6)

for path in pictures:
    picture = Image.open(path)
    if framing["orientation"] == "apply":
        picture = ImageOps.exif_transpose(picture)
    picture = picture.convert("RGB" if framing["channels"] == 3 else "L")
    sides = picture.size if framing["fit"] == "squash" else [min(picture.size)] * 2
    left, top = ((long - shown * side) / 2 for long, side in zip(picture.size, sides, strict=True))
    box = (left, top, picture.width - left, picture.height - top)
    filter_ = Image.Resampling[framing["interpolation"].upper()]
    pixels = np.asarray(picture.resize((size, size), filter_, box), dtype=np.float32)
    pixels = pixels.reshape(size, size, -1) / 255
    images = (pixels - np.float32(taken["mean"])) / np.float32(taken["std"])
    (logits,) = session.run(["logits"], {"images": images.transpose(2, 0, 1)[None]})
    odds = np.exp(logits[0] - logits[0].max())
    scores = np.bincount(about["group_of_class"] or range(len(odds)), odds / odds.sum())
    print(f"{path}  {names[scores.argmax()]}  {scores.max():.1%}")
