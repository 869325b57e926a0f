"""Files that survive a kill: atomic, hashed at writing and verified at reading. Never pickle.

A file that is read again is *sealed*: it holds its format version and the SHA-256 of everything
else in it. JSON holds them beside its values, safetensors (``tensors.py``) in their metadata.
"""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
import yaml

from vitcut.errors import ArtefactError, VitcutError, shortage

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_PART = re.compile(r"\..+\.\w{8,12}\.part")
_ASIDE = ".replaced-by-vitcut"
_LARGEST = 2**63
_YAML_DEPTH, _YAML_NODES = 50, 1_000_000
UNSEALED = "0" * 64
REMEDY = "restore it, or delete it and run again"
FOLDER_REMEDY = "restore it, or delete its folder and run again"
"""For files that are part of a whole: of a model directory, of a training."""


def cache_dir() -> Path:
    """The folder for prepared data: ``$VITCUT_CACHE``, else ``~/.cache/vitcut``."""
    chosen = os.environ.get("VITCUT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "vitcut"


@contextmanager
def atomic_path(path: str | Path) -> Generator[Path]:
    """Yield a temporary file that takes the name ``path`` when the block succeeds.

    A reader of ``path`` sees the old content or the whole new content, even after a kill.
    """
    path = Path(path)
    # In a folder of its own, because libraries put temporary files beside what they write.
    with _part(path) as part:
        temporary = part / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        # Without the sync a power cut may keep the rename and lose the bytes.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = True) -> Generator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its name when the block succeeds.

    A folder cannot be replaced in one step: the earlier one is first moved aside. A process killed
    at this moment leaves it there, and the next call puts it back.

    Args:
        folder: The folder to write.
        replace: Whether to replace an earlier folder. If False, an earlier folder stays and the
            new one is dropped.
    """
    with _part(folder) as part:
        _settle(folder)
        try:
            yield part
            if replace and folder.exists():
                folder.replace(_aside(folder))
            try:
                part.replace(folder)
            except OSError:
                if replace or not folder.is_dir():
                    raise
        finally:
            _settle(folder)


@contextmanager
def _part(path: Path) -> Generator[Path]:
    """Yield a new folder beside ``path``, which nobody sweeps away before the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent.glob(f".{glob.escape(path.name)}.*.part"))
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        part.mkdir()
        # Another process may take it for an abandoned one before it is locked.
        with suppress(FileNotFoundError):
            lock = lock_folder(part)
            if part.exists():
                break
            unlock(lock)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        unlock(lock)


def lock_folder(folder: Path, *, wait: bool = True) -> int | None:
    """Lock a folder until it is unlocked, or the process ends; forked children hold no lock.

    Args:
        folder: An existing folder.
        wait: Whether to wait for another process that holds the lock.

    Returns:
        What `unlock` takes; None where the system or the file system has no locks.

    Raises:
        BlockingIOError: Another process holds the lock.
        FileNotFoundError: There is no such folder.
    """
    if fcntl is None:
        return None
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise
    except OSError:
        os.close(opened)
        return None
    _LOCKS.add(opened)
    return opened


def unlock(lock: int | None) -> None:
    """Give a lock of `lock_folder` back."""
    if lock in _LOCKS:
        _LOCKS.remove(lock)
        os.close(lock)


_LOCKS: set[int] = set()


def _close_in_child() -> None:
    # The system counts a lock as held while any process has its file open: workers that outlive a
    # killed parent would hold the parent's. Closing it here takes nothing from the parent.
    for lock in tuple(_LOCKS):
        unlock(lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def sweep(folder: Path, *, deep: bool = False) -> None:
    """Remove the temporary files that killed processes left in a folder.

    Args:
        folder: The folder, which need not exist.
        deep: Look into the folders in it, too, and finish replacing folders that were left halfway.
            No other process may write into it meanwhile.
    """
    if not folder.is_dir():
        return
    _sweep(list(folder.rglob(".*.part") if deep else folder.glob(".*.part")))
    for aside in list(folder.rglob(f".*{_ASIDE}")) if deep else ():
        _settle(aside.with_name(aside.name[1:].removesuffix(_ASIDE)))


def _sweep(parts: Iterable[Path]) -> None:
    """Remove temporary files and folders whose process has ended."""
    for part in parts:
        if not _PART.fullmatch(part.name):
            continue
        with suppress(OSError):  # In use, or already gone.
            lock = lock_folder(part, wait=False)
            if lock is None:
                continue
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()
            unlock(lock)


def _aside(folder: Path) -> Path:
    """Where an earlier folder lies while a new one takes its name."""
    return folder.with_name(f".{folder.name}{_ASIDE}")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is what a killed process leaves behind."""
    return _PART.fullmatch(name) is not None or (name.startswith(".") and name.endswith(_ASIDE))


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


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, keys in the given order; NaN is refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def sealed(content: Mapping[str, Any], version: int) -> dict[str, Any]:
    """JSON values with their format version and the hash of it all."""
    whole = {"format_version": version, **content}
    return {**whole, "sha256": sha256_json(whole)}


def unsealed(
    content: Any, path: Path, *, kind: str, version: int, oldest: int, remedy: str = REMEDY
) -> dict[str, Any]:
    """What `sealed` was given, after its version and hash are checked.

    Args:
        content: What was read.
        path: Where, for messages.
        kind: What it holds, for messages: "circuit", "results", ...
        version: The newest format version that the caller understands.
        oldest: The oldest one.
        remedy: What to do if it was altered.

    Raises:
        ArtefactError: It is something else, of another version, or was altered.
    """
    found = content.get("format_version") if isinstance(content, dict) else None
    if type(found) is not int:
        raise ArtefactError(f"{path} is not a vitcut {kind} file: it has no format_version")
    if found > version:
        raise ArtefactError(
            f"{path} has format_version {found}, this vitcut reads up to {version}: upgrade vitcut"
        )
    if found < oldest:
        raise ArtefactError(
            f"{path} has format_version {found}, this vitcut reads {version}: make it again with "
            "the command that wrote it"
        )
    whole = {key: value for key, value in content.items() if key != "sha256"}
    own = hash_of_read(whole)
    if own is None or own != content.get("sha256"):
        raise ArtefactError(
            f"{path} was altered: its hash is not the one that it was written with; {remedy}"
        )
    del whole["format_version"]
    return whole


def read_json(
    path: str | Path,
    *,
    kind: str,
    version: int,
    oldest: int | None = None,
    remedy: str = REMEDY,
) -> dict[str, Any]:
    """Read sealed JSON, without its format version and hash.

    Args:
        path: The file.
        kind: What it holds, for messages: "circuit", "results", ...
        version: The newest ``format_version`` that the caller understands.
        oldest: The oldest one; None if there is only the newest.
        remedy: What to do if it is damaged.

    Raises:
        ArtefactError: The file is missing, damaged, altered, or of another version.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"no {kind} file at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        if shortage(error) and not isinstance(error, RecursionError):
            raise
        raise ArtefactError(f"{path} is not a readable {kind} file: {error}") from None
    oldest = version if oldest is None else oldest
    return unsealed(content, path, kind=kind, version=version, oldest=oldest, remedy=remedy)


def save(path: str | Path, value: "DataclassInstance", *, version: int) -> None:
    """Write a dataclass as sealed JSON, atomically: ``format_version``, then every field.

    Args:
        path: The file.
        value: A dataclass of JSON values, tuples and further dataclasses.
        version: The ``format_version``.
    """
    write_json(path, sealed(json.loads(json.dumps(asdict(value), allow_nan=False)), version))


def load(path: str | Path, schema: type[T], *, kind: str, version: int, remedy: str = REMEDY) -> T:
    """Read a dataclass that `save` wrote, and check every key, type and range.

    Args:
        path: The file.
        schema: The dataclass. Its ``__post_init__`` runs.
        kind: What the file holds, for messages: "results", "training", ...
        version: The ``format_version`` that the caller understands.
        remedy: What to do if it is damaged.

    Raises:
        ArtefactError: The file is missing, damaged, altered, or of another version; a key is
            missing or unknown, or a value has the wrong type or is out of range.
    """
    content = read_json(path, kind=kind, version=version, remedy=remedy)
    what = f"{path} is not a {kind} file of format_version {version}"
    return convert(content, schema, what=what, remedy=remedy)


def convert(content: Any, schema: type[T], *, what: str, remedy: str = REMEDY) -> T:
    """JSON values as a dataclass, every key and type checked, in nested ones too.

    Args:
        content: What was read.
        schema: The dataclass. Its ``__post_init__`` runs.
        what: What is wrong if it is not one, for the message.
        remedy: What to do then.

    Raises:
        ArtefactError: A key is missing or unknown, or a value has the wrong type or is out of
            range.
    """
    try:
        value = msgspec.convert(content, schema, str_keys=True)
    except (msgspec.ValidationError, VitcutError) as error:
        problem = str(error)
    else:
        # msgspec replaces a missing key by its default and drops an unknown one. `save` writes
        # every key, so what it would write now shows which ones are missing or unknown.
        expected = json.loads(json.dumps(asdict(cast("DataclassInstance", value))))
        problem = next(_odd_values(content, expected), None)
        if problem is None:
            return value
    raise ArtefactError(f"{what}: {problem}; {remedy}")


def _odd_values(found: Any, expected: Any, place: str = "$") -> Iterator[str]:
    """Name every key that only one of two JSON values has, and numbers that are out of range."""
    if isinstance(found, dict):
        for key in {**expected, **found}:
            if key in found and key in expected:
                yield from _odd_values(found[key], expected[key], f"{place}.{key}")
            else:
                yield f"{'unknown' if key in found else 'missing'} field `{key}` - at `{place}`"
    elif isinstance(found, list):
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from _odd_values(one, other, f"{place}[{number}]")
    elif isinstance(found, (int, float)) and not -_LARGEST < found < _LARGEST:
        yield f"a number that is out of range - at `{place}`"


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


def seal_file(path: Path) -> None:
    """Put the hash of a whole file where `UNSEALED` stands in it."""
    content = path.read_bytes()
    own = hashlib.sha256(content).hexdigest()
    path.write_bytes(content.replace(UNSEALED.encode(), own.encode()))


def is_sealed(path: Path, own: str) -> bool:
    """Whether a file is the one that `seal_file` put this hash into."""
    if len(own) != len(UNSEALED):
        return False
    unsealed = path.read_bytes().replace(own.encode(), UNSEALED.encode())
    return hashlib.sha256(unsealed).hexdigest() == own


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(content: Any) -> str:
    """The SHA-256 of a JSON value; the order of keys does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of_read(content: Any) -> str | None:
    """The SHA-256 of a value that was read; None if it is not one that JSON can hold."""
    try:
        return sha256_json(content)
    except (ValueError, TypeError, RecursionError):
        return None
