r"""Make docs/benchmarks/export again: two cuts and their dense models, through every target of export.

    OMP_NUM_THREADS=1 taskset -c 0 uv run python benchmarks/exports.py --animals tiny-imagenet-200.zip \
        --vit-tiny timm:vit_tiny_patch16_224 --cats-dogs cats-dogs-256.zip

Cuts, files and measurements that are there in ``--out`` are not made again; delete
``OUT/TASK/measured`` to measure anew. ``--animals-cut`` and ``--vit-tiny-cut`` take run directories of
cuts. LiteRT wants an older torch: run ``--targets litert`` in an environment of its own with the same
``--out``, and its rows join the page. ``--steps`` does only some of: export, measure, page.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from exports_page import PAGE, write_page
from PIL import Image

import vitcut
from vitcut import BenchSettings, Budget, ExportSettings
from vitcut.benchmark.bootstrap import bootstrap_interval
from vitcut.benchmark.latency import foreign_cores, read_cpu_times, time_sessions
from vitcut.benchmark.points import dense_point
from vitcut.compiler.cut import Cut
from vitcut.exports.target import EXTRA_OF
from vitcut.extras import missing_of
from vitcut.images.load import Images, normalise
from vitcut.inputs import load_either
from vitcut.model.model import Model
from vitcut.names import Precision, TargetName
from vitcut.progress import say
from vitcut.runtime import describe_machine
from vitcut.runtimes.session import Session
from vitcut.shapes import Tensor
from vitcut.store import write_json

STEPS = ("export", "measure", "page")
TARGET_MACS = {"animals": 0.15, "cats-dogs": 0.3}
BATCHES = (1, 64)
STARTS = 3
"""Fresh processes of each kind, after one that is not counted."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the tables: a target, and how its files are written."""

    target: TargetName
    opset: int = 20
    precision: Precision = "float32"
    fixed: bool = False
    """One file for each batch size, not one for all: where that is faster, or the only way."""
    timed: bool = True

    def folders(self) -> dict[int | Literal["dynamic"], str]:
        """Where the export of each batch size is."""
        return {n: f"batch-{n}" for n in BATCHES} if self.fixed else {"dynamic": "any"}


CASES = {
    "onnx": Case(target="onnx"),
    "onnx-23": Case(target="onnx", opset=23),
    "onnx-float16": Case(target="onnx", precision="float16", timed=False),
    "onnx-int8": Case(target="onnx", precision="int8", timed=False),
    "openvino": Case(target="openvino", fixed=True),
    "pt2": Case(target="pt2"),
    "executorch": Case(target="executorch", fixed=True),
    "litert": Case(target="litert", fixed=True),
    "transformers-js": Case(target="transformers-js", timed=False),
}


@dataclass(frozen=True, kw_only=True)
class Bed:
    """A dense model beside its cut."""

    task: str
    models: dict[str, Model | Cut]
    images: Images
    out: Path

    def folder(self, name: str, case: str, kind: str) -> Path:
        """Where one export is."""
        return self.out / "exports" / name / case / kind / CASES[case].target


def main() -> None:
    """Do the steps for every task whose images are given, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--animals", help="The Tiny ImageNet archive or folder.")
    parser.add_argument("--animals-cut", type=Path, help="The run directory of a cut.")
    parser.add_argument("--vit-tiny", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--cats-dogs", help="The archive of cats and dogs.")
    parser.add_argument("--vit-tiny-cut", type=Path, help="The run directory of a cut.")
    parser.add_argument("--out", type=Path, default=Path("runs/exports"), help="Run directories.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Of each model and batch size.")
    parser.add_argument("--targets", nargs="+", choices=list(EXTRA_OF), default=list(EXTRA_OF))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases = [name for name, case in CASES.items() if is_wanted(case.target, asked.targets)]
    for task, model, source, cut in (
        ("animals", "animals", asked.animals, asked.animals_cut),
        ("cats-dogs", asked.vit_tiny, asked.cats_dogs, asked.vit_tiny_cut),
    ):
        if source is not None and set(asked.steps) != {"page"}:
            bed = load_bed(task, model, source, cut, asked.out / task)
            if "export" in asked.steps:
                for case in cases:
                    # Reduced files are timed while they are written: that is a measurement.
                    if CASES[case].precision == "float32":
                        export_case(bed, case)
            if "measure" in asked.steps:
                for case in cases:
                    export_case(bed, case)
                    measure_case(bed, case, asked.seconds)
        collect(task, asked.out / task)
    if "page" in asked.steps:
        write_page()


def is_wanted(target: TargetName, asked: list[TargetName]) -> bool:
    """Whether a target is asked for, and its packages are here."""
    extra = EXTRA_OF[target]
    missing = [] if extra is None else missing_of(extra)
    if missing and target in asked:
        say(f"exports: {target} is left out, {missing[0]} is not installed")
    return target in asked and not missing


def load_bed(task: str, name: str, source: str, cut: Path | None, out: Path) -> Bed:
    """The dense model and its cut, which is made if none is given."""
    model = vitcut.load_model(name)
    images = vitcut.load_images(source, task=task, model=model)
    model = model.for_task(images.task, images.labels)
    if cut is None:
        cut, budget = out / "cut", Budget(target_macs=(TARGET_MACS[task],))
        vitcut.cut(model, images, budget=budget, bench=None, out=cut)
    compact = load_either(cut)
    if not isinstance(compact, Cut):
        raise SystemExit(f"{cut} holds no cut")
    return Bed(task=task, models={"dense": model, "compact": compact}, images=images, out=out)


def export_case(bed: Bed, case: str) -> None:
    """Write the files of both models that are not there."""
    for name, model in bed.models.items():
        for batch, kind in CASES[case].folders().items():
            folder = bed.folder(name, case, kind)
            if (folder / "export.json").exists():
                continue
            say(f"exports: {bed.task}, {name}, {case}, batch {batch}")
            row = CASES[case]
            settings = ExportSettings(
                to=(row.target,), opset=row.opset, precision=row.precision, batch=batch
            )
            vitcut.export(model, bed.images, settings=settings, out=folder.parent)


def measure_case(bed: Bed, case: str, seconds: float) -> None:
    """All numbers of one row, into ``measured/CASE.json``."""
    path = bed.out / "measured" / f"{case}.json"
    if path.exists():
        return
    row, before = CASES[case], describe_machine()
    macs = {name: macs_of(model) for name, model in bed.models.items()}
    content: dict[str, Any] = {
        "seconds": seconds,
        "machine": before,
        "macs": macs,
        "files": {},
        "latency": {},
    }
    for name in bed.models:
        kinds = [bed.folder(name, case, kind) for kind in row.folders().values()]
        found = [json.loads((folder / "export.json").read_text()) for folder in kinds]
        content["files"][name] = {
            "bytes": found[0]["bytes"],
            "opset": found[0].get("opset"),
            "batches": [about["batch"] for about in found],
            "parity": [about["parity"] for about in found],
            "tools": found[0]["tools"],
            "beside_float32": found[0].get("beside_float32"),
        }
    if row.timed:
        clock = read_cpu_times()
        for batch in BATCHES:
            content["latency"][str(batch)] = time_pair(bed, case, batch, seconds)
        content["foreign_cores"] = foreign_cores(clock, read_cpu_times())
        content["starts"] = start_pair(bed, case)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def macs_of(model: Model | Cut) -> int | None:
    """Multiply-accumulates of one image."""
    return (model.point() if isinstance(model, Cut) else dense_point(model)).macs


def time_pair(bed: Bed, case: str, batch: int, seconds: float) -> dict[str, Any]:
    """Dense and compact in turn."""
    row, val = CASES[case], bed.images.val
    taken = bed.models["dense"].preprocessing
    images = normalise(val.read(np.resize(np.arange(len(val)), batch)), taken).contiguous()
    sessions: dict[str, Session] = {}
    for name in bed.models:
        folder = bed.folder(name, case, f"batch-{batch}" if row.fixed else "any")
        sessions[name] = Session(
            runtime=row.target,
            batch=batch,
            threads=1,
            run=LOADERS[row.target](folder),
        )
    samples = time_sessions(sessions, images, BenchSettings(seconds=seconds))
    ratios = samples["dense"] / samples["compact"]
    low, high = bootstrap_interval(ratios, np.median, seed=0)
    told = {
        name: dict(zip(("p10", "median", "p90"), np.percentile(each, (10, 50, 90)), strict=True))
        for name, each in samples.items()
    }
    return {"ms": told, "rounds": len(ratios), "faster": [float(np.median(ratios)), low, high]}


def load_onnx(folder: Path) -> Callable[[Tensor], Tensor]:
    """A file of target onnx."""
    from vitcut.runtimes.onnx_runtime import load_session

    return load_session(folder / "model.onnx", batch=1, threads=1).run


def load_openvino(folder: Path) -> Callable[[Tensor], Tensor]:
    """A file of target openvino, with the settings that its README names."""
    from vitcut.runtimes.open_vino import compile_model, openvino

    return compile_model(openvino.Core().read_model(folder / "model.xml"), threads=1, fused=False)


def load_pt2(folder: Path) -> Callable[[Tensor], Tensor]:
    """A file of target pt2."""
    from vitcut.exports.pt2_file import load

    return load(folder / "model.pt2")


def load_executorch(folder: Path) -> Callable[[Tensor], Tensor]:
    """A file of target executorch, on one thread."""
    from executorch.extension.pybindings import portable_lib

    from vitcut.exports.executorch_file import load

    portable_lib._unsafe_reset_threadpool(1)
    return load(folder / "model.pte")


def load_litert(folder: Path) -> Callable[[Tensor], Tensor]:
    """A file of target litert."""
    from vitcut.exports.litert_file import load

    return load(folder / "model.tflite")


LOADERS = {
    "onnx": load_onnx,
    "openvino": load_openvino,
    "pt2": load_pt2,
    "executorch": load_executorch,
    "litert": load_litert,
}

_PEAK = """
print("peak", next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""
"""The peak of this program alone; what wait4 says includes the process that it was forked from."""


def start_pair(bed: Bed, case: str) -> dict[str, Any]:
    """Fresh processes that run the program of a README, or what it imports alone."""
    programs: dict[str, tuple[str, Path]] = {}
    for name in bed.models:
        kind = next(iter(CASES[case].folders().values()))
        folder = bed.folder(name, case, kind)
        pixels = bed.images.val.read(np.arange(1))[0]
        Image.fromarray(np.asarray(pixels).squeeze()).save(folder / "picture.jpg", quality=95)
        (program,) = re.findall(
            "^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL
        )
        imports = "\n".join(re.findall("^(?:import|from) .*", program, re.MULTILINE))
        programs["imports"] = (imports, folder)
        programs[name] = (program, folder)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    ends = time.perf_counter() + 20  # ExecuTorch takes ten seconds to import
    for number in range(STARTS + 1):
        if number >= 2 and time.perf_counter() > ends:
            break
        for name, (program, folder) in programs.items():
            begin = time.perf_counter()
            ended = subprocess.run(
                [sys.executable, "-c", program + _PEAK],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=True,
                capture_output=True,
                text=True,
            )
            took = time.perf_counter() - begin
            found[name].append((took, int(ended.stdout.split()[-1]) * 1024))
    return {
        name: {
            "seconds": median(seconds for seconds, _ in pairs[1:]),
            "peak_bytes": median(peak for _, peak in pairs[1:]),
        }
        for name, pairs in found.items()
    }


def collect(task: str, out: Path) -> None:
    """What was measured, into one raw file beside the page."""
    found = {case: out / "measured" / f"{case}.json" for case in CASES}
    rows = {case: json.loads(path.read_text()) for case, path in found.items() if path.exists()}
    if rows:
        kept = PAGE / f"{task}.json"
        content = json.loads(kept.read_text()) if kept.exists() else {}
        PAGE.mkdir(parents=True, exist_ok=True)
        write_json(kept, {**content, **rows})


if __name__ == "__main__":
    main()
