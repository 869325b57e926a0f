"""The command line: every command calls the function of the same name, `vitcut.NAME`.

Flags are read from the function's signature: its own keyword arguments, the fields of its settings,
and, if it takes a model or images, the arguments of `load_model` and `load_images`. Fields with the
same name share a flag.
"""

import inspect
import os
import re
import shlex
import shutil
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from vitcut import api, preparation
from vitcut.errors import ConfigError, VitcutError, one_line, printable, shortage
from vitcut.hints import argument_error, nearest_verb
from vitcut.inputs import load_either, load_images, load_model
from vitcut.names import SHIPPED_MODEL
from vitcut.recipes import (
    RunSettings,
    check_train,
    demo,
    fine_tuning_recipe,
    read_recipe,
    recipe_names,
    run,
    train,
)
from vitcut.report import show
from vitcut.report.info import show_info
from vitcut.report.tables import recommend
from vitcut.results import DENSE, Results
from vitcut.runs import (
    CONFIG_FILE,
    RESULTS_FILE,
    TRAINING_FILE,
    Run,
    find_circuit,
    find_cut,
    find_run,
    has_cut,
    is_in_use,
)
from vitcut.settings import as_plain, require_here

EXIT_ERROR, EXIT_BROKEN_PIPE = 2, 141
_YES_NO = {"true", "false", "yes", "no", "on", "off"}
_LEFT_OPEN = {"--compile"}
"""Yes/no flags whose default is neither."""
EITHER = "Model | CompactViT | Cut"
LOADERS: dict[str, Callable[..., Any]] = {
    "Model": load_model,
    EITHER: load_either,
    "Images": load_images,
}
"""Functions that make arguments which nobody can type; their own arguments become flags."""
_NOT_TYPED = {"model", "seed", "val_fraction", "new_head"}
"""Arguments of `load_images` without a flag: the model is the command's, and a seed that is typed
is that of settings; other splits would make test images of training images; only `train` gives a
model a new head."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command: a function, how its result is shown, and what to type next."""

    call: Callable[..., Any]
    show: Callable[[Any], None] | None = None
    then: Callable[[Namespace], str] | None = None
    """The next command, ready to run except for words in capitals."""
    check: Callable[[dict[str, Any]], None] | None = None
    """Refuses arguments before anything is loaded, and again before images are loaded."""
    base: Callable[[Namespace], Path | None] | None = None
    """A file with values for flags that were not typed."""
    out: str | None = None
    """The default of ``--out``, where results go; it is printed when the command ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed
    # jsonargparse spells flags with underscores; people type dashes, and both are taken.
    typed = [
        re.sub(r"^--[^=]+", lambda flag: f"--{flag[0][2:].replace('-', '_')}", word)
        for word in typed
        if word != "--debug"
    ]
    try:
        code = _dispatch(typed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has ended, as in `vitcut show RUN | head`; the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (VitcutError, OSError, MemoryError, RuntimeError) as error:
        short = None if isinstance(error, VitcutError) else shortage(error)
        if short is None and not isinstance(error, (VitcutError, OSError)):
            raise
        if debug:
            traceback.print_exc()
        told = one_line(error) if short is None else f"the machine ran out of {short}"
        sys.stderr.write(f"vitcut: error: {told}\n")
        return EXIT_ERROR


def _dispatch(typed: list[str]) -> int:
    if not typed or typed[0] in {"-h", "--help"}:
        lines = "\n".join(
            f"  {name:10} {parse_docstring(verb.call.__doc__ or '').short_description}"
            for name, verb in VERBS.items()
        )
        sys.stdout.write(_OVERVIEW.format(lines=lines))
        return 0
    if typed[0] == "--version":
        sys.stdout.write(f"vitcut {version('vitcut')}\n")
        return 0
    name, *rest = typed
    verb = VERBS.get(name)
    if verb is None:
        told = {
            verb: parse_docstring(item.call.__doc__ or "").short_description or ""
            for verb, item in VERBS.items()
        }
        raise ConfigError(f"no command {name!r}: {nearest_verb(name, told)}")
    parser, changes = build_parser(name), {}
    if "changes" in inspect.signature(verb.call).parameters:
        rest, changes = _take_changes(rest, parser)
    try:
        words = list(_arranged(parser, rest))
        if verb.base is not None:
            first = parser.parse_args([word for word in words if word != "--print_config"])
            found = verb.base(first)
            words = words if found is None else ["--config", str(found), *words]
        typed_values = parser.parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    except (ArgumentError, UnicodeDecodeError) as error:
        text = _dashed(argument_error(one_line(error), list(vars(parser.get_defaults()))))
        raise ConfigError(f"{text}; vitcut {name} --help lists the flags") from error
    if "recipe" in typed_values:
        if typed_values.recipe is None:
            raise ConfigError(f"run needs a recipe: {', '.join(recipe_names())}, or a .yaml file")
        if typed_values.out == verb.out:
            typed_values.out = f"runs/{Path(typed_values.recipe).stem}"
    if typed_values.get("print_config"):
        settings = as_plain(read_recipe(typed_values.get("recipe", name), changes))
        sys.stdout.write(yaml.safe_dump(settings, sort_keys=False))
        return 0
    with _nothing_left(typed_values.get("out")):
        result = verb.call(**_values(verb, parser, typed_values, changes))
    if verb.show is not None:
        verb.show(result)
    if verb.out is not None or typed_values.get("out") is not None:
        _tell(f"results: {typed_values.out}")
    if verb.then is not None:
        _tell(f"next: {verb.then(typed_values)}")
    return 0


@contextmanager
def _nothing_left(out: str | None) -> Generator[None]:
    """Remove a new run directory if an error leaves nothing in it but its settings."""
    folders = [] if out is None else [Path(out), *Path(out).parents]
    fresh = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except Exception:
        if fresh and fresh[0].is_dir() and not is_in_use(fresh[0]):
            left = {item.name for item in fresh[0].rglob("*")}
            if left <= {CONFIG_FILE, TRAINING_FILE}:
                shutil.rmtree(fresh[0])
        for folder in fresh:
            with suppress(OSError):
                folder.rmdir()
        raise


def build_parser(name: str) -> ArgumentParser:
    """The parser of a command."""
    verb = VERBS[name]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    told = parse_docstring(verb.call.__doc__ or "")
    parameters = inspect.signature(verb.call).parameters
    parser = _Parser(
        prog=f"vitcut {name}",
        description=told.short_description,
        exit_on_error=False,
        allow_abbrev=False,
        # A recipe is printed by this file, other settings by jsonargparse.
        print_config=None if "changes" in parameters else "--print_config",
    )
    if "changes" in parameters:
        parser.description = f"{told.short_description} {_CHANGES}"
        parser.add_argument(
            "--print_config", action="store_true", help="Print the values of the recipe and exit."
        )
    else:
        parser.add_argument("--config", action="config", help="A YAML file with values for flags.")
    known: set[Any] = set()
    for parameter in parameters.values():
        settings = _settings_of(parameter.annotation)
        kind = _kind(parameter)
        if parameter.name == "out":
            parser.add_argument("--out", type=str, default=verb.out, help=_help(told, "out"))
        elif settings is not None:
            parser.add_class_arguments(settings, skip=known & {f.name for f in fields(settings)})
            known |= {field.name for field in fields(settings)}
        elif kind in LOADERS:
            optional = parameter.default is None
            for own, described in _loading(kind):
                if own.name in known or (kind == "Images" and own.name in _NOT_TYPED):
                    continue
                if optional and own.name == "device":
                    # A training without a model has a device too: the flag is its settings'.
                    continue
                known.add(own.name)
                help_text = _help(told, "model") if optional and own.name == "model" else described
                # What a command is about is its first word, as in `vitcut info MODEL`.
                flag = kind != EITHER or own.name != "model"
                _add(parser, own, help_text, flag=flag)
        elif parameter.name != "changes":
            known.add(parameter.name)
            flag = parameter.kind is parameter.KEYWORD_ONLY or parameter.name in {"model", "source"}
            _add(parser, parameter, _help(told, parameter.name), flag=flag)
    return parser


def _loading(kind: str) -> Iterator[tuple[inspect.Parameter, str]]:
    """The arguments of a loader, with their help; some of `load_either`'s are `load_model`'s."""
    told = parse_docstring(LOADERS[kind].__doc__ or "")
    for own in inspect.signature(LOADERS[kind]).parameters.values():
        if own.kind is not own.VAR_KEYWORD:
            yield own, _help(told, own.name)
    if kind == EITHER:
        yield from _loading("Model")


def _add(parser: ArgumentParser, parameter: inspect.Parameter, told: str, *, flag: bool) -> None:
    """Add one argument; whatever is no number, yes/no or choice is a string."""
    default = None if parameter.default is parameter.empty else parameter.default
    numbers = [kind for kind in (int, float) if re.search(rf"\b{kind.__name__}\b", str(parameter))]
    kind: Any = type(default) if isinstance(default, (bool, int, float)) else str | None
    if default is None and numbers == [int]:
        kind = int | None
    if get_origin(parameter.annotation) is Literal:
        kind = parameter.annotation
    name = f"--{parameter.name}" if flag else parameter.name
    optional = parameter.default is not parameter.empty or parameter.name == "recipe"
    more: dict[str, Any] = {"nargs": "?"} if optional and not flag else {}
    if flag or more:
        more["default"] = str(default) if isinstance(default, Path) else default
    parser.add_argument(name, type=kind, help=told, **more)


def _values(
    verb: Verb, parser: ArgumentParser, typed: Namespace, changes: dict[str, str]
) -> dict[str, Any]:
    """The arguments of a command's function; cheap checks come before any loading."""
    values: dict[str, Any] = {}
    parameters = inspect.signature(verb.call).parameters
    for name, parameter in parameters.items():
        settings = _settings_of(parameter.annotation)
        if settings is not None:
            values[name] = settings(**_typed(settings, parser, typed))
            require_here(values[name])
        elif _kind(parameter) not in LOADERS and name != "changes":
            values[name] = typed[name]
    if "changes" in parameters:
        values["changes"] = changes
    check = verb.check or (lambda _: None)
    check(values)
    base = None
    if typed.get("circuit") is not None:
        from vitcut.circuit import Circuit

        path = find_circuit(Path(typed.circuit), typed.point)
        values["circuit"], base = Circuit.load(path), find_run(path)
    if typed.get("cut") is not None:
        from vitcut.compiler.cut import Cut

        path = find_cut(Path(typed.cut), typed.point)
        values["cut"], base = Cut.load(path), find_run(path)
    if "settings" in parameters and "out" in parameters:
        Run(typed.out)
    loaded = {name: _kind(parameter) for name, parameter in parameters.items()}
    optional = "model" in parameters and parameters["model"].default is None
    if loaded.get("model") == "Model":
        loading = {name: typed[name] for name in inspect.signature(load_model).parameters}
        loading["model"] = typed.model or base or (None if optional else SHIPPED_MODEL)
        model: Any = LOADERS["Model"](**loading) if loading["model"] else None
        if base is not None:
            # Whatever the model, images are the run's unless others are typed.
            model = replace(model, run=base)
        values["model"] = model
        check(values)
    if loaded.get("model") == EITHER:
        loading = {own.name: typed[own.name] for own, _ in _loading(EITHER)}
        values["model"] = LOADERS[EITHER](**loading)
        if typed.get("against") is not None:
            values["against"] = LOADERS[EITHER](typed.against, device=typed.device)
    if "images" in parameters:
        names = inspect.signature(load_images).parameters
        loading = {name: typed[name] for name in names if name in typed and name not in _NOT_TYPED}
        if "model" in values and (typed.model is not None or not optional):
            loading |= {"model": values["model"], "image_size": None, "mean": None, "std": None}
            loading["new_head"] = optional
        values["images"] = LOADERS["Images"](**loading)
    return values


def _typed(settings: type, parser: ArgumentParser, typed: Namespace) -> dict[str, Any]:
    """The fields of settings that were typed; the others keep their own defaults."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = typed[field.name]
        if field.name == "num_heads" and typed.get("model") is not None:
            continue  # That of the pretrained model.
        if value != parser.get_default(field.name):
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def _kind(parameter: inspect.Parameter) -> str:
    """What a parameter takes, by which its loader is found; a second model has none of its own."""
    kind = str(parameter.annotation)
    return kind.removesuffix(" | None") if parameter.name in {"model", "images"} else kind


def _settings_of(annotation: Any) -> type | None:
    """The settings class of an argument, including one that may be None."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def _arranged(parser: ArgumentParser, words: list[str]) -> Iterator[str]:
    """Let a yes/no flag stand alone, and a list go without brackets.

    ``--merge`` is ``--merge true``; ``--taus 0.01,0.02`` is ``--taus "[0.01, 0.02]"``.
    """
    defaults = vars(parser.get_defaults())
    switches = {f"--{key}" for key, value in defaults.items() if isinstance(value, bool)}
    switches |= _LEFT_OPEN & {f"--{key}" for key in defaults}
    lists = {f"--{key}" for key, value in defaults.items() if isinstance(value, (tuple, list))}
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag in switches - {"--print_config"} and not equals and after.lower() not in _YES_NO:
            yield f"{word}=true"
        elif flag in lists and equals:
            yield f"{flag}={value if value[:1] == '[' else f'[{value}]'}"
        elif before in lists and word[:1] != "-":
            yield word if word[:1] == "[" else f"[{word}]"
        else:
            yield word


def _take_changes(words: list[str], parser: ArgumentParser) -> tuple[list[str], dict[str, str]]:
    """Separate changes of a recipe from other words: ``--train.epochs 2``, ``--taus 0.01``."""
    own = {f"--{name}" for name in vars(parser.get_defaults())}
    data = {"--source", "--skip_bad_images", "--orientation", "--image_column", "--label_column"}
    top = ({f"--{field.name}" for field in fields(RunSettings)} - own) | data
    rest: list[str] = []
    changes: dict[str, str] = {}
    words = list(words)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag == "--config":
            # A recipe is the config of its run.
            rest += [value] if equals else []
            continue
        if not flag.startswith("--") or ("." not in flag and flag not in top):
            rest.append(f"{flag}{equals}{value}")
            continue
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        if "," in value and value[:1] not in "[{":
            value = f"[{value}]"
        changes[f"data.{flag[2:]}" if flag in data else flag[2:]] = value
    return rest, changes


class _Parser(ArgumentParser):
    """Shows flags with dashes."""

    def format_help(self, formatter: Any = None) -> str:
        return _dashed(super().format_help(formatter))


def _dashed(text: str) -> str:
    return re.sub(r"--[a-z][\w.]*", lambda found: found[0].replace("_", "-"), text)


def _help(told: Any, name: str) -> str:
    described = next((item.description for item in told.params if item.arg_name == name), "")
    return " ".join((described or "").replace("``", "").split())


def _after_prepare(typed: Namespace) -> str:
    words = ["vitcut", "train"]
    words += [] if typed.source is None else ["--source", typed.source]
    words += [] if typed.image_size == 64 else ["--image-size", str(typed.image_size)]
    words += ["--skip-bad-images"] if typed.skip_bad_images else []
    words += [] if typed.orientation == "auto" else ["--orientation", typed.orientation]
    words += [] if typed.image_column is None else ["--image-column", typed.image_column]
    words += [] if typed.label_column is None else ["--label-column", typed.label_column]
    return shlex.join([*words, "--task", "drawn" if typed.source == "drawn" else "LABELS.yaml"])


def _recipe_of_train(typed: Namespace) -> Path | None:
    for name in ("arch", "random_weights"):
        if typed[name] and typed.model is None:
            raise ConfigError(f"{name} is for a model, got none: give --model, or leave it out")
    pretrained = typed.model is not None and typed.freeze == "none"
    return fine_tuning_recipe() if pretrained else None


def _after_train(typed: Namespace) -> str:
    then = "discover" if typed.model is None else "cut"
    budget = [] if typed.model is None else ["--target-macs", "0.5"]
    return shlex.join(["vitcut", then, "--model", typed.out, *budget])


def _after_discover(typed: Namespace) -> str:
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


def _after_cut(typed: Namespace) -> str:
    words, results = ["vitcut", "finetune", typed.out], Path(typed.out) / RESULTS_FILE
    if not (Path(typed.out) / "model").is_dir() and results.is_file():
        # Of several targets, the one that the results recommend.
        chosen = recommend(Results.load(results))
        words += [] if chosen is None else ["--point", chosen.name]
    return shlex.join(words)


def _after_checks(typed: Namespace) -> str:
    words = [*_cutting(typed.model), "--target-latency", "0.2"]
    return shlex.join([*words, *([] if typed.save is None else ["--costs", typed.save])])


def _after_info(typed: Namespace) -> str:
    if has_cut(Path(typed.model)) and typed.point != DENSE:
        return shlex.join(
            ["vitcut", "show", "--plan", str(find_cut(Path(typed.model), typed.point))]
        )
    return shlex.join([*_cutting(typed.model), "--target-macs", "FRACTION"])


def _tell(text: str) -> None:
    """Write lines to standard output as they are, except for what could steer a terminal."""
    sys.stdout.write(f"{printable(text)}\n")


def _show_task(task: Any) -> None:
    for group, line in zip(task.groups, task.describe(), strict=True):
        names = ", ".join(item.name for item in task.classes if item.group == group)
        # Hundreds of the model's classes may be one class of the data.
        _tell(line if task.folders else f"{group}: {names}")


def _show_prepared(prepared: Any) -> None:
    sys.stdout.write(
        f"{len(prepared.images)} images of {len(prepared.class_names)} classes, "
        f"{len(prepared.skipped)} skipped\n"
    )


def _show_found(circuit: Any) -> None:
    _tell("\n".join(show.circuit_lines(circuit)))
    if circuit.ablation == "resample":
        sys.stdout.write("for a cut, search with --ablation mean: a cut fills with means\n")


def _show_of(typed: Namespace) -> str:
    return shlex.join(["vitcut", "show", typed.out])


_CHANGES = (
    f"Recipes: {', '.join(recipe_names())}, or a .yaml file. --GROUP.NAME VALUE changes one of its "
    "values (such as --train.epochs 2); --print-config lists them all."
)
_OVERVIEW = """usage: vitcut COMMAND [--flag value ...]

Cut a Vision Transformer down to the circuit that a task needs.

commands:
{lines}

vitcut COMMAND --help lists the flags of a command. --version prints the version. With --debug, a
command also prints the traceback of an error.
"""

VERBS = {
    "demo": Verb(call=demo, show=show.show_results, then=_show_of, out="runs/demo"),
    "run": Verb(call=run, show=show.show_results, then=_show_of, out="runs/RECIPE"),
    "prepare": Verb(call=preparation.prepare, show=_show_prepared, then=_after_prepare),
    "suggest": Verb(
        call=preparation.suggest,
        show=_show_task,
        then=lambda typed: f"look through {typed.out}, then give it as --task",
        out="labels.yaml",
    ),
    "train": Verb(
        call=train,
        check=check_train,
        base=_recipe_of_train,
        then=_after_train,
        out="runs/train",
    ),
    "discover": Verb(
        call=api.discover, show=_show_found, then=_after_discover, out="runs/discover"
    ),
    "cut": Verb(
        call=api.cut,
        show=show.show_cut,
        check=api.check_cut,
        then=_after_cut,
        out="runs/cut",
    ),
    "finetune": Verb(
        call=api.finetune,
        show=show.show_repaired,
        check=api.check_finetune,
        then=_show_of,
        out="runs/finetune",
    ),
    # `eval` is a builtin of Python, so the function has the longer name.
    "eval": Verb(call=api.evaluate, show=show.show_evaluation),
    "info": Verb(call=api.info, show=show_info, then=_after_info),
    "bench": Verb(call=api.bench, show=show.show_results, then=_show_of, out="runs/bench"),
    "checks": Verb(call=api.checks, show=show.show_calibration, then=_after_checks),
    "show": Verb(call=api.show),
}
