"""The verbs of the command line: the flags and the work of each, in the table ``VERBS``.

A stage is imported when its verb runs. Parsing and telling errors are left to `cli`, short forms of
flags to `typed`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import ArgumentParser, Namespace

from vitcut.errors import ConfigError
from vitcut.flags import add_common, add_data, add_subject, at_home, data_of, given_of, take
from vitcut.hints import about_search, after_checks, after_discover, after_prepare, after_train
from vitcut.typed import arrange_demo, arrange_run, recipe_file, recipes

if TYPE_CHECKING:
    from vitcut.images.settings import DataSettings
    from vitcut.pipeline.subject import Origin
    from vitcut.results import Results


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command."""

    help: str
    """One line."""
    add_flags: Callable[[ArgumentParser], None]
    run: Callable[[ArgumentParser, Namespace], None]
    arrange: Callable[[list[str]], list[str]] = list
    """Rewrites what was typed before it is parsed."""
    before_flags: str = ""
    """What the usage line names before the flags of the parser."""
    more: str = ""
    """What ``--help`` says besides."""


def _report(results: "Results", out: Path, then: str) -> None:
    from vitcut.pipeline.show import report

    report(results)
    _say_next(out, then)


def _say_next(out: Path, then: str) -> None:
    sys.stdout.write(f"results: {out}\nnext: {then}\n")


def _origin(namespace: Namespace, data: "DataSettings", base: "Origin | None" = None) -> "Origin":
    from vitcut.pipeline.commands import resolve_origin

    given = given_of(namespace)
    return resolve_origin(namespace.model, namespace.task, data, base=base, given=given)


def _add_run(parser: ArgumentParser, out: str = "runs/RECIPE") -> None:
    from vitcut.pipeline.settings import RunSettings

    add_common(parser, out)
    parser.add_class_arguments(RunSettings)


def _add_demo(parser: ArgumentParser) -> None:
    _add_run(parser, "runs/demo")
    parser.set_defaults(yaml.safe_load(recipe_file("demo").read_text(encoding="utf-8")))


def _run(parser: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.pipeline.settings import RunSettings

    config = take(parser.instantiate(namespace), RunSettings)
    config = replace(config, data=at_home(config.data))
    from vitcut.pipeline.run import run

    results = run(config, namespace.out)
    _report(results, namespace.out, f"vitcut show {namespace.out}")


def _add_prepare(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config")
    parser.add_argument("--image_size", type=int, default=64, help="Side in pixels.")
    add_data(parser)


def _prepare(parser: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.images.prepare import prepare

    prepared = prepare(data_of(namespace, image_size=namespace.image_size))
    sys.stdout.write(
        f"{len(prepared.images)} images of {len(prepared.class_names)} classes, "
        f"{len(prepared.skipped)} skipped\n"
        f"next: {after_prepare(parser, namespace)}\n"
    )


def _add_suggest(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config")
    add_data(parser)
    parser.add_argument("--groups", type=int, default=6, help="How many groups.")
    parser.add_argument(
        "--out", type=Path, default=Path("labels.yaml"), help="The label file to write."
    )


def _suggest(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.pipeline.suggest import suggest_command

    task = suggest_command(data_of(namespace), namespace.groups, namespace.out)
    for group in task.groups:
        names = [item.name for item in task.classes if item.group == group]
        sys.stdout.write(f"{group}: {', '.join(names)}\n")
    _say_next(namespace.out, f"look through {namespace.out}, then give it as --task")


def _add_train(parser: ArgumentParser) -> None:
    from vitcut.model.settings import VitSettings
    from vitcut.training.settings import IMAGENET_MEAN, IMAGENET_STD, TrainSettings

    add_common(parser, "runs/train")
    add_data(parser)
    parser.add_argument("--task", type=str, default="animals", help="A task's name or label file.")
    parser.add_argument("--image_size", type=int, default=64, help="Side in pixels.")
    parser.add_class_arguments(VitSettings, "vit")
    parser.add_class_arguments(TrainSettings)
    for name, default, what in (
        ("mean", IMAGENET_MEAN, "Subtracted"),
        ("std", IMAGENET_STD, "Divided by"),
    ):
        parser.add_argument(
            f"--{name}",
            type=tuple[float, ...],
            default=default,
            help=f"{what} per channel, on the scale 0 to 1.",
        )


def _train(parser: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.training.settings import TrainSettings

    data = data_of(namespace, image_size=namespace.image_size)
    vit = parser.instantiate(namespace).vit
    config = take(namespace, TrainSettings)
    from vitcut.pipeline.commands import train_command

    mean, std = tuple(namespace.mean), tuple(namespace.std)
    folder = train_command(namespace.task, data, vit, config, namespace.out, mean=mean, std=std)
    _say_next(folder, after_train(namespace.out))


def _add_discover(parser: ArgumentParser) -> None:
    from vitcut.discovery.settings import DiscoverSettings

    add_common(parser, "runs/discover")
    add_subject(parser)
    parser.add_class_arguments(DiscoverSettings)


def _discover(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.discovery.settings import DiscoverSettings

    config = take(namespace, DiscoverSettings)
    data = data_of(namespace)
    from vitcut.pipeline.commands import discover_command
    from vitcut.pipeline.points import point_name
    from vitcut.pipeline.show import circuit_lines

    origin = _origin(namespace, data)
    circuit = discover_command(origin, config, namespace.out)
    sys.stdout.write("\n".join(circuit_lines(circuit)) + "\n" + about_search(config.ablation))
    point = point_name(config.method, config.ablation, config.tau)
    _say_next(namespace.out, after_discover(namespace.out, point, config.ablation))


def _add_cut(parser: ArgumentParser) -> None:
    from vitcut.compiler.settings import CutSettings
    from vitcut.selection.settings import Budget

    parser.add_argument(
        "circuit",
        type=Path | None,
        nargs="?",
        default=None,
        help="A run directory, or a circuit.json; none with a budget.",
    )
    parser.add_argument(
        "--point", type=str | None, default=None, help="Which point of a run directory."
    )
    add_common(parser, "runs/cut")
    add_subject(parser)
    parser.add_class_arguments(CutSettings)
    parser.add_class_arguments(Budget, skip={"seed"})
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the timing.")


def _cut(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.benchmark.settings import BenchSettings
    from vitcut.compiler.settings import CutSettings
    from vitcut.selection.settings import Budget

    config, bench = take(namespace, CutSettings), BenchSettings(threads=namespace.threads)
    select, data = take(namespace, Budget), data_of(namespace)
    select.require_budget_or(namespace.circuit, merge=config.merge)
    from vitcut.circuit import Circuit
    from vitcut.pipeline.budget import budget_command
    from vitcut.pipeline.commands import cut_command, find_circuit, find_origin
    from vitcut.pipeline.path import PATH_FILE, load_path, print_path

    if namespace.circuit is None:
        origin = _origin(namespace, data)
        results = budget_command(origin, select, config, bench, namespace.out)
        print_path(load_path(namespace.out / PATH_FILE))
    else:
        path = find_circuit(namespace.circuit, namespace.point)
        origin = _origin(namespace, data, base=find_origin(path))
        results = cut_command(Circuit.load(path), origin, config, bench, namespace.out)
    _report(results, namespace.out, f"vitcut finetune {namespace.out}")


def _add_finetune(parser: ArgumentParser) -> None:
    from vitcut.training.settings import FinetuneSettings

    parser.add_argument("run", type=Path, help="What `cut` wrote: a run or model directory.")
    parser.add_argument(
        "--point", type=str | None, default=None, help="Which point of a run directory."
    )
    add_common(parser, "runs/finetune")
    add_subject(parser)
    parser.add_argument(
        "--repair_dense",
        type=bool,
        default=True,
        help="Give the dense model the same repair, to compare with.",
    )
    parser.add_argument(
        "--repaired_dense",
        type=str | None,
        default=None,
        help="Take the repaired dense model of an earlier run directory of finetune.",
    )
    parser.add_class_arguments(FinetuneSettings)


def _finetune(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.benchmark.settings import BenchSettings
    from vitcut.pipeline.settings import RepairSettings
    from vitcut.training.settings import FinetuneSettings

    dense = namespace.repaired_dense
    config = RepairSettings(
        finetune=take(namespace, FinetuneSettings),
        repair_dense=namespace.repair_dense,
        repaired_dense=None if dense is None else str(Path(dense).resolve()),
        bench=BenchSettings(threads=namespace.threads or 1),
    )
    data = data_of(namespace)
    from vitcut.pipeline.commands import find_origin
    from vitcut.pipeline.repair import finetune_command
    from vitcut.pipeline.show import report_repair
    from vitcut.pipeline.stored import StoredCut

    cut = StoredCut.load(namespace.run, namespace.point)
    base = find_origin(cut.folder)
    origin = _origin(namespace, data, base=base)
    results, repair = finetune_command(cut, origin, config, namespace.out)
    report_repair(results, repair)
    _say_next(namespace.out, f"vitcut show {namespace.out}")


def _add_bench(parser: ArgumentParser) -> None:
    from vitcut.benchmark.settings import BenchSettings

    parser.add_argument("run", type=Path, help="A run directory with results.")
    add_common(parser, "runs/bench")
    parser.add_class_arguments(BenchSettings)


def _bench(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.benchmark.settings import BenchSettings

    config = take(namespace, BenchSettings)
    from vitcut.pipeline.commands import bench_command

    results = bench_command(namespace.run, config, namespace.out)
    _report(results, namespace.out, f"vitcut show {namespace.out}")


def _add_show(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="A run or model directory, or a circuit.json.")
    parser.add_argument(
        "--plan",
        type=bool,
        default=False,
        help="Only what the compact model computes, block by block, with predicted times.",
    )


def _show(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.pipeline.show import show, show_plan

    if namespace.plan:
        show_plan(namespace.path)
    else:
        show(namespace.path)


def _add_checks(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config")
    parser.add_argument("--model", type=str, default="animals", help="Its sizes are measured.")
    parser.add_argument("--models", type=int, default=18, help="Compact models to measure.")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="Time for each, for each batch size."
    )


def _checks(_: ArgumentParser, namespace: Namespace) -> None:
    if namespace.models < 3:
        raise ConfigError(f"models must be at least 3, got {namespace.models}")
    from vitcut.pipeline.checks import calibrate
    from vitcut.pipeline.show import print_calibration

    calibration = calibrate(namespace.model, models=namespace.models, seconds=namespace.seconds)
    print_calibration(calibration)
    sys.stdout.write(f"next: {after_checks(namespace.model)}\n")


VERBS = {
    "demo": Verb(
        help="The whole way in under three minutes, on drawn pictures.",
        add_flags=_add_demo,
        run=_run,
        arrange=arrange_demo,
    ),
    "run": Verb(
        help="Train, discover, cut and measure by a recipe; resumes.",
        add_flags=_add_run,
        run=_run,
        arrange=arrange_run,
        before_flags="RECIPE",
        more=f"RECIPE is {', '.join(recipes())}, or a .yaml file; its values take the place of "
        "the defaults below, and vitcut run RECIPE --print-config prints them. --source is short "
        "for --data.source, --skip-bad-images for --data.skip-bad-images.",
    ),
    "prepare": Verb(
        help="Decode a source of images into the cache.", add_flags=_add_prepare, run=_prepare
    ),
    "suggest": Verb(
        help="Write a label file: ImageNet's classes in groups, by WordNet.",
        add_flags=_add_suggest,
        run=_suggest,
    ),
    "train": Verb(help="Train a small ViT on a task.", add_flags=_add_train, run=_train),
    "discover": Verb(
        help="Find the circuit of a task in a model.", add_flags=_add_discover, run=_discover
    ),
    "cut": Verb(
        help="Cut a model to a budget, or to a circuit that was found, and measure it.",
        add_flags=_add_cut,
        run=_cut,
    ),
    "finetune": Verb(
        help="Repair a cut model: a few epochs of distillation, measured beside the dense one.",
        add_flags=_add_finetune,
        run=_finetune,
    ),
    "bench": Verb(
        help="Measure the models of a run again.",
        add_flags=_add_bench,
        run=_bench,
    ),
    "checks": Verb(
        help="Describe the machine, and measure what plans cost on it.",
        add_flags=_add_checks,
        run=_checks,
    ),
    "show": Verb(
        help="Print a circuit, a plan or results as tables.", add_flags=_add_show, run=_show
    ),
}
