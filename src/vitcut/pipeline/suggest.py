"""A label file to begin with: the classes of some data that are ImageNet's, grouped by WordNet."""

from pathlib import Path

import yaml

from vitcut.errors import ConfigError, TaskError
from vitcut.images.drawn import SOURCE_WORD
from vitcut.images.settings import DataSettings
from vitcut.images.sources import open_source
from vitcut.store import write_text
from vitcut.task import Task, TaskClass
from vitcut.wordnet import imagenet_names, suggest_groups

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
    known = [class_id for class_id in class_ids if class_id in imagenet_names()]
    if len(known) < 2:
        raise TaskError(
            f"{len(known)} of the data's {len(class_ids)} classes, such as {class_ids[0]!r}, are "
            "called by WordNet ids of ImageNet-1k, expected 2 or more: write a label file by hand"
        )
    named = suggest_groups(known, groups)
    group_of = {class_id: name for name, members in named.items() for class_id in members}
    task = Task(
        name=out.stem,
        classes=tuple(
            TaskClass(
                id=class_id,
                name=imagenet_names()[class_id].split(",")[0],
                group=group_of[class_id],
            )
            for class_id in known
        ),
        groups=tuple(named),
        excluded=dict.fromkeys(sorted(set(class_ids) - set(known)), "not ImageNet-1k's"),
    )
    text = yaml.safe_dump(task.to_dict(), sort_keys=False, allow_unicode=True)
    write_text(out, _HEADER + text)
    return task
