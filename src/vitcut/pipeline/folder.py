"""A run directory: where its files are, and whether it belongs to the settings at hand.

What the files hold is left to those who write them.
"""

from pathlib import Path
from typing import Any

import yaml

from vitcut.errors import ArtefactError
from vitcut.files import write_text


class RunFolder:
    """The files of one run: checked first, claimed when there is something to write."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Look at a folder for a run of these settings; nothing is written.

        Raises:
            ArtefactError: It holds something else, or a run of other settings.
        """
        self.path = path
        self._settings = settings
        if self.config.exists():
            self._require_same()
        elif self.path.is_file() or (self.path.exists() and any(self.path.iterdir())):
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
        if not self.config.exists():
            write_text(self.config, yaml.safe_dump(self._settings, sort_keys=False))

    def _require_same(self) -> None:
        try:
            earlier = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ArtefactError(f"{self.config} is not readable: {reason}") from None
        if not isinstance(earlier, dict):
            raise ArtefactError(f"{self.config} is no run's settings: choose another --out")
        for key, (was, now) in _differences(earlier, self._settings).items():
            raise ArtefactError(
                f"{self.path} holds a run of other settings: {key} was {was!r}, now {now!r}; "
                "choose another --out"
            )


def _differences(earlier: Any, settings: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(earlier, dict) and isinstance(settings, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**earlier, **settings}:
            name = f"{prefix}.{key}" if prefix else str(key)
            found |= _differences(earlier.get(key), settings.get(key), name)
        return found
    return {} if earlier == settings else {prefix: (earlier, settings)}
