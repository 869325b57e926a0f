"""Make docs/supported-models.md again: every ViT of timm by name, exact or refused with a reason.

    OMP_NUM_THREADS=1 uv run python benchmarks/registry.py

Each model is built with random weights in float64, for images of four by four patches where it
takes such; models of over 100 M parameters get two blocks in float32. Its traced logits must be its own, and
compact models of random circuits must compute what their masked models do. Results are kept in
runs/registry.csv as they come, so that a run that was stopped goes on.
"""

import argparse
import csv
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from vitcut.circuit import Circuit
from vitcut.compiler.emit import compile_circuit, verify
from vitcut.errors import UnsupportedModelError, VitcutError
from vitcut.masked.fill import zero_fill
from vitcut.masked.fitting import mean_fill
from vitcut.model.adapters import read_weights
from vitcut.model.tracing import read_model
from vitcut.model.weights import ViTWeights
from vitcut.progress import say

PAGE = Path(__file__).parents[1] / "docs" / "supported-models.md"
MODULES = (
    "beit", "cait", "coat", "convit", "crossvit", "davit", "deit", "eva", "focalnet", "gcvit",
    "hiera", "hieradet_sam2", "levit", "maxxvit", "mvitv2", "naflexvit", "nest", "pit", "swin_transformer",
    "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer",
    "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos",
    "vision_transformer_sam", "vitamin", "volo", "xcit",
)  # fmt: skip
"""Files of timm with models that are called vision transformers."""
MANY = 100e6
PATCHES = 4
CLASSES = 7
COLUMNS = ("name", "outcome", "detail")


def main() -> None:
    """Walk the names, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/registry.csv"))
    arguments = parser.parse_args()
    done = load(arguments.out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        for name in names():
            if name not in done:
                done[name] = check(name)
                writer.writerow([name, *done[name]])
                stream.flush()
                say(" ".join([name, *done[name]]))
    PAGE.write_text(page({name: done[name] for name in names()}), encoding="utf-8")


def load(path: Path) -> dict[str, tuple[str, str]]:
    """What an earlier run found; a line that it was killed in is left out."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return {row[0]: (row[1], row[2]) for row in csv.reader(stream) if len(row) == len(COLUMNS)}


def names() -> list[str]:
    """Every name in those files."""
    known = set(timm.list_modules())
    return sorted(
        {name for module in MODULES if module in known for name in timm.list_models(module=module)}
    )


def check(name: str) -> tuple[str, str]:
    """``exact``, ``refused``, ``wrong`` or ``failed``, and the readout or the reason."""
    try:
        with torch.device("meta"):
            empty = timm.create_model(name, num_classes=CLASSES)
        large = sum(one.numel() for one in empty.parameters()) > MANY
        # Modules alone say what is understood, before a large model is built.
        try:
            read_weights(empty)
        except UnsupportedModelError as error:
            return "refused", str(error).removeprefix("not supported: ").split("; expected")[0]
        weights = read_model(build(name, empty, large=large))
        difference = compiled_difference(weights)
    except VitcutError as error:
        return "wrong", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    finally:
        gc.collect()
    groups = " + ".join(weights.split_graph.readout)
    blocks = "two blocks in float32, " if large else ""
    return "exact", f"{blocks}classifier reads {groups}; largest difference {difference:.0e}"


def build(name: str, empty: Any, *, large: bool) -> nn.Module:
    """The model in its precision, every parameter moved: many start at 0 or 1."""
    given: dict[str, Any] = {"num_classes": CLASSES}
    if large:
        given["depth"] = 2
    patch = empty.patch_embed.patch_size
    side = patch[0] if isinstance(patch, tuple) else patch
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=PATCHES * side, **given).eval()
    model = model.float() if large else model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.1))
    return model


def compiled_difference(weights: ViTWeights) -> float:
    """The largest difference of compact and masked logits over some random circuits.

    Raises:
        VitcutError: It is larger than the law allows.
    """
    size = weights.image_size
    pixels = torch.randn(2, weights.channels, size, size, dtype=weights.dtype)
    means = mean_fill(weights, [pixels])
    found = []
    for circuit in circuits(weights):
        fill = zero_fill(weights) if circuit.ablation == "zero" else means
        compact = compile_circuit(weights, circuit, fill, dtype=weights.dtype)
        found.append(verify(compact, weights, circuit, fill, pixels).max_abs_diff)
    return max(found)


def circuits(weights: ViTWeights) -> Iterator[Circuit]:
    """Everything, random parts per token kind, and random edges."""
    random, graph = np.random.default_rng(0), weights.split_graph
    yield Circuit.full(graph, ablation="zero")
    places = (graph.num_layers, graph.num_kinds)
    yield Circuit.of_parts(
        graph,
        heads=random.random((places[0], graph.num_heads, places[1])) < 0.6,
        neurons=random.random((*places, weights.num_neurons)) < 0.6,
        ablation="mean",
    )
    kept = weights.graph.edges & (random.random(weights.graph.edges.shape) < 0.9)
    yield Circuit(graph=weights.graph, kept=kept, ablation="mean")


def page(found: dict[str, tuple[str, str]]) -> str:
    """The table."""
    counts = Counter(outcome for outcome, _ in found.values())
    listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = [f"| `{name}` | {outcome} | {detail} |" for name, (outcome, detail) in found.items()]
    return PREAMBLE.format(version=timm.__version__, total=len(found), counts=listed) + "\n".join(
        [*lines, ""]
    )


PREAMBLE = """\
# Which of timm's models are read

    OMP_NUM_THREADS=1 uv run python benchmarks/registry.py

Every name in timm {version}'s files of vision transformers, built with random weights
in float64 (models of over 100 M parameters with two blocks, in float32; images of four by four
patches if the model takes them): {total} names, {counts}.

*exact*: the traced logits are the model's own, and the compact models of three circuits (all of it,
random heads and neurons per token kind, random edges) compute what their masked models do; the
largest difference of these is given. *refused*: with the reason. For models of other libraries see
[bring a model](how-to/bring-a-model.md).

| model | outcome | |
| --- | --- | --- |
"""


if __name__ == "__main__":
    main()
