"""A label file to begin with: the classes of some data that are ImageNet's, grouped by WordNet."""

from pathlib import Path

import yaml

from vitcut.errors import ConfigError
from vitcut.images.drawn import SOURCE_WORD
from vitcut.images.settings import DataSettings
from vitcut.images.sources import open_source
from vitcut.store import write_text
from vitcut.suggest import suggest
from vitcut.task import Task

_HEADER = "# Groups suggested by WordNet 3.0 ancestors: look through them, and edit.\n"


def suggest_command(data: DataSettings, groups: int, out: Path) -> Task:
    """Group a source's classes into a label file; no image is decoded.

    Raises:
        TaskError: Fewer than two classes of the source are ImageNet-1k's.
        ConfigError: ``out`` is there already, or there cannot be as many groups.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: choose another --out, or move it away")
    if data.source == SOURCE_WORD:
        raise ConfigError(f"{SOURCE_WORD} pictures have a label file: give --task {SOURCE_WORD}")
    with open_source(data.source) as source:
        class_ids = sorted(source.class_names)
    task = suggest(class_ids, groups, out.stem)
    text = yaml.safe_dump(task.to_dict(), sort_keys=False, allow_unicode=True)
    write_text(out, _HEADER + text)
    return task
