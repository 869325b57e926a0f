"""Files that survive a kill: atomic, hashed and versioned. Never pickle."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
import yaml

from vitcut.errors import ArtefactError, VitcutError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_ABANDONED_AFTER_S = 3600
_YAML_DEPTH, _YAML_NODES = 50, 1_000_000


def cache_dir() -> Path:
    """The folder for prepared data: ``$VITCUT_CACHE``, else ``~/.cache/vitcut``."""
    chosen = os.environ.get("VITCUT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "vitcut"


@contextmanager
def atomic_path(path: str | Path) -> Generator[Path]:
    """Yield a temporary file beside ``path`` that takes its name when the block succeeds.

    A reader of ``path`` sees the old content or the whole new content, even after a kill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        # Without the sync a power cut may keep the rename and lose the bytes.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = True) -> Generator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its name when the block succeeds.

    A folder cannot be replaced in one step: the earlier one is first moved aside. A process killed
    at this moment leaves it there, and the next call puts it back. The next call also removes
    temporary folders of killed processes.

    Args:
        folder: The folder to write.
        replace: Whether to replace an earlier folder. If False, an earlier folder stays and the
            new one is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    for part in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        try:
            changed = max(item.stat().st_mtime for item in (part, *part.iterdir()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        # A folder that has changed recently may belong to a process that is still running.
        if time.time() - changed > _ABANDONED_AFTER_S:
            shutil.rmtree(part, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        if replace and folder.exists():
            folder.replace(_aside(folder))
        try:
            part.replace(folder)
        except OSError:
            if replace or not folder.is_dir():
                raise
    finally:
        _settle(folder)
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, keys in the given order; NaN is refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, *, kind: str, newest_version: int) -> dict[str, Any]:
    """Read a versioned JSON file that vitcut wrote.

    Args:
        path: The file.
        kind: What it holds, for messages: "circuit", "results", ...
        newest_version: The highest ``format_version`` that the caller understands.

    Raises:
        ArtefactError: The file is missing, damaged, or of a newer version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"no {kind} file at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not a readable {kind} file: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise ArtefactError(f"{path} is not a vitcut {kind} file: it has no format_version")
    if version > newest_version:
        raise ArtefactError(
            f"{path} has format_version {version}, this vitcut reads up to {newest_version}: "
            "upgrade vitcut"
        )
    return content


def save(path: str | Path, value: "DataclassInstance", *, version: int) -> None:
    """Write a dataclass as versioned JSON, atomically: ``format_version``, then every field.

    Args:
        path: The file.
        value: A dataclass of JSON values, tuples and further dataclasses.
        version: The ``format_version``.
    """
    write_json(path, {"format_version": version, **asdict(value)})


def load(path: str | Path, schema: type[T], *, kind: str, version: int) -> T:
    """Read a dataclass that `save` wrote, and check every key and type.

    Args:
        path: The file.
        schema: The dataclass. Its ``__post_init__`` runs.
        kind: What the file holds, for messages: "results", "training", ...
        version: The highest ``format_version`` that the caller understands.

    Raises:
        ArtefactError: The file is missing, damaged, or of a newer version; a key is missing or
            unknown, or a value has the wrong type.
    """
    content = read_json(path, kind=kind, newest_version=version)
    del content["format_version"]
    try:
        value = msgspec.convert(content, schema, str_keys=True)
    except (msgspec.ValidationError, VitcutError) as error:
        problem = str(error)
    else:
        # msgspec replaces a missing key by its default and drops an unknown one. `save` writes
        # every key, so what it would write now shows which ones are missing or unknown.
        expected = json.loads(json.dumps(asdict(cast("DataclassInstance", value))))
        problem = next(_odd_keys(content, expected), None)
        if problem is None:
            return value
    raise ArtefactError(
        f"{path} is not a {kind} file of format_version {version}: {problem}; restore it, or "
        "delete it and run again"
    )


def _odd_keys(found: Any, expected: Any, place: str = "$") -> Iterator[str]:
    """Name every key that only one of two JSON values has."""
    if isinstance(found, dict):
        for key in {**expected, **found}:
            if key in found and key in expected:
                yield from _odd_keys(found[key], expected[key], f"{place}.{key}")
            else:
                yield f"{'unknown' if key in found else 'missing'} field `{key}` - at `{place}`"
    elif isinstance(found, list):
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from _odd_keys(one, other, f"{place}[{number}]")


def parse_yaml(text: str, loader: Any = yaml.SafeLoader) -> Any:
    """Parse YAML that anyone may have written.

    Raises:
        yaml.YAMLError: It is not valid, nested too deeply, or larger than it looks.
    """
    sizes: dict[str, int] = {}  # nodes below each anchor, once all are written out
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=loader):
        size, anchor = 0, getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, 1))
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise yaml.YAMLError(f"*{anchor} names no earlier &{anchor}, or one that it is in")
            size = sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        if size and anchor is not None:
            sizes[anchor] = size
        open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + size)
        if len(open_nodes) > _YAML_DEPTH or open_nodes[-1][1] > _YAML_NODES:
            raise yaml.YAMLError(
                f"over {_YAML_DEPTH} levels or {_YAML_NODES:,} entries, with aliases written out"
            )
    return yaml.load(text, Loader=loader)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(content: Any) -> str:
    """The SHA-256 of a JSON value; the order of keys does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of_read(content: Any) -> str | None:
    """The SHA-256 of a value read from JSON; None if it holds NaN or infinity."""
    try:
        return sha256_json(content)
    except ValueError:
        return None


def _aside(folder: Path) -> Path:
    """Where an earlier folder lies while a new one takes its name."""
    return folder.with_name(f".{folder.name}.old")


def _settle(folder: Path) -> None:
    """Put back an earlier folder that nothing has replaced; remove one that has been replaced."""
    aside = _aside(folder)
    if not folder.exists():
        if aside.exists():
            aside.replace(folder)
    elif aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)
