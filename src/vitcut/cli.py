"""The command line: verbs, their flags, and how an error is told. Work is left to the pipeline.

Only the verb that was typed builds its parser, and a stage is imported when its verb runs, so
``vitcut --help`` loads no torch.
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from vitcut.errors import ConfigError, VitcutError

if TYPE_CHECKING:
    from vitcut.data.settings import DataConfig
    from vitcut.results import Results

T = TypeVar("T")

EXIT_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command."""

    help: str
    """One line."""
    add_flags: Callable[[ArgumentParser], None]
    run: Callable[[ArgumentParser, Namespace], None]
    arrange: Callable[[list[str]], list[str]] = list
    """Rewrites what was typed before it is parsed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed
    typed = [_underscored(word) for word in typed if word != "--debug"]
    try:
        return _dispatch(typed)
    except (VitcutError, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"vitcut: error: {' '.join(str(error).split())}\n")
        return EXIT_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on where it was\n")
        return 130


def entry() -> None:
    """The console script."""
    sys.exit(main())


def _dispatch(typed: list[str]) -> int:
    if not typed or typed[0] in {"-h", "--help"}:
        sys.stdout.write(_overview())
        return 0
    if typed[0] == "--version":
        sys.stdout.write(f"vitcut {version('vitcut')}\n")
        return 0
    name, *rest = typed
    verb = VERBS.get(name)
    if verb is None:
        near = get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"
        raise ConfigError(f"no command {name!r}: {hint}")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=f"vitcut {name}", description=verb.help, exit_on_error=False)
    verb.add_flags(parser)
    try:
        namespace = parser.parse_args(verb.arrange(rest))
    except SystemExit as stop:
        return int(stop.code or 0)
    except (ArgumentError, UnicodeDecodeError) as error:
        remedy = f"vitcut {name} --help lists the flags"
        raise ConfigError(f"{_readable(error)}; {remedy}") from error
    verb.run(parser, namespace)
    return 0


class _Parser(ArgumentParser):
    """jsonargparse spells flags with underscores; people read and type dashes."""

    def format_help(self, formatter: Any = None) -> str:
        return _dashed(super().format_help(formatter))


def _underscored(word: str) -> str:
    flag, equals, value = word.partition("=")
    if not flag.startswith("--"):
        return word
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def _overview() -> str:
    lines = "\n".join(f"  {name:10} {verb.help}" for name, verb in VERBS.items())
    return f"""usage: vitcut COMMAND [--flag value ...]

Cut a Vision Transformer down to the circuit that a task needs.

commands:
{lines}

vitcut COMMAND --help shows the flags of a command; --version the version; --debug
shows the traceback of an error.
"""


def _dashed(text: str) -> str:
    return re.sub(r"--[a-z][\w.]*", lambda found: found[0].replace("_", "-"), text)


def _readable(error: Exception) -> str:
    """What jsonargparse says of an argument, in the words that a person typed."""
    text = re.sub(r"^Parser key \"([\w.]+)\":", r"--\1:", " ".join(str(error).split()))
    return _dashed(re.sub(r"<class '([\w.]+)'>|typing\.(?=Literal)", r"\1", text)).rstrip(".")


def _take(namespace: Namespace, settings: type[T], **given: Any) -> T:
    """Build a settings dataclass from flat flags of the same names."""
    values: dict[str, Any] = {}
    for item in fields(settings):  # pyright: ignore[reportArgumentType]
        if item.name not in given and item.name in namespace:
            value = namespace[item.name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return settings(**values, **given)


def _add_common(parser: ArgumentParser, out: str) -> None:
    parser.add_argument("--config", action="config")
    parser.add_argument("--out", type=Path, default=Path(out), help="Folder for the results.")


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        type=str | None,
        default=None,
        help="Images: a Tiny ImageNet .zip or folder, a folder of class folders, a .parquet file, "
        "a Hugging Face dataset id, or 'drawn'; Tiny ImageNet is downloaded when it is left out.",
    )
    parser.add_argument(
        "--skip_bad_images", type=bool, default=False, help="Leave out images that do not decode."
    )


def _add_subject(parser: ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument(
        "--task", type=str | None, default=None, help="A shipped task's name, or a label file."
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="'animals' (the default), a model or run directory, timm:NAME or hf-hub:REPOSITORY.",
    )


def _data(namespace: Namespace, **given: Any) -> "DataConfig":
    from vitcut.data.settings import DataConfig

    source = namespace.source
    return _at_home(DataConfig(source=source, skip_bad_images=namespace.skip_bad_images, **given))


def _at_home(data: "DataConfig") -> "DataConfig":
    """A path as source is kept absolute: a run directory is read from other places too."""
    if data.source is not None and Path(data.source).exists():
        return replace(data, source=str(Path(data.source).resolve()))
    return data


def _report(results: "Results", out: Path, then: str) -> None:
    from vitcut.pipeline.show import report

    report(results)
    _say_next(out, then)


def _say_next(out: Path, then: str) -> None:
    sys.stdout.write(f"results: {out}\nnext: {then}\n")


def _arrange_run(rest: list[str]) -> list[str]:
    """A recipe's name or file becomes its ``--config``; ``--source`` is short for data.source."""
    if not rest or rest[0].startswith("-"):
        if rest and rest[0] in {"-h", "--help"}:
            return rest
        raise ConfigError(f"run needs a recipe: {', '.join(_recipes())}, or a .yaml file")
    recipe, *flags = rest
    path = Path(recipe)
    if path.suffix not in {".yaml", ".yml"}:
        if recipe not in _recipes():
            raise ConfigError(
                f"no recipe {recipe!r}: expected one of {', '.join(_recipes())}, or a .yaml file"
            )
        path = Path(str(resources.files("vitcut"))) / "recipes" / f"{recipe}.yaml"
    if not path.is_file():
        raise ConfigError(f"no recipe file at {path}")
    flags = [re.sub(r"^--source(?==|$)", "--data.source", word) for word in flags]
    return ["--config", str(path), "--out", f"runs/{path.stem}", *flags]


def _recipes() -> list[str]:
    return sorted(
        Path(item.name).stem for item in (resources.files("vitcut") / "recipes").iterdir()
    )


def _add_run(parser: ArgumentParser) -> None:
    from vitcut.pipeline.settings import RunConfig

    _add_common(parser, "runs/run")
    parser.add_class_arguments(RunConfig)


def _run(parser: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.pipeline.settings import RunConfig

    config = _take(parser.instantiate(namespace), RunConfig)
    config = replace(config, data=_at_home(config.data))
    from vitcut.pipeline.run import run

    results = run(config, namespace.out)
    _report(results, namespace.out, f"vitcut show {namespace.out}")


def _arrange_demo(rest: list[str]) -> list[str]:
    return rest if set(rest) & {"-h", "--help"} else _arrange_run(["demo", *rest])


def _add_prepare(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config")
    parser.add_argument("--image_size", type=int, default=64, help="Side in pixels.")
    _add_data(parser)


def _prepare(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.data.prepare import prepare

    prepared = prepare(_data(namespace, image_size=namespace.image_size))
    sys.stdout.write(
        f"{len(prepared.images)} images of {len(prepared.class_names)} classes, "
        f"{len(prepared.skipped)} skipped\n"
        f"next: vitcut train --source {namespace.source or '...'} --task LABELS.yaml\n"
    )


def _add_train(parser: ArgumentParser) -> None:
    from vitcut.training.settings import TrainConfig
    from vitcut.vits.settings import VitConfig

    _add_common(parser, "runs/train")
    _add_data(parser)
    parser.add_argument("--task", type=str, default="animals", help="A task's name or label file.")
    parser.add_argument("--image_size", type=int, default=64, help="Side in pixels.")
    parser.add_class_arguments(VitConfig, "vit")
    parser.add_class_arguments(TrainConfig)


def _train(parser: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.training.settings import TrainConfig

    data = _data(namespace, image_size=namespace.image_size)
    vit = parser.instantiate(namespace).vit
    config = _take(namespace, TrainConfig)
    from vitcut.pipeline.commands import train_command

    folder = train_command(namespace.task, data, vit, config, namespace.out)
    _say_next(folder, f"vitcut discover --model {namespace.out} --tau 0.01")


def _add_discover(parser: ArgumentParser) -> None:
    from vitcut.discovery.settings import DiscoverConfig

    _add_common(parser, "runs/discover")
    _add_subject(parser)
    parser.add_class_arguments(DiscoverConfig)


def _discover(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.discovery.settings import DiscoverConfig

    config = _take(namespace, DiscoverConfig)
    data = _data(namespace)
    from vitcut.pipeline.commands import discover_command, resolve_origin
    from vitcut.pipeline.show import circuit_lines

    origin = resolve_origin(namespace.model, namespace.task, data)
    circuit = discover_command(origin, config, namespace.out)
    sys.stdout.write("\n".join(circuit_lines(circuit)) + "\n")
    _say_next(namespace.out, f"vitcut cut {namespace.out}")


def _add_cut(parser: ArgumentParser) -> None:
    from vitcut.compiler.settings import CutConfig

    parser.add_argument("circuit", type=Path, help="A run directory, or a circuit.json.")
    parser.add_argument(
        "--point", type=str | None, default=None, help="Which point of a run directory."
    )
    _add_common(parser, "runs/cut")
    _add_subject(parser)
    parser.add_class_arguments(CutConfig)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the timing.")


def _cut(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.benchmark.settings import BenchConfig
    from vitcut.compiler.settings import CutConfig

    config, bench = _take(namespace, CutConfig), BenchConfig(threads=namespace.threads)
    data = _data(namespace)
    from vitcut.circuit import Circuit
    from vitcut.pipeline.commands import cut_command, find_circuit, find_origin, resolve_origin

    path = find_circuit(namespace.circuit, namespace.point)
    circuit = Circuit.load(path)
    origin = resolve_origin(namespace.model, namespace.task, data, base=find_origin(path))
    results = cut_command(circuit, origin, config, bench, namespace.out)
    _report(results, namespace.out, f"vitcut show {namespace.out}")


def _add_bench(parser: ArgumentParser) -> None:
    from vitcut.benchmark.settings import BenchConfig

    parser.add_argument("run", type=Path, help="A run directory with results.")
    _add_common(parser, "runs/bench")
    parser.add_class_arguments(BenchConfig)


def _bench(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.benchmark.settings import BenchConfig

    config = _take(namespace, BenchConfig)
    from vitcut.pipeline.commands import bench_command

    results = bench_command(namespace.run, config, namespace.out)
    _report(results, namespace.out, f"vitcut show {namespace.out}")


def _add_show(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="A run or model directory, or a circuit.json.")


def _show(_: ArgumentParser, namespace: Namespace) -> None:
    from vitcut.pipeline.show import show

    show(namespace.path)


VERBS = {
    "demo": Verb(
        help="The whole way in under three minutes, on drawn pictures.",
        add_flags=_add_run,
        run=_run,
        arrange=_arrange_demo,
    ),
    "run": Verb(
        help="Train, discover, cut and measure by a recipe; resumes.",
        add_flags=_add_run,
        run=_run,
        arrange=_arrange_run,
    ),
    "prepare": Verb(
        help="Decode a source of images into the cache.", add_flags=_add_prepare, run=_prepare
    ),
    "train": Verb(help="Train a small ViT on a task.", add_flags=_add_train, run=_train),
    "discover": Verb(
        help="Find the circuit of a task in a model.", add_flags=_add_discover, run=_discover
    ),
    "cut": Verb(
        help="Compile a circuit into a compact model and measure it.", add_flags=_add_cut, run=_cut
    ),
    "bench": Verb(help="Measure the models of a run again.", add_flags=_add_bench, run=_bench),
    "show": Verb(
        help="Print a circuit, a plan or results as tables.", add_flags=_add_show, run=_show
    ),
}
