"""Bad input for every command, counted: each must end in one line, exit code 2, and no file."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from reliability_cases import Lab
from safetensors.numpy import save_file

from vitcut import cli

_NO_NUMBER, _NO_COUNT = ("x", "nan", "inf", "-1"), ("x", "nan", "0", "-1", "1.5")
BAD_VALUES: dict[str, tuple[str, ...]] = {
    "threads": ("0", "-1", "1000000", "x"),
    "seed": ("-1", str(2**70), "1.5", "x"),
    "image-size": ("0", "-3", "1000000", "x"),
    "mean": ("nan", "128", "0.5,0.5", "x"),
    "std": ("0", "nan", "0.5,0.5"),
    "device": ("tpu", "cuda:99"),
    "orientation": ("sideways",),
    "skip-bad-images": ("perhaps",),
    "batches": ("0", "x", "[]"),
    "seconds": ("0", *_NO_NUMBER),
    "min-rounds": _NO_COUNT,
    "runtimes": ("tensorrt", "[]"),
    "tau": ("0", *_NO_NUMBER),
    "method": ("guess",),
    "ablation": ("noise",),
    "images": _NO_COUNT,
    "score-images": _NO_COUNT,
    "target-macs": ("0", "1", "1.5", "nan", "x", "0.5,,0.3"),
    "target-latency": ("0", "1", "nan", "x"),
    "max-drop": ("0", *_NO_NUMBER),
    "ridge": ("nan", "-1", "x"),
    "memory-gib": ("0", *_NO_NUMBER),
    "rounds": _NO_COUNT,
    "refresh-fraction": ("2", *_NO_NUMBER),
    "epochs": _NO_COUNT,
    "batch-size": _NO_COUNT,
    "learning-rate": ("0", *_NO_NUMBER),
    "weight-decay": _NO_NUMBER,
    "label-smoothing": ("1.5", *_NO_NUMBER),
    "width": _NO_COUNT,
    "depth": _NO_COUNT,
    "dropout": ("1.5", *_NO_NUMBER),
    "precision": ("float8",),
    "label-weight": _NO_NUMBER,
    "groups": ("0", "x"),
    "source": ("nowhere.zip", "empty", "text.zip", "one-class", "torn.zip", "a\nb"),
    "task": ("nowhere.yaml", "list.yaml", "empty-group.yaml", "other.yaml", "twice.yaml"),
    "model": ("nowhere", "empty", "torn.safetensors", "other.safetensors", "timm:no_such_vit"),
    "labels": ("nowhere.txt", "two.txt"),
    "repaired-dense": ("nowhere", "empty"),
    "costs": ("nowhere.json", "text.zip"),
    "point": ("no-such-point",),
    "config": ("nowhere.yaml", "list.yaml", "unknown.yaml"),
    "out": ("text.zip", "/proc/vitcut"),
    "no-such-flag": ("1",),
}
"""Values that no command takes; each is given to every command that has the flag."""

BAD_PATHS = ("nowhere", "empty", "text.zip", "torn.safetensors", "damaged")
"""Instead of the run or model directory that a command works on."""


def make_rubbish(folder: Path) -> None:
    """Write the broken files and directories that the values name."""
    (folder / "empty").mkdir()
    for name, text in {
        "text.zip": "no archive",
        "list.yaml": "- a\n- b\n",
        "unknown.yaml": "no_such_flag: 1\n",
        "empty-group.yaml": "name: t\ngroups:\n  a: {disc: disc}\n  b: {}\n",
        "other.yaml": "name: t\ngroups:\n  a: {n01443537: fish}\n  b: {n01629819: newt}\n",
        "twice.yaml": "name: t\ngroups:\n  a: {disc: disc}\n  b: {disc: disc, grid: grid}\n",
        "two.txt": "one\ntwo\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (folder / "torn.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    save_file({"a": np.zeros(3, np.float32)}, folder / "other.safetensors")
    (folder / "one-class" / "disc").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "one-class" / "disc" / "0.png")
    (folder / "damaged").mkdir()
    for name in ("config.json", "circuit.json", "results.json", "cut.json"):
        (folder / "damaged" / name).write_text(json.dumps({"format_version": 1}))


def _commands(lab: Lab) -> dict[str, tuple[str | None, list[str]]]:
    """For each command: the path that it works on, if it takes one, and what else it needs."""
    own = ["--source", str(lab.root / "pictures.zip"), "--task", str(lab.root / "task.yaml")]
    model, cut = ["--model", str(lab.root / "train")], str(lab.root / "cut")
    return {
        "prepare": (None, own[:2]),
        "suggest": (None, own[:2]),
        "train": (None, [*own, "--image-size", "16"]),
        "discover": (None, [*model, *own]),
        "cut": (None, [*model, *own, "--target-macs", "0.6"]),
        "finetune": (cut, [*model, *own]),
        "eval": (cut, own),
        "bench": (cut, []),
        "info": (cut, []),
        "show": (cut, []),
        "checks": (None, [*model, "--save", "measured.json"]),
        "run": ("animals", []),
    }


def bad_inputs(lab: Lab, scratch: Path, *, only: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Give every command each bad value of each of its flags, and yield what came of it.

    Args:
        lab: Runs and pictures for what is not bad of a command.
        scratch: An empty folder, in which the commands run; nothing may stay in it.
        only: The commands to try; by default all.
    """
    make_rubbish(scratch)
    before = sorted(scratch.rglob("*"))
    for verb, (path, rest) in _commands(lab).items():
        if only and verb not in only:
            continue
        flags = cli.build_parser(verb).get_defaults()
        words = [verb, *([] if path is None else [path]), *rest]
        tried = [[verb, other, *rest] for other in BAD_PATHS if path is not None]
        for flag, values in BAD_VALUES.items():
            if flag.replace("-", "_") in flags or flag in {"config", "no-such-flag"}:
                tried += [[*words, f"--{flag}", value] for value in values]
        for given in tried:
            # Where something is accepted after all, it goes where it is seen.
            out = ["--out", "out"] if "out" in flags and "--out" not in given else []
            with contextlib.chdir(scratch):
                outcome = _outcome([*given, *out])
            if sorted(scratch.rglob("*")) != before:
                outcome = "LEFT FILES"
            yield verb, outcome if outcome == "refused" else f"{outcome} {given}"


def _outcome(words: list[str]) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except BaseException as error:
            return f"TRACEBACK {type(error).__name__}: {error}"
    errors = [line for line in err.getvalue().splitlines() if line.startswith("vitcut: error: ")]
    if code != cli.EXIT_ERROR:
        return f"ACCEPTED with {code}"
    last = err.getvalue().rstrip("\n").rpartition("\n")[2]
    return "refused" if errors == [last] and len(last) < 1000 else f"UNCLEAR {err.getvalue()!r}"
