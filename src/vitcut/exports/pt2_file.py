"""Target pt2: a program of torch.export, which torch runs without vitcut."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch.export import Dim

from vitcut.exports.settings import ExportSettings
from vitcut.exports.target import Subject, Written
from vitcut.runtimes.session import in_batches
from vitcut.shapes import Tensor

FILE = "model.pt2"
_USE = f"""import torch

model = torch.export.load("{FILE}").module()
with torch.inference_mode():
    logits = model(torch.from_numpy(images)).numpy()"""


def write(subject: Subject, folder: Path, settings: ExportSettings) -> Written:
    """Write ``model.pt2``, whose extra file ``vitcut.json`` says what a user must know."""
    path, batch = folder / FILE, None if settings.batch == "dynamic" else settings.batch
    program = torch.export.export(
        subject.module,
        # torch.export takes a size of 0 or 1 for a constant: trace with two images.
        (subject.examples[:1].repeat(batch or 2, 1, 1, 1),),
        dynamic_shapes=({0: Dim("batch")},) if batch is None else None,
    )
    torch.export.save(program, path, extra_files={"vitcut.json": subject.info.note()})
    run = load(path)
    return Written(
        file=path,
        run=run if batch is None else in_batches(run, batch),
        tools={"torch": version("torch")},
        needs=("torch",),
        use=_USE,
    )


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs the file: normalised images to logits."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run
