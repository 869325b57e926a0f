"""What was typed, rewritten before it is parsed: recipes, lists and flags without a value.

The flags themselves stand in `verbs`.
"""

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from jsonargparse import ArgumentParser

from vitcut.errors import ConfigError

_HELP = {"-h", "--help"}
_YES_NO = {"true", "false", "yes", "no", "on", "off"}
_SHORT = re.compile(r"^--(?=(source|skip_bad_images)(=|$))")


def recipes() -> list[str]:
    """The names of the recipes that vitcut brings along."""
    return sorted(path.stem for path in _recipe_folder().iterdir())


def recipe_file(recipe: str) -> Path:
    """The file of a recipe: a shipped one's name, or the path of another.

    Raises:
        ConfigError: There is no such recipe.
    """
    path = Path(recipe)
    if path.suffix not in {".yaml", ".yml"}:
        if recipe not in recipes():
            raise ConfigError(f"no recipe {recipe!r}: expected one of {_expected()}")
        path = _recipe_folder() / f"{recipe}.yaml"
    if not path.is_file():
        raise ConfigError(f"no recipe file at {path}")
    return path


def arrange_run(rest: list[str]) -> list[str]:
    """A recipe's name or file becomes the first ``--config``; flags of the data may be short."""
    if _HELP & set(rest):
        return ["--help"]
    recipe, flags = _take_recipe(rest)
    path = recipe_file(recipe)
    flags = [_SHORT.sub("--data.", word) for word in flags]
    return ["--config", str(path), "--out", f"runs/{path.stem}", *flags]


def arrange_demo(rest: list[str]) -> list[str]:
    """The demo is a recipe."""
    return arrange_run(["demo", *rest])


def arrange_values(parser: ArgumentParser, rest: list[str]) -> list[str]:
    """A flag of yes or no may stand alone, and a list needs no brackets.

    ``--merge`` says yes as ``--merge true`` does; ``--taus 0.01`` and ``--taus 0.01,0.02`` are
    lists as ``--taus "[0.01, 0.02]"`` is.

    Args:
        parser: Its defaults say which flags are which.
        rest: What was typed after the verb.
    """
    return list(_arranged(_flags_of(parser, bool), _flags_of(parser, (tuple, list)), rest))


def _arranged(switches: set[str], lists: set[str], rest: list[str]) -> Iterator[str]:
    for before, word, after in zip(["", *rest], rest, [*rest[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        # A repair has the settings of a training.
        known = flag.replace("--repair.", "--train.")
        if known in switches and not equals and after.lower() not in _YES_NO:
            yield f"{word}=true"
        elif known in lists and equals:
            yield f"{flag}={_bracketed(value)}"
        elif before.replace("--repair.", "--train.") in lists and word[:1] != "-":
            yield _bracketed(word)
        else:
            yield word


def _bracketed(value: str) -> str:
    return value if value[:1] == "[" else f"[{value}]"


def _flags_of(parser: ArgumentParser, kind: type | tuple[type, ...]) -> set[str]:
    """The flags whose default is of a kind."""
    return {f"--{key}" for key, value in parser.get_defaults().items() if isinstance(value, kind)}


def _take_recipe(rest: list[str]) -> tuple[str, list[str]]:
    """The first word, or what the first ``--config`` says; and all other words."""
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    for place, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        last = place + (1 if equals else 2)
        if flag == "--config" and last <= len(rest):
            return value or rest[last - 1], [*rest[:place], *rest[last:]]
    raise ConfigError(f"run needs a recipe: {_expected()}")


def _expected() -> str:
    return f"{', '.join(recipes())}, or a .yaml file"


def _recipe_folder() -> Path:
    return Path(str(resources.files("vitcut"))) / "recipes"
