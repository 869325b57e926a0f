"""The command line: finds the verb, parses its flags, tells errors. What verbs do is in `verbs`.

Only the verb that was typed builds its parser, and a stage is imported when its verb runs, so
``vitcut --help`` loads no torch.
"""

import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from vitcut.errors import ConfigError, VitcutError
from vitcut.typed import arrange_values
from vitcut.verbs import VERBS

EXIT_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed
    typed = [_underscored(word) for word in typed if word != "--debug"]
    try:
        return _dispatch(typed)
    except (VitcutError, OSError) as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"vitcut: error: {' '.join(str(error).split())}\n")
        return EXIT_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on where it was\n")
        return 130


def entry() -> None:
    """The console script."""
    sys.exit(main())


def build_parser(name: str) -> ArgumentParser:
    """The parser of a verb."""
    verb = VERBS[name]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=f"vitcut {name} {verb.before_flags}".rstrip(),
        description=f"{verb.help} {verb.more}".rstrip(),
        exit_on_error=False,
    )
    verb.add_flags(parser)
    return parser


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
    parser = build_parser(name)
    try:
        namespace = parser.parse_args(arrange_values(parser, verb.arrange(rest)))
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
