"""Atomic, hashed and versioned files; what is in them is left to their owners. Never pickle."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitcut.errors import ArtefactError

_ABANDONED_AFTER_S = 3600


def cache_dir() -> Path:
    """The folder for prepared data: ``$VITCUT_CACHE``, else ``~/.cache/vitcut``."""
    chosen = os.environ.get("VITCUT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "vitcut"


@contextmanager
def atomic_path(path: str | Path) -> Generator[Path]:
    """Yield a temporary file beside ``path`` that takes its name when the block succeeds.

    Whoever reads ``path`` sees the old content or the whole new one, after a kill too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = True) -> Generator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its name when the block succeeds.

    A folder cannot be replaced in one step: the earlier one is moved aside first, and a process
    that is killed at this moment leaves it there. The next call puts it back, and removes what
    killed processes have left.

    Args:
        folder: What is written.
        replace: Whether to take the place of an earlier folder; else that one stays, and what was
            written is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    _remove_abandoned(folder)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        if replace and folder.exists():
            folder.replace(_aside(folder))
        _take_name(part, folder, replace=replace)
    finally:
        _settle(folder)
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, keys in the given order, NaN refused."""
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


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(content: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of_read(content: Any) -> str | None:
    """The SHA-256 of what was read; None where it holds what JSON has no word for, such as NaN."""
    try:
        return sha256_json(content)
    except ValueError:
        return None


def _take_name(part: Path, folder: Path, *, replace: bool) -> None:
    try:
        part.replace(folder)
    except OSError:
        if replace or not folder.is_dir():
            raise


def _aside(folder: Path) -> Path:
    """Where an earlier folder lies while a new one takes its name."""
    return folder.with_name(f".{folder.name}.old")


def _settle(folder: Path) -> None:
    """Put back an earlier folder that nothing has replaced, remove one that has been replaced."""
    aside = _aside(folder)
    if not folder.exists():
        if aside.exists():
            aside.replace(folder)
    elif aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left; a folder that still changes belongs to a living one."""
    for part in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        if part.is_dir() and time.time() - _last_change(part) > _ABANDONED_AFTER_S:
            shutil.rmtree(part, ignore_errors=True)


def _last_change(part: Path) -> float:
    try:
        return max(item.stat().st_mtime for item in (part, *part.iterdir()))
    except FileNotFoundError:
        return time.time()
