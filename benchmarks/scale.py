"""Make docs/benchmarks/scale again: time and memory of searches on models at 224 pixels.

    uv run python benchmarks/scale.py

Models have random weights and images are random: how many edges ACDC keeps, and so its time, depends
on them, all else does not. Every case runs in a process of its own, whose peak of resident memory is
read at its end, beside what it held once libraries, model and images were loaded.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from part_scores import fisher_scores
from torch import nn

from vitcut.discovery.acdc import acdc
from vitcut.discovery.cache import require_room
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError
from vitcut.masked.oracle import Examples, Oracle
from vitcut.metrics import coarse_log_probs
from vitcut.model.tracing import read_model
from vitcut.model.weights import ViTWeights
from vitcut.runtime import describe_machine

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "scale"
CLASSES, GROUPS = 58, 6
FISHER = ("vit_base_patch16_224", 64)
ACDC = ("deit_tiny_patch16_224", 32)
TAU = 0.01
BATCH = 16
"""Images of a forward pass; the passes alone are timed on as many."""
THREADS = 2
GIB = 2**30


def main() -> None:
    """Run every case in a process of its own, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default=None, help="One case, in this process.")
    arguments = parser.parse_args()
    if arguments.case is not None:
        sys.stdout.write(json.dumps(measured(CASES[arguments.case])) + "\n")
        return
    found = {name: in_process(name) for name in CASES}
    content = {"machine": describe_machine(), "threads": THREADS, "cases": found}
    PAGE.mkdir(parents=True, exist_ok=True)
    (PAGE / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (PAGE / "README.md").write_text(page(content), encoding="utf-8")


def in_process(case: str) -> dict[str, Any]:
    """The outcome of a case, from its last line."""
    command = [sys.executable, __file__, "--case", case]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measured(case: Callable[[], Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Seconds and memory of what a case returns once everything is loaded."""
    torch.set_num_threads(THREADS)
    job = case()
    loaded = resident_gib()
    start = time.perf_counter()
    told = job()
    seconds = time.perf_counter() - start
    # Linux counts the peak in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return {"seconds": seconds, "loaded_gib": loaded, "peak_gib": peak, **told}


def resident_gib() -> float:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / GIB


def random_model(name: str) -> nn.Module:
    """A model whose answers depend on the image: with timm's small weights they hardly do."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
        model.get_submodule("head").get_parameter("weight").mul_(10)
    return model


def random_examples(count: int) -> Examples:
    """Images of random coarse patterns, each paired with the next one."""
    torch.manual_seed(1)
    coarse = torch.randn(count, 3, 14, 14)
    images = np.arange(count)
    return Examples(
        pixels=nn.functional.interpolate(coarse, size=224, mode="bilinear"),
        clean=images,
        corrupted=np.roll(images, 1),
        group_of_class=torch.arange(CLASSES) % GROUPS,
    )


def passes() -> Callable[[], dict[str, Any]]:
    """One forward pass of timm's own model and a backward pass per coarse class."""
    model, examples = random_model(FISHER[0]), random_examples(BATCH)
    model.requires_grad_(requires_grad=False)

    def job() -> dict[str, Any]:
        leaf = examples.pixels.clone().requires_grad_()
        log_probs = coarse_log_probs(model(leaf), examples.group_of_class, GROUPS)
        for y in range(GROUPS):
            torch.autograd.grad(log_probs[:, y].sum(), leaf, retain_graph=y < GROUPS - 1)
        return {}

    return job


def fisher() -> Callable[[], dict[str, Any]]:
    """Fisher scores of every head and neuron per token kind."""
    weights, examples = read_model(random_model(FISHER[0])), random_examples(FISHER[1])

    def job() -> dict[str, Any]:
        scores = fisher_scores(weights, examples, "mean")
        return {"parts": scores.heads.size + scores.neurons.size}

    return job


def search(memory_gib: float) -> Callable[[], dict[str, Any]]:
    """ACDC over whole tokens, refused where it would hold more than it may."""
    weights: ViTWeights = read_model(random_model(ACDC[0]))
    examples = random_examples(ACDC[1])

    def job() -> dict[str, Any]:
        config = DiscoverSettings(
            tau=TAU, ablation="resample", images=ACDC[1], memory_gib=memory_gib
        )
        try:
            require_room(weights, examples, config)
        except ConfigError as error:
            return {"memory_gib": memory_gib, "refused": str(error)}
        oracle = Oracle(weights, examples, config.ablation)
        found = acdc(weights, oracle, config)
        return {
            "memory_gib": memory_gib,
            "kept": int(found.kept.sum()),
            "edges": int(oracle.graph.edges.sum()),
            "kl": found.kl,
            "node_evaluations": found.node_evaluations,
            "precision": found.precision,
        }

    return job


def page(content: dict[str, Any]) -> str:
    """The page's text."""
    cases, machine = content["cases"], content["machine"]
    passes, scores = cases["passes"], cases["fisher"]
    ratio = scores["seconds"] / FISHER[1] / (passes["seconds"] / BATCH)
    found, refused = cases["acdc"], cases["acdc-too-little"]
    held = found["peak_gib"] - found["loaded_gib"]
    return f"""\
# Searches on models at 224 pixels

    uv run python benchmarks/scale.py

Random weights and random images: how many edges ACDC keeps, and so its time, depends on them, all else
does not. Each figure is of a process of its own; *peak* is the most memory that was resident,
*loaded* what was before the search began (libraries, model, images). {machine["cpu"]},
{content["threads"]} threads, float32 (ACDC's oracle float64), load {machine["load_1min"]} at the end. Raw:
[results.json](results.json).

## Fisher scores of ViT-B/16

`{FISHER[0]}` (86 M parameters), {GROUPS} groups, mean ablation, {BATCH} images at a
time: the scores of {scores["parts"]:,} heads and neurons per token kind on {FISHER[1]} images took
{scores["seconds"]:.0f} s, means included, and {scores["peak_gib"]:.1f} GiB at the peak
({scores["loaded_gib"]:.1f} loaded). One forward pass of timm's own model and one backward pass per group,
to the pixels, took {passes["seconds"]:.0f} s for {BATCH} images ({passes["peak_gib"]:.1f} GiB): per
image the scores take {ratio:.2f} times as long.

## ACDC on DeiT-Ti

`{ACDC[0]}`, {ACDC[1]} pairs, resample, whole tokens, tau {TAU:g}: {found["kept"]:,} of
{found["edges"]:,} edges kept at KL {found["kl"]:.3f}, {found["node_evaluations"]:,} node evaluations,
{found["seconds"]:.0f} s ({found["precision"]} to the end). It was allowed
`--memory-gib {found["memory_gib"]:g}`, and held {held:.1f} GiB at its peak beside the
{found["loaded_gib"]:.1f} that were loaded. With `--memory-gib {refused["memory_gib"]:g}` it refuses before
anything is computed:

    {refused["refused"]}
"""


CASES: dict[str, Callable[[], Callable[[], dict[str, Any]]]] = {
    "passes": passes,
    "fisher": fisher,
    "acdc": lambda: search(5.0),
    "acdc-too-little": lambda: search(2.0),
}


if __name__ == "__main__":
    main()
