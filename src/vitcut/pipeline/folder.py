"""A run directory: where its files are, and whether it belongs to the settings at hand."""

from pathlib import Path
from typing import Any

import yaml

from vitcut.errors import ArtefactError
from vitcut.files import write_text


class RunFolder:
    """The files of one run; made when opened, and opened again to go on."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

    def open(self, settings: dict[str, Any]) -> None:
        """Claim the folder for these settings, or continue an earlier run of the same.

        Raises:
            ArtefactError: It holds something else, or a run of other settings.
        """
        if self.config.exists():
            self._require_same(settings)
        elif self.path.is_file() or (self.path.exists() and any(self.path.iterdir())):
            raise ArtefactError(
                f"{self.path} is not empty and no run of vitcut: choose another --out"
            )
        else:
            write_text(self.config, yaml.safe_dump(settings, sort_keys=False))

    def _require_same(self, settings: dict[str, Any]) -> None:
        try:
            earlier = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ArtefactError(f"{self.config} is not readable: {reason}") from None
        for key, (was, now) in _differences(earlier, settings).items():
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
