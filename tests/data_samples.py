"""Small data sets that tests write to disk."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitcut.task import Task, TaskClass

CAT, DOG, OWL = "n00000001", "n00000002", "n00000003"


def encoded(shade: int = 0, *, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    """A PNG whose pixels all have one shade; the corner pixel differs."""
    image = Image.new("L", size, shade).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def tiny_imagenet(*, train: int = 6, test: int = 2) -> dict[str, bytes]:
    """Files of a Tiny ImageNet with three classes; every image has its own shade."""
    files: dict[str, bytes] = {}
    rows: list[str] = []
    shade = 0
    for number, wnid in enumerate((CAT, DOG, OWL)):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
        for i in range(train):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = encoded(shade := shade + 1)
        for i in range(test):
            name = f"val_{3 * i + number}.JPEG"
            files[f"val/images/{name}"] = encoded(shade := shade + 1)
            rows.append(f"{name}\t{wnid}\t0\t0\t7\t7")
    files["val/val_annotations.txt"] = "\n".join(rows).encode()
    files["words.txt"] = f"{CAT}\tcat, house cat\n{DOG}\tdog\nn09999999\tother\n".encode()
    return files


def write_zip(path: Path, files: dict[str, bytes], *, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_parquet(path: Path, labels: list, *, names: list[str] | None = None) -> Path:
    """Rows of (image, label) as Hugging Face writes them, two rows to a row group."""
    images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


def task_of(**groups: list[str]) -> Task:
    classes = [
        TaskClass(id=name, name=name, group=group)
        for group, members in groups.items()
        for name in members
    ]
    return Task(
        name="sample",
        classes=tuple(sorted(classes, key=lambda item: item.id)),
        groups=tuple(groups),
    )


def shades(images: np.ndarray) -> list[int]:
    """The shade of each picture."""
    return [int(image[0, 0, 0]) for image in images]
