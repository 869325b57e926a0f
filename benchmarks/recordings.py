"""Record what every stage computes on the demo's model, and compare two recordings bit by bit.

A change that is not meant to change a result is checked with it: record with the code before and
with the code after, then compare. Every setting is given explicitly, so a changed default does not
show as a changed result.

    uv run python benchmarks/recordings.py record before/
    uv run python benchmarks/recordings.py compare before/ after/
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vitcut.progress import say

DATA = "--source drawn --task drawn"
TRAIN = (
    "--patch-size 8 --width 48 --depth 3 --num-heads 4 --mlp-ratio 4 --dropout 0 --image-size 64 --epochs 24 --batch-size 32 --learning-rate 0.0015 "
    "--weight-decay 0.05 --warmup-epochs 1 --seed 0 --augmentation light --label-smoothing 0.02 "
    "--cutmix-fraction 0 --max-shift-px 4 --compile false --precision float32 --device cpu "
    "--threads 1 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
)
SEARCH = (
    "--method acdc --tokens all --criterion increment --images 48 --pairs one_random --seed 0 "
    "--precision float32 --memory-gib 8"
)
CUT = "--images 512 --batch 64 --verify-images 64 --seed 0 --threads 1 --memory-gib 16"
BUDGET = (
    "--target-macs 0.12 --rounds 3 --score-images 144 --scores fisher --joint true "
    "--refresh-fraction 0.125 --rescore true --tokens split"
)
REPAIR = (
    "--epochs 2 --batch-size 32 --learning-rate 0.001 --weight-decay 0.05 --warmup-epochs 1 "
    "--seed 0 --augmentation none --label-smoothing 0 --cutmix-fraction 0 --max-shift-px 0 "
    "--coarse-weight 1 --fine-weight 1 --label-weight 0.5 --compile false --precision float32 "
    "--device cpu --threads 1"
)


def commands(out: Path) -> list[str]:
    """The commands of a recording, in their order."""
    dense = f"--model {out}/train {DATA}"
    found = [
        f"discover {dense} {SEARCH} --tau {tau} --ablation {ablation} --out {out}/search"
        for ablation in ("mean", "resample")
        for tau in (0.01, 0.003)
    ]
    return [
        f"train {DATA} {TRAIN} --out {out}/train",
        *found,
        f"cut {out}/search --point acdc-mean-0.003 --ablation mean {CUT} --out {out}/cut",
        f"cut {out}/search --point acdc-mean-0.003 --ablation mean --merge true {CUT} "
        f"--out {out}/merged",
        f"cut {dense} {BUDGET} --ablation linear {CUT} --out {out}/budget",
        f"finetune {out}/budget {REPAIR} --out {out}/repair",
    ]


def record(out: Path) -> None:
    """Run every command into a folder; what is there already is not made again."""
    from vitcut.cli import main

    for command in commands(out):
        say(f"vitcut {command}")
        if code := main(command.split()):
            sys.exit(code)


def compare(before: Path, after: Path) -> None:
    """Say of every circuit, decision log and tensor whether it is the same; exit 1 if one is not."""
    differing = 0
    for path in sorted(before.rglob("*")):
        name = path.relative_to(before)
        other = after / name
        if path.name == "decisions.jsonl":
            same = decisions(path) == decisions(other)
        elif path.name == "circuit.json":
            same = kept(path) == kept(other)
        elif path.suffix == ".safetensors" and path.parent.name in {"model", "dense"}:
            same = tensors_agree(path, other)
        else:
            continue
        say(f"{'same   ' if same else 'DIFFERS'} {name}")
        differing += not same
    sys.exit(1 if differing else 0)


def decisions(path: Path) -> list[dict]:
    """The decisions of a log, without how long they took."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: row[key] for key in ("source", "target", "cut", "increment", "kl")}
        for row in rows
        if "source" in row
    ]


def kept(path: Path) -> dict:
    """What a circuit keeps, without how it was found."""
    content = json.loads(path.read_text())
    return {
        key: content[key]
        for key in content
        if key not in {"format_version", "sha256", "origin", "provenance", "method", "task"}
    }


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file; sets of heads were called groups once."""
    return {
        name.replace(".groups.", ".head_sets."): tensor for name, tensor in load_file(path).items()
    }


def tensors_agree(path: Path, other: Path) -> bool:
    """Whether two files hold the same names and bits; says the largest difference where not."""
    one, two = read(path), read(other)
    if one.keys() != two.keys():
        say(f"        names differ: {one.keys() ^ two.keys()}")
        return False
    gaps = {
        name: float((one[name].double() - two[name].double()).abs().max())
        for name in one
        if one[name].numel()
    }
    worst = max(gaps, key=gaps.__getitem__)
    if gaps[worst]:
        say(f"        largest difference {gaps[worst]:.2g} in {worst}")
    return not gaps[worst]


if __name__ == "__main__":
    verb, *folders = sys.argv[1:]
    {"record": record, "compare": compare}[verb](*map(Path, folders))
