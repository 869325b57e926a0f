"""A run directory: where its files are, and whether it belongs to the settings at hand.

What the files hold is left to those who write them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vitcut.errors import ArtefactError
from vitcut.store import write_text

_WRITTEN_FIRST = {"config.yaml", "origin.json", "training.json"}
"""What stands there before any work is done: settings that proved wrong may be mended."""

_WITHOUT_EFFECT = ("discover.memory_gib", "discover.precision", "cut.memory_gib")
"""Settings that change no result: a run may be continued with others."""


class RunFolder:
    """The files of one run: checked first, claimed when there is something to write."""

    def __init__(self, path: Path, settings: dict[str, Any], *, free: tuple[str, ...] = ()) -> None:
        """Look at a folder for a run of these settings; nothing is written.

        Args:
            path: The folder; it need not exist.
            settings: Everything that the run's files depend on.
            free: Keys that may differ from those of an earlier run in the folder.

        Raises:
            ArtefactError: It holds something else, or a run of other settings.
        """
        self.path = path
        self._settings = settings
        self._free = {*free, *_WITHOUT_EFFECT}
        names = {item.name for item in path.iterdir()} if path.is_dir() else set[str]()
        found = {name for name in names if not name.endswith(".part")}
        self.begun = bool(found - _WRITTEN_FIRST)
        if self.config.exists():
            if self.begun:
                self._require_same()
        elif self.path.is_file() or found:
            raise ArtefactError(
                f"{self.path} is not empty and no run of vitcut: choose another --out"
            )

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def dense(self) -> Path:
        """The trained dense model."""
        return self.path / "dense"

    @property
    def results(self) -> Path:
        """What was measured; there when the run is complete."""
        return self.path / "results.json"

    def point(self, name: str) -> Path:
        """The folder of one point."""
        return self.path / "points" / name

    def claim(self) -> None:
        """Write the settings down; from now on the folder is this run's."""
        if not self.begun or not self.config.exists():
            write_text(self.config, yaml.safe_dump(self._settings, sort_keys=False))

    def _require_same(self) -> None:
        try:
            earlier = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ArtefactError(f"{self.config} is not readable: {reason}") from None
        if not isinstance(earlier, dict):
            raise ArtefactError(f"{self.config} is no run's settings: choose another --out")
        for key, (was, now) in differences(earlier, self._settings).items():
            if key in self._free:
                continue
            raise ArtefactError(
                f"{self.path} holds a run of other settings: {key} was {was!r}, now {now!r}; "
                "choose another --out"
            )


def choose_point(found: Mapping[str, Path], name: str | None, path: Path) -> Path:
    """The point that a name means, or the only one there is.

    Args:
        found: At least one, by name.
        name: Which; None takes the only one.
        path: The run directory, for the message.

    Raises:
        ArtefactError: There is no such point, or several and ``name`` does not choose.
    """
    if name is None and len(found) > 1:
        raise ArtefactError(f"{path} has {len(found)} points: choose --point {', '.join(found)}")
    chosen = next(iter(found)) if name is None else name
    if chosen not in found:
        raise ArtefactError(f"{path} has no point {chosen!r}: it has {', '.join(found)}")
    return found[chosen]


def differences(earlier: Any, settings: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two settings differ: by dotted key, what was and what is."""
    if isinstance(earlier, dict) and isinstance(settings, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**earlier, **settings}:
            name = f"{prefix}.{key}" if prefix else str(key)
            found |= differences(earlier.get(key), settings.get(key), name)
        return found
    return {} if earlier == settings else {prefix: (earlier, settings)}
