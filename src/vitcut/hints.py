"""What to type after a verb: a command that works as it stands, but for words in capitals.

What was typed and matters to the next verb is repeated, what a run directory brings along is not.
"""

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from vitcut.compiler.settings import CutSettings
from vitcut.names import SHIPPED_MODEL, Ablation


def after_prepare(parser: ArgumentParser, namespace: Namespace) -> str:
    """The training on the images that were prepared, at their size."""
    known = _again(parser, namespace, "source", "image_size", "skip_bad_images")
    task = "drawn" if namespace.source == "drawn" else "LABELS.yaml"
    return f"vitcut train{known} --task {task}"


def after_train(out: Path) -> str:
    """The search in the trained model, under what a cut fills with."""
    return f"vitcut discover --model {_quoted(out)} --tau 0.01 --ablation mean"


def after_discover(out: Path, point: str, ablation: Ablation) -> str:
    """The cut to the circuit that was found; no cut fills as ``resample`` does."""
    filled = CutSettings().ablation_for(ablation)
    return f"vitcut cut {_quoted(out)} --point {point} --ablation {filled}"


def about_search(ablation: Ablation) -> str:
    """What to know of a search before a cut follows it; mostly nothing."""
    if ablation == CutSettings().ablation_for(ablation):
        return ""
    return "for a cut, search with --ablation mean: that is what it fills with\n"


def after_checks(model: str) -> str:
    """A cut by what was measured."""
    if model == SHIPPED_MODEL:
        data = " --source TINY_IMAGENET.zip"
    else:
        brought = (Path(model) / "origin.json").exists()
        data = "" if brought else " --source IMAGES --task LABELS.yaml"
    return f"vitcut cut --model {_quoted(model)}{data} --target-latency 0.2 --ablation linear"


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


def _again(parser: ArgumentParser, namespace: Namespace, *names: str) -> str:
    """Flags as they were typed; none that was left out."""
    words: list[str] = []
    for name in names:
        value = namespace[name]
        if value != parser.get_default(name):
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return "".join(f" {shlex.quote(word)}" for word in words)
