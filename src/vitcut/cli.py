"""The command line: every command calls the function of the same name, `vitcut.NAME`.

Flags are read from the function's signature: its own keyword arguments, the fields of its settings,
and, if it takes a model or images, the arguments of `load_model` and `load_images`. Fields with the
same name share a flag.
"""

import inspect
import os
import re
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

from vitcut import api, delivery, endings, preparation, viewing
from vitcut.completion import completion_script
from vitcut.errors import ConfigError, DataError, VitcutError, one_line, shortage
from vitcut.extras import refusal
from vitcut.hints import EXAMPLES, argument_error, nearest_verb
from vitcut.images.settings import DataSettings
from vitcut.inputs import load_either, load_images, load_model, run_of
from vitcut.names import SHIPPED_MODEL
from vitcut.prediction import (
    load_any,
    predict,
    show_predictions,
    show_predictions_as_json,
)
from vitcut.progress import say
from vitcut.recipes import (
    RunSettings,
    check_train,
    demo,
    read_recipe,
    recipe_names,
    run,
    train,
)
from vitcut.reports import show
from vitcut.reports.info import show_info
from vitcut.runs import (
    CONFIG_FILE,
    REPORT_FILE,
    TRAINING_FILE,
    Run,
    find_circuit,
    find_cut,
    find_run,
    is_in_use,
)
from vitcut.settings import as_plain, require_here
from vitcut.store import parse_yaml

EXIT_ERROR, EXIT_BROKEN_PIPE = 2, 141
_YES_NO = {"true", "false", "yes", "no", "on", "off"}
_LEFT_OPEN = {"--compile"}
"""Yes/no flags whose default is neither."""
EITHER = "Model | CompactViT | Cut"
ANY = f"str | Path | {EITHER} | OnnxFile"
LOADERS: dict[str, Callable[..., Any]] = {
    "Model": load_model,
    EITHER: load_either,
    ANY: load_any,
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
    show_json: Callable[[Any], None] | None = None
    """How ``--json`` shows it, which only some commands have."""
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
    except (VitcutError, OSError, MemoryError, RuntimeError, ModuleNotFoundError) as raised:
        error = (refusal(raised) or raised) if isinstance(raised, ModuleNotFoundError) else raised
        short = None if isinstance(error, VitcutError) else shortage(error)
        if short is None and not isinstance(error, (VitcutError, OSError)):
            raise raised
        if debug:
            traceback.print_exc()
        told = one_line(error) if short is None else f"the machine ran out of {short}"
        sys.stderr.write(f"vitcut: error: {told}\n")
        return EXIT_ERROR


def _without_command(typed: list[str]) -> str | None:
    """What is printed if no command is typed; None if one is."""
    first, _, value = typed[0].partition("=") if typed else ("--help", "", "")
    if first in {"-h", "--help"}:
        lines = "\n".join(
            f"  {name:10} {parse_docstring(verb.call.__doc__ or '').short_description}"
            for name, verb in VERBS.items()
        )
        return _OVERVIEW.format(lines=lines)
    if first == "--version":
        return f"vitcut {version('vitcut')}\n"
    if first == "--print_completion":
        parsers = {name: build_parser(name) for name in VERBS}
        return completion_script(value or " ".join(typed[1:]), parsers)
    return None


def _dispatch(typed: list[str]) -> int:
    text = _without_command(typed)
    if text is not None:
        sys.stdout.write(text)
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
        _require_readable_configs(words)
        if verb.base is not None:
            first = parser.parse_args([word for word in words if word != "--print_config"])
            found = verb.base(first)
            words = words if found is None else ["--config", str(found), *words]
        typed_values = parser.parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    except (ArgumentError, UnicodeDecodeError) as error:
        words = [item.dest.upper() for item in parser._actions if not item.option_strings]
        usage, flags = " ".join(["vitcut", name, *words]), list(vars(parser.get_defaults()))
        text = _dashed(argument_error(one_line(error), flags, usage))
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
    shown = verb.show_json if typed_values.get("json") else verb.show
    if shown is not None:
        shown(result)
    if verb.out is not None or typed_values.get("out") is not None:
        endings.tell(f"results: {typed_values.out}")
    if verb.then is not None:
        endings.tell(f"next: {verb.then(typed_values)}")
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
    parser.examples = EXAMPLES.get(name, ())
    if "changes" in parameters:
        parser.description = f"{told.short_description} {_CHANGES}"
        parser.add_argument(
            "--print_config", action="store_true", help="Print the values of the recipe and exit."
        )
    else:
        parser.add_argument("--config", action="config", help="A YAML file with values for flags.")
    if verb.show_json is not None:
        told_of = "Print JSON, one object a line."
        parser.add_argument("--json", type=bool, default=False, help=told_of)
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
                flag = kind not in {EITHER, ANY} or own.name != "model"
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
    if kind in {EITHER, ANY}:
        yield from _loading("Model")


def _add(parser: ArgumentParser, parameter: inspect.Parameter, told: str, *, flag: bool) -> None:
    """Add one argument; whatever is no number, yes/no or choice is a string."""
    default = None if parameter.default is parameter.empty else parameter.default
    numbers = [kind for kind in (int, float) if re.search(rf"\b{kind.__name__}\b", str(parameter))]
    kind: Any = type(default) if isinstance(default, (bool, int, float)) else str | None
    if default is None and numbers == [int]:
        kind = int | None
    if get_origin(parameter.annotation) in {Literal, tuple}:
        kind = parameter.annotation
    name = f"--{parameter.name}" if flag else parameter.name
    optional = parameter.default is not parameter.empty or parameter.name == "recipe"
    more: dict[str, Any] = {"nargs": "?"} if optional and not flag else {}
    if not flag and "Sequence" in str(parameter.annotation):
        more, kind = {"nargs": "+"}, str
    if flag or optional:
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
    if "settings" in parameters and "out" in parameters and parameters["out"].default is None:
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
    if loaded.get("model") in {EITHER, ANY}:
        kind = loaded["model"]
        loading = {own.name: typed[own.name] for own, _ in _loading(kind)}
        values["model"] = LOADERS[kind](**loading)
        if typed.get("against") is not None:
            values["against"] = LOADERS[EITHER](typed.against, device=typed.device)
    if "images" in parameters:
        found = _load_images(typed, values, parameters["images"], new_head=optional)
        values["images"] = found
    return values


def _load_images(
    typed: Namespace, values: dict[str, Any], parameter: inspect.Parameter, *, new_head: bool
) -> Any:
    """The images of a command; None if it can do without, and nothing says where they are."""
    if parameter.default is None and typed.source is None and run_of(values["model"]) is None:
        if typed.task is not None:
            raise ConfigError("task is for images, got no source: give --source, or leave it out")
        return None
    names = inspect.signature(load_images).parameters
    loading = {name: typed[name] for name in names if name in typed and name not in _NOT_TYPED}
    if "model" in values and (typed.model is not None or not new_head):
        loading |= {"model": values["model"], "image_size": None, "mean": None, "std": None}
        loading["new_head"] = new_head
    elif "vit" in values:
        values["vit"].require_whole_patches(typed.image_size or DataSettings().image_size)
    try:
        return LOADERS["Images"](**loading)
    except DataError as error:
        if parameter.default is not None or typed.source is not None:
            raise
        say(f"going on without the run's images: {one_line(error)}")
        return None


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


def _require_readable_configs(words: list[str]) -> None:
    """Refuse configs that are no YAML, or larger than they look, before jsonargparse reads them."""
    pairs = zip(words, [*words[1:], ""], strict=False)
    named = [
        after if flag == word else value
        for word, after in pairs
        for flag, _, value in [word.partition("=")]
        if flag == "--config"
    ]
    for path in map(Path, named):
        try:
            content = parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is not a readable config: {one_line(error)}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} is no config: expected a line 'flag: value' for each flag")


def _arranged(parser: ArgumentParser, words: list[str]) -> Iterator[str]:
    """Let a yes/no flag stand alone, and a list go without brackets.

    ``--merge`` is ``--merge true``, ``--no-merge`` is ``--merge false``; ``--taus 0.01,0.02`` is
    ``--taus "[0.01, 0.02]"``.
    """
    defaults = vars(parser.get_defaults())
    switches = {f"--{key}" for key, value in defaults.items() if isinstance(value, bool)}
    switches |= _LEFT_OPEN & {f"--{key}" for key in defaults}
    lists = {f"--{key}" for key, value in defaults.items() if isinstance(value, (tuple, list))}
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag in switches - {"--print_config"} and not equals and after.lower() not in _YES_NO:
            yield f"{word}=true"
        elif word.startswith("--no_") and f"--{word[5:]}" in switches:
            yield f"--{word[5:]}=false"
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
    """Shows flags with dashes, and examples below them."""

    examples: tuple[str, ...] = ()

    def format_help(self, formatter: Any = None) -> str:
        lines = [f"  {self.prog} {words}".rstrip() for words in self.examples]
        shown = "\n".join(["", "examples:", *lines, ""]) if lines else ""
        return _dashed(super().format_help(formatter)) + shown


def _dashed(text: str) -> str:
    return re.sub(r"--[a-z][\w.]*", lambda found: found[0].replace("_", "-"), text)


def _help(told: Any, name: str) -> str:
    described = next((item.description for item in told.params if item.arg_name == name), "")
    return " ".join((described or "").replace("``", "").split())


_CHANGES = (
    f"Recipes: {', '.join(recipe_names())}, or a .yaml file. --GROUP.NAME VALUE changes one of its "
    "values (such as --train.epochs 2); --print-config lists them all."
)
_OVERVIEW = """usage: vitcut COMMAND [--flag value ...]

Cut a Vision Transformer down to the circuit that a task needs.

commands:
{lines}

vitcut COMMAND --help lists the flags of a command, with examples. --version prints the version.
--print-completion bash (or zsh, tcsh) prints a script for completion. With --debug, a command also
prints the traceback of an error.
"""

VERBS = {
    "demo": Verb(
        call=demo,
        show=show.show_results,
        then=lambda typed: f"open {Path(typed.out) / REPORT_FILE} in a browser",
        out="runs/demo",
    ),
    "run": Verb(call=run, show=show.show_results, then=endings.show_of, out="runs/RECIPE"),
    "prepare": Verb(
        call=preparation.prepare, show=endings.show_prepared, then=endings.after_prepare
    ),
    "suggest": Verb(
        call=preparation.suggest,
        show=endings.show_task,
        then=lambda typed: f"look through {typed.out}, then give it as --task",
        out="labels.yaml",
    ),
    "label": Verb(call=preparation.label, then=endings.after_label),
    "train": Verb(
        call=train,
        check=check_train,
        base=endings.recipe_of_train,
        then=endings.after_train,
        out="runs/train",
    ),
    "discover": Verb(
        call=api.discover, show=endings.show_found, then=endings.after_discover, out="runs/discover"
    ),
    "cut": Verb(
        call=api.cut,
        show=show.show_cut,
        check=api.check_cut,
        then=endings.after_cut,
        out="runs/cut",
    ),
    "finetune": Verb(
        call=api.finetune,
        show=show.show_repaired,
        check=api.check_finetune,
        then=endings.after_finetune,
        out="runs/finetune",
    ),
    # `eval` is a builtin of Python, so the function has the longer name.
    "eval": Verb(call=api.evaluate, show=show.show_evaluation),
    "predict": Verb(call=predict, show=show_predictions, show_json=show_predictions_as_json),
    "info": Verb(call=api.info, show=show_info, then=endings.after_info),
    "bench": Verb(call=api.bench, show=show.show_results, then=endings.show_of, out="runs/bench"),
    "export": Verb(
        call=delivery.export,
        show=show.show_exported,
        check=delivery.check_export,
        out="runs/export",
    ),
    "checks": Verb(call=api.checks, show=endings.show_checks, then=endings.after_checks),
    "show": Verb(call=viewing.show),
    "report": Verb(
        call=viewing.report, then=lambda typed: f"open {typed.out} in a browser", out="report.html"
    ),
}
