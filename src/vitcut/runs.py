"""A run directory: its settings, and work that is done once and read back afterwards."""

import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakValueDictionary

import yaml

from vitcut.errors import ArtefactError, one_line
from vitcut.progress import say
from vitcut.settings import require_utf8
from vitcut.store import is_leftover, lock_folder, sealed, sweep, unlock, unsealed, write_text

CONFIG_FILE, RESULTS_FILE, REPAIR_FILE = "config.yaml", "results.json", "repair.json"
DIFFERENCE_FILE = "difference.json"
TRAINING_FILE, REPORT_FILE, PICTURES_FILE = "training.json", "report.html", "pictures.json"
CIRCUIT_FILE, PATH_FILE = "circuit.json", "path.json"
_VERSION = 3
_REMEDY = "restore it, or choose another --out"
_PATIENCE_S = 2
_WITHOUT_EFFECT = {
    "discover.memory_gib", "discover.precision", "cut.memory_gib",
    "images.image_column", "images.label_column",
}  # fmt: skip
"""Settings that change no result: a run may be continued with others. Columns that do change what
is read change the fingerprint of the images."""


@runtime_checkable
class Kept(Protocol):
    """What a run directory keeps."""

    def save(self, path: Path, /) -> None:
        """Write it, so that it is there as a whole or not at all."""


T = TypeVar("T", bound=Kept)


class _Lock:
    """A run directory in use by this process, until nothing refers to it any more."""

    @classmethod
    def of(cls, folder: Path) -> "_Lock":
        """Lock a directory, which is created if need be, and sweep it.

        Raises:
            ArtefactError: Another process works in it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        place = folder.resolve()
        with _LOCKING:
            lock = _HELD.get(place)
            if lock is None:
                lock, opened = cls(), cls._open(place, folder)
                weakref.finalize(lock, unlock, opened)
                if opened is None:
                    _say_unlocked()
                # Before any other thread of this process writes there.
                sweep(place, deep=True)
                _HELD[place] = lock
            return lock

    @staticmethod
    def _open(place: Path, folder: Path) -> int | None:
        for patience in range(_PATIENCE_S, -1, -1):
            try:
                return lock_folder(place, wait=False)
            except BlockingIOError:
                # Another one may only be ending, or looking whether it is in use.
                if patience:
                    time.sleep(1)
        raise ArtefactError(
            f"{folder} is in use by another process: wait for it to end, or choose another --out"
        )


@cache
def _say_unlocked() -> None:
    say(
        "warning: this system, or its file system, has no file locks: start no second command in "
        "one run directory, and delete what ends in .part after a kill"
    )


_LOCKING = threading.Lock()
_HELD: WeakValueDictionary[Path, _Lock] = WeakValueDictionary()


def is_in_use(folder: Path) -> bool:
    """Whether another process works in a run directory."""
    place = folder.resolve()
    if place in _HELD:
        return False
    try:
        opened = lock_folder(place, wait=False)
    except BlockingIOError:
        return True
    unlock(opened)
    return False


class Run:
    """One directory of results.

    Only ``once`` asks whether something is there. A command that was killed is typed again and
    does what is still to be done.

    Attributes:
        path: The directory.
        is_temporary: Whether it is deleted with this value.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """Look at a directory; nothing is written before ``claim``.

        Args:
            path: The directory, which need not exist; None takes a temporary one.

        Raises:
            ArtefactError: It holds something else than a run.
        """
        self.is_temporary = path is None
        self.path = Path(mkdtemp(prefix="vitcut-") if path is None else path)
        require_utf8("out", self.path)
        if path is None:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        if (self.path.is_file() or self._names()) and not (self.path / CONFIG_FILE).exists():
            raise ArtefactError(
                f"{self.path} is not empty and holds no run of vitcut: choose another --out"
            )

    def claim(self, settings: Mapping[str, Any], *, free: tuple[str, ...] = ()) -> None:
        """Write the settings down; from now on the directory is this run's.

        Args:
            settings: Everything that the results depend on, as JSON values.
            free: Dotted keys that may differ from those of an earlier run in the directory.

        Raises:
            ArtefactError: The directory holds results of other settings, or another process works
                in it.
        """
        # Of processes that train together, only the first one locks, sweeps and writes.
        if int(os.environ.get("RANK", "0")) == 0:
            self._lock = _Lock.of(self.path)
        config = self.path / CONFIG_FILE
        # Settings may be corrected as long as there are no results of theirs.
        if config.exists() and self._names() - {CONFIG_FILE, TRAINING_FILE}:
            differing = differences(read_settings(self.path), settings)
            if not differing:
                return
            for key, (was, now) in differing.items():
                if key in _WITHOUT_EFFECT or any(f"{key}.".startswith(f"{name}.") for name in free):
                    continue
                if key in {"images.fingerprint", "model.weight_hash"}:
                    what = "images or another label file" if key.startswith("images") else "weights"
                    raise ArtefactError(
                        f"{self.path} was begun with other {what} (the hash differs): choose "
                        "another --out"
                    )
                raise ArtefactError(
                    f"{self.path} holds a run of other settings: {key} was {was!r}, now {now!r}; "
                    "choose another --out"
                )
        # A value that occurs twice would become an alias, which is not read again.
        plain = json.loads(json.dumps(sealed(settings, _VERSION)))
        write_text(config, yaml.safe_dump(plain, sort_keys=False))

    def free_bench(self) -> tuple[str, ...]:
        """The timing may be changed, or asked for later, until something was measured."""
        return () if (self.path / RESULTS_FILE).exists() else ("bench",)

    def _names(self) -> set[str]:
        """What lies in the directory, without what a killed process left half-written."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        return {item.name for item in found if not is_leftover(item.name)}

    def once(self, name: str, make: Callable[[], T], load: Callable[[Path], T]) -> T:
        """Do a piece of work, or read back what it came to.

        Args:
            name: Path of the result, relative to the directory.
            make: Does the work.
            load: Reads what ``save`` of the result wrote.

        Raises:
            ArtefactError: What lies there is damaged.
        """
        path = self.path / name
        if path.exists():
            say(f"{path} is there already")
            return load(path)
        value = make()
        value.save(path)
        return value

    def kept(self, name: str) -> Path | None:
        """Where something stays; None in a temporary directory, where nothing does."""
        return None if self.is_temporary else self.path / name


def is_run(folder: Path) -> bool:
    """Whether a directory is a run of this or another version; others have a config.yaml too."""
    try:
        with (folder / CONFIG_FILE).open(encoding="utf-8") as file:
            own = any(line.startswith("format_version:") for line in file)
    except (OSError, UnicodeDecodeError):
        return False
    return own or (folder / "origin.json").is_file()


def find_run(path: str | Path) -> Path | None:
    """The run directory that a path is or lies in; None where there is none."""
    start = Path(path)
    around = (start, *start.resolve().parents) if start.exists() else ()
    return next((folder for folder in around if is_run(folder)), None)


def find_circuit(path: Path, point: str | None) -> Path:
    """The circuit.json that a path means: itself, or that of a run directory's point or model.

    Raises:
        ArtefactError: There is none, or several and ``point`` does not choose.
    """
    if path.is_file():
        return path
    found = circuits_in(path)
    if point is not None:
        # Those on the way to a budget are found by name only.
        found |= {item.parent.name: item for item in sorted(path.glob(f"path/*/{CIRCUIT_FILE}"))}
    own = path / "model" / CIRCUIT_FILE
    if point is None and not found and own.exists():
        return own
    if not found:
        raise ArtefactError(
            f"no circuit at {path}: expected a circuit.json, or a run directory with points"
        )
    return _choose_point(found, point, path)


def circuits_in(run: Path) -> dict[str, Path]:
    """The circuit of each point of a run directory: as it was found, else as it was cut."""
    files = [*run.glob(f"points/*/model/{CIRCUIT_FILE}"), *run.glob(f"points/*/{CIRCUIT_FILE}")]
    found = {item.relative_to(run).parts[1]: item for item in files}
    return dict(sorted(found.items()))


def find_cut(path: Path, point: str | None) -> Path:
    """The model directory that a path means: itself, or that of a run directory or its point.

    Raises:
        ArtefactError: There is none, or several and ``point`` does not choose.
    """

    def is_model(folder: Path) -> bool:
        return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()

    if point is None:
        for folder in (path / "model", path):
            if is_model(folder):
                return folder
    points = filter(is_model, sorted(path.glob("points/*/model")))
    found = {folder.parent.name: folder for folder in points}
    if not found:
        raise ArtefactError(
            f"no compact model at {path}: expected a run directory that `vitcut cut` wrote, or a "
            "model directory with config.json and model.safetensors"
        )
    return _choose_point(found, point, path)


def has_cut(path: Path) -> bool:
    """Whether a run, point or model directory holds a compact model."""

    def is_compact(folder: Path) -> bool:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(config, dict) and "plan" in config

    return any(map(is_compact, (path / "model", path, *path.glob("points/*/model"))))


def _choose_point(found: Mapping[str, Path], point: str | None, path: Path) -> Path:
    if point is None and len(found) > 1:
        raise ArtefactError(f"{path} has {len(found)} points: choose --point {', '.join(found)}")
    chosen = next(iter(found)) if point is None else point
    if chosen not in found:
        raise ArtefactError(f"{path} has no point {chosen!r}: it has {', '.join(found)}")
    return found[chosen]


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of a run directory.

    Raises:
        ArtefactError: They are damaged, or of another version of vitcut.
    """
    path = run / CONFIG_FILE
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ArtefactError(f"{path} is not readable: {one_line(error)}; {_REMEDY}") from None
    if not isinstance(settings, dict) or settings.get("format_version") != _VERSION:
        raise ArtefactError(
            f"{run} is not a run directory of this version of vitcut (another version or another "
            "program wrote it): run its command again in a new directory"
        )
    return unsealed(settings, path, kind="run", version=_VERSION, oldest=_VERSION, remedy=_REMEDY)


class _Plain(yaml.SafeLoader):
    """YAML without aliases, as it is written here: they let a short file stand for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias, which no settings have")
        return super().compose_node(parent, index)


def differences(was: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two settings differ: by dotted key, what was and what is."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**was, **now}:
            name = f"{prefix}.{key}" if prefix else str(key)
            found |= differences(was.get(key), now.get(key), name)
        return found
    return {} if was == now else {prefix: (was, now)}
