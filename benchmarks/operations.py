"""Where the time of a compact model goes in ONNX Runtime, operation by operation, and the floors.

    uv run python benchmarks/operations.py --run runs/speed

Reads the models that benchmarks/speed.py cut, and writes operations.md there; the page of
benchmarks/speed.py takes it along.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.export import Dim

import vitcut
from vitcut.compact.model import CompactViT, centred
from vitcut.runtime import describe_machine
from vitcut.runtimes.onnx_runtime import export_onnx
from vitcut.store import write_text

CHOSEN = {64: "batch-64-predicted-0.1750", 1: "batch-1-predicted-0.3400"}
PRODUCTS = {"Gemm", "MatMul", "FusedMatMul", "FusedGemm", "Conv"}
SHARE_SHOWN = 0.01
OPSET = 23
"""What vitcut writes."""
OLDER_OPSETS = (20, 18)


class PatchEmbedding(nn.Module):
    """The patch embedding of a model, alone."""

    def __init__(self, model: CompactViT) -> None:
        super().__init__()
        self.embed = deepcopy(model.get_submodule("patch_embed"))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The first number of each image, so that the output is small."""
        return self.embed(pixels).flatten(2).transpose(1, 2)[:, 0]


class Nothing(nn.Module):
    """The least that a call can do."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """One number of each image."""
        return pixels[:, 0, 0, :1] + 0.0


def main() -> None:
    """Export, profile, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/speed"), help="Of speed.py.")
    out = parser.parse_args().run
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        text = page(out, Path(temporary))
    write_text(out / "operations.md", text)


def page(out: Path, folder: Path) -> str:
    """The page's text."""
    models: dict[str, nn.Module] = {"dense": vitcut.load_model("animals").module}
    for batch, name in CHOSEN.items():
        models[f"cut for batch {batch}"] = CompactViT.from_pretrained(
            out / "points" / name / "model"
        )
    paths = {name: exported(model, folder / f"{name}.onnx") for name, model in models.items()}
    machine = describe_machine()
    profiles = "\n".join(
        f"## Batch {batch}: {name}\n\n{profile_table(paths[name], batch)}"
        for batch in (64, 1)
        for name in ("dense", f"cut for batch {batch}")
    )
    return f"""# Operation by operation

    uv run python benchmarks/operations.py --run runs/speed

{machine["cpu"]}, one thread, float32, ONNX Runtime {machine["versions"]["onnxruntime"]}, load
{machine["load_1min"]} before. The cuts are {" and ".join(f"`{name}`" for name in CHOSEN.values())} of
[README.md](README.md).

## Graphs

{graphs_table(paths)}
## Floors

{floors_table(models["cut for batch 64"], folder)}
## Batch sizes and opsets

RMSNormalization, which takes the place of LayerNormalization in cuts, and Attention are of opset 23,
GELU is of 20.

{export_table(models, folder)}
{profiles}"""


def exported(model: nn.Module, path: Path) -> Path:
    """The ONNX file that vitcut writes."""
    size = 64
    export_onnx(model, path, example=torch.randn(2, 3, size, size))
    return path


def session(path: Path, *, profile: str | None = None) -> onnxruntime.InferenceSession:
    """A session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def images(batch: int) -> np.ndarray:
    """Any images: the time does not depend on them."""
    return np.random.default_rng(0).standard_normal((batch, 3, 64, 64), dtype=np.float32)


def medians_ms(paths: dict[str, Path], batch: int, *, seconds: float = 2.0) -> dict[str, float]:
    """Median milliseconds of a call, all files in turn."""
    sessions = {name: session(path) for name, path in paths.items()}
    pixels, samples = images(batch), {name: [] for name in paths}
    end = time.perf_counter() + seconds * len(paths)
    while time.perf_counter() < end or len(samples[next(iter(paths))]) < 20:
        for name, one in sessions.items():
            feed = {one.get_inputs()[0].name: pixels}
            start = time.perf_counter()
            one.run(None, feed)
            samples[name].append(time.perf_counter() - start)
    return {name: 1000 * float(np.median(values[3:])) for name, values in samples.items()}


def profile(path: Path, batch: int) -> tuple[Counter[str], Counter[str]]:
    """Microseconds per call by operation, and how many there are."""
    calls = 30 if batch > 1 else 300
    with tempfile.TemporaryDirectory() as folder:
        one = session(path, profile=f"{folder}/profile")
        feed = {one.get_inputs()[0].name: images(batch)}
        for _ in range(calls):
            one.run(None, feed)
        events = json.loads(Path(one.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
            count[event["args"]["op_name"]] += 1
    return (
        Counter({name: value / calls for name, value in spent.items()}),
        Counter({name: value // calls for name, value in count.items()}),
    )


def profile_table(path: Path, batch: int) -> str:
    """What takes at least a hundredth of the time."""
    spent, count = profile(path, batch)
    total = sum(spent.values())
    lines = ["| operation | times | us | share |", "| --- | ---: | ---: | ---: |"]
    for name, value in spent.most_common():
        if value >= SHARE_SHOWN * total:
            lines.append(f"| {name} | {count[name]} | {value:,.0f} | {value / total:.0%} |")
    products = sum(value for name, value in spent.items() if name in PRODUCTS)
    lines.append(f"| all | {count.total()} | {total:,.0f} | 100% |")
    lines.append(
        f"| products and the patch embedding alone | | {products:,.0f} | {products / total:.0%} |"
    )
    return "\n".join(lines) + "\n"


def graphs_table(paths: dict[str, Path]) -> str:
    """Nodes of the file, and of what ONNX Runtime makes of it."""
    lines = ["| model | nodes in the file | operations run |", "| --- | ---: | ---: |"]
    for name, path in paths.items():
        nodes = len(onnx.load(path).graph.node)
        lines.append(f"| {name} | {nodes} | {profile(path, 64)[1].total()} |")
    return "\n".join(lines) + "\n"


def floors_table(model: nn.Module, folder: Path) -> str:
    """What no cut can do without."""
    if not isinstance(model, CompactViT):
        raise SystemExit("the chosen cut is no compact model")
    parts: dict[str, nn.Module] = {
        "an empty graph": Nothing(),
        "the patch embedding alone": PatchEmbedding(model),
        "the cut": model,
    }
    paths = {name: exported(part, folder / f"floor {name}.onnx") for name, part in parts.items()}
    found = {batch: medians_ms(paths, batch) for batch in (1, 64)}
    lines = ["| what | ms, batch 1 | ms, batch 64 |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {found[1][name]:.3f} | {found[64][name]:.2f} |" for name in paths]
    return "\n".join(lines) + "\n"


def export_table(models: dict[str, nn.Module], folder: Path) -> str:
    """The file that vitcut writes beside one for a single batch size and those of older opsets."""
    lines = [
        f"| model | batch | dynamic, opset {OPSET} | static, opset {OPSET} | "
        + " | ".join(f"dynamic, opset {opset}" for opset in OLDER_OPSETS)
        + " |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * len(OLDER_OPSETS),
    ]
    for name, model in models.items():
        paths = {"dynamic": exported(model, folder / "dynamic.onnx")}
        for opset in OLDER_OPSETS:
            older = folder / f"opset {opset}.onnx"
            paths[str(opset)] = plain_export(model, older, opset=opset)
        for batch in (1, 64):
            static = plain_export(model, folder / "static.onnx", opset=OPSET, batch=batch)
            of_batch = {"dynamic": paths["dynamic"], "static": static, **paths}
            found = medians_ms(of_batch, batch)
            shown = [
                f"{found[key]:.3f} ms, {len(onnx.load(path).graph.node)} nodes"
                for key, path in of_batch.items()
            ]
            lines.append(f"| {name} | {batch} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def plain_export(model: nn.Module, path: Path, *, opset: int, batch: int | None = None) -> Path:
    """For one batch size, or in an opset without RMSNormalization, where nothing is centred."""
    own: nn.Module = deepcopy(model).eval().requires_grad_(requires_grad=False)
    if isinstance(model, CompactViT) and opset >= OPSET:
        own = centred(model)
    torch.onnx.export(
        own,
        (torch.randn(batch or 2, 3, 64, 64),),
        path,
        dynamo=True,
        dynamic_shapes=None if batch else ({0: Dim("batch")},),
        opset_version=opset,
        external_data=False,
        verbose=False,
    )
    return path


if __name__ == "__main__":
    main()
