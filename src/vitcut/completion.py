"""Scripts by which a shell completes commands, flags and values."""

import re
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from vitcut.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")


def completion_script(shell: str, parsers: Mapping[str, ArgumentParser]) -> str:
    """A script for a shell, made by shtab.

    Args:
        shell: One of `SHELLS`.
        parsers: The parser of each command, by its name.

    Raises:
        ConfigError: Another shell, or shtab is not installed.
    """
    if shell not in SHELLS:
        raise ConfigError(f"print-completion must be one of {', '.join(SHELLS)}, got {shell!r}")
    try:
        import shtab
    except ImportError:
        raise ConfigError("print-completion needs a package: pip install shtab") from None
    root = ArgumentParser(prog="vitcut")
    root.add_argument("--version", action="store_true", help="Print the version.")
    root.add_argument("--print-completion", choices=SHELLS, help="Print such a script.")
    commands = root.add_subparsers()
    for name, parser in parsers.items():
        copy = commands.add_parser(name, help=_plain(parser.description))
        copy.add_argument("--debug", action="store_true", help="Show tracebacks.")
        for action in parser._actions:
            if action.help != SUPPRESS and action.dest != "help":
                _copy(action, copy, shtab.FILE)
    return str(shtab.complete(root, shell))


def _copy(action: Action, parser: ArgumentParser, files: Mapping[Any, Any]) -> None:
    """Add an argument of one of our parsers to a plain one: its names, values and help."""
    typed: Any = getattr(action, "_typehint", None)
    kinds = [typed, *get_args(typed)]
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    yes_no = bool in kinds
    more: dict[str, Any] = {"help": _plain(action.help)}
    more |= {"choices": words or ["true", "false"]} if words or yes_no else {}
    # A yes/no flag may stand alone.
    more |= {"nargs": "?"} if yes_no or action.nargs == 0 else {}
    flags = [flag.replace("_", "-") for flag in action.option_strings]
    added: Any = parser.add_argument(*(flags or [action.dest]), **more)
    if not (words or yes_no or {int, float} & set(kinds)):
        # Most other values are files; names can still be typed.
        added.complete = files


def _plain(text: str | None) -> str:
    """The first sentence of a help text, without what argparse or a shell takes for its own."""
    first = re.split(r"(?<=[^.]\.)\s", " ".join((text or "").split()))[0]
    return re.sub(r"[%`'\"$\\]", "", first)
