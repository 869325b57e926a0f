"""What was typed, rewritten before it is parsed: recipes, lists and flags without a value.

The flags themselves stand in `verbs`.
"""

import re
from importlib import resources
from pathlib import Path

from vitcut.errors import ConfigError

_LISTS = {"--runtimes", "--batches"}


def arrange_run(rest: list[str]) -> list[str]:
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


def arrange_demo(rest: list[str]) -> list[str]:
    """The demo is a recipe."""
    return rest if set(rest) & {"-h", "--help"} else arrange_run(["demo", *rest])


def arrange_cut(rest: list[str]) -> list[str]:
    """A bare ``--merge`` says yes; ``--merge true`` and ``--merge=false`` are taken as typed."""
    after = [*rest[1:], ""]
    return [
        "--merge=true" if word == "--merge" and then not in {"true", "false"} else word
        for word, then in zip(rest, after, strict=True)
    ]


def arrange_bench(rest: list[str]) -> list[str]:
    """``--runtimes torch,openvino`` and ``--batches 1,64`` become the lists that they mean."""
    arranged: list[str] = []
    for before, word in zip(["", *rest], rest, strict=False):
        name, equals, value = word.partition("=")
        if before in _LISTS and word[:1] not in {"-", "["}:
            arranged.append(f"[{word}]")
        elif name in _LISTS and equals and value[:1] != "[":
            arranged.append(f"{name}=[{value}]")
        else:
            arranged.append(word)
    return arranged


def _recipes() -> list[str]:
    return sorted(
        Path(item.name).stem for item in (resources.files("vitcut") / "recipes").iterdir()
    )
