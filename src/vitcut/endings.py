"""What commands say when they end: what was found, and what to type next."""

import shlex
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from vitcut.errors import ConfigError, printable
from vitcut.hub import is_hub_id
from vitcut.names import SHIPPED_MODEL
from vitcut.recipes import fine_tuning_recipe
from vitcut.reports import show
from vitcut.reports.tables import recommend
from vitcut.results import DENSE, Results
from vitcut.runs import RESULTS_FILE, find_cut, find_run, has_cut


def after_prepare(typed: Namespace) -> str:
    """The command after `prepare`."""
    words = ["vitcut", "train"]
    words += [] if typed.source is None else ["--source", typed.source]
    words += [] if typed.image_size == 64 else ["--image-size", str(typed.image_size)]
    words += ["--skip-bad-images"] if typed.skip_bad_images else []
    words += [] if typed.orientation == "auto" else ["--orientation", typed.orientation]
    words += [] if typed.image_column is None else ["--image-column", typed.image_column]
    words += [] if typed.label_column is None else ["--label-column", typed.label_column]
    return shlex.join([*words, "--task", "drawn" if typed.source == "drawn" else "LABELS.yaml"])


def after_label(typed: Namespace) -> str:
    """What follows `label`: the page in a browser, or a training with its label file."""
    if not typed.serve:
        return f"open {typed.out or 'label.html'} in a browser"
    words = [] if typed.source is None else ["--source", typed.source]
    return shlex.join(["vitcut", "train", *words, "--task", typed.task])


def recipe_of_train(typed: Namespace) -> Path | None:
    """The file with the values of flags that `train` was not given: fine-tuning has its own."""
    for name in ("arch", "random_weights"):
        if typed[name] and typed.model is None:
            raise ConfigError(f"{name} is for a model, got none: give --model, or leave it out")
    pretrained = typed.model is not None and typed.freeze == "none"
    return fine_tuning_recipe() if pretrained else None


def after_train(typed: Namespace) -> str:
    """The command after `train`."""
    then = "discover" if typed.model is None else "cut"
    budget = [] if typed.model is None else ["--target-macs", "0.5"]
    return shlex.join(["vitcut", then, "--model", typed.out, *budget])


def after_discover(typed: Namespace) -> str:
    """The command after `discover`."""
    point = f"{typed.method}-{typed.ablation}-{typed.tau:g}"
    return shlex.join(["vitcut", "cut", typed.out, "--point", point])


def _cutting(model: str) -> list[str]:
    """The words of a cut of a model, up to its budget."""
    words = ["vitcut", "cut", "--model", model]
    if model == SHIPPED_MODEL:
        words += ["--source", "TINY_IMAGENET.zip"]
    elif find_run(model) is None:
        words += ["--source", "IMAGES", "--task", "LABELS.yaml"]
    return words


def after_cut(typed: Namespace) -> str:
    """The command after `cut`."""
    words, results = ["vitcut", "finetune", typed.out], Path(typed.out) / RESULTS_FILE
    if not (Path(typed.out) / "model").is_dir() and results.is_file():
        # Of several targets, the one that the results recommend.
        chosen = recommend(Results.load(results))
        words += [] if chosen is None else ["--point", chosen.name]
    return shlex.join(words)


def after_checks(typed: Namespace) -> str:
    """The command after `checks`."""
    words = [*_cutting(typed.model), "--target-latency", "0.2"]
    return shlex.join([*words, *([] if typed.save is None else ["--costs", typed.save])])


def after_info(typed: Namespace) -> str:
    """The command after `info`."""
    if has_cut(Path(typed.model)) and typed.point != DENSE:
        return shlex.join(
            ["vitcut", "show", "--plan", str(find_cut(Path(typed.model), typed.point))]
        )
    if is_hub_id(typed.model):
        return shlex.join(["vitcut", "predict", typed.model, "PICTURES"])
    return shlex.join([*_cutting(typed.model), "--target-macs", "FRACTION"])


def tell(text: str) -> None:
    """Write lines to standard output as they are, except for what could steer a terminal."""
    sys.stdout.write(f"{printable(text)}\n")


def show_task(task: Any) -> None:
    """Print the groups of a task."""
    for group, line in zip(task.groups, task.describe(), strict=True):
        names = ", ".join(item.name for item in task.classes if item.group == group)
        # Hundreds of the model's classes may be one class of the data.
        tell(line if task.folders else f"{group}: {names}")


def show_prepared(prepared: Any) -> None:
    """Print how many images there are."""
    sys.stdout.write(
        f"{len(prepared.images)} images of {len(prepared.class_names)} classes, "
        f"{len(prepared.skipped)} skipped\n"
    )


def show_found(circuit: Any) -> None:
    """Print a circuit that was found."""
    tell("\n".join(show.circuit_lines(circuit)))
    if circuit.ablation == "resample":
        sys.stdout.write("for a cut, search with --ablation mean: a cut fills with means\n")


def show_checks(found: Any) -> None:
    """Print what this machine has."""
    from vitcut.reports.checks import show_checks

    show_checks(found)


def after_finetune(typed: Namespace) -> str:
    """The command after `finetune`."""
    return shlex.join(["vitcut", "export", typed.out, "--to", "onnx"])


def show_of(typed: Namespace) -> str:
    """The command that shows a run again."""
    return shlex.join(["vitcut", "show", typed.out])
