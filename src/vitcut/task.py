"""A task: fine classes and the coarse groups they belong to. Knows no images and no model."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from vitcut.errors import TaskError


@dataclass(frozen=True, kw_only=True)
class TaskClass:
    """One fine class."""

    id: str
    """What the data calls it; a WordNet id for ImageNet's."""
    name: str
    """What a person calls it."""
    group: str
    """The coarse group it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Fine classes, numbered by sorted id, and groups, numbered as the label file lists them."""

    name: str
    classes: tuple[TaskClass, ...]
    groups: tuple[str, ...]
    excluded: dict[str, str] = field(default_factory=dict[str, str])
    """Ids that were considered and left out, with the reason."""

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def class_ids(self) -> tuple[str, ...]:
        """The ids of the fine classes, in order."""
        return tuple(item.id for item in self.classes)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the fine classes, in order."""
        return tuple(item.name for item in self.classes)

    @cached_property
    def group_of_class(self) -> NDArray[np.int64]:
        """The group number of each fine class, shape [classes]."""
        number = {group: i for i, group in enumerate(self.groups)}
        return np.array([number[item.group] for item in self.classes], dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """The content of this task's label file."""
        members = {
            group: {item.id: item.name for item in self.classes if item.group == group}
            for group in self.groups
        }
        return {"name": self.name, "excluded": dict(self.excluded), "groups": members}


def load_task(name_or_path: str | Path) -> Task:
    """Load a shipped task by name ("animals"), or a label file by path.

    Raises:
        TaskError: There is no such task, or the label file is malformed.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        return _load_shipped(str(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read the label file {path}: {error}") from None
    return parse_task(text, origin=str(path))


def parse_task(text: str, *, origin: str) -> Task:
    """Parse a label file; ``origin`` is named in errors.

    Ids are taken as they are written: ``007`` and ``no`` are no numbers and no truth values. A
    class without a name is called by its id.

    Raises:
        TaskError: The text is not a label file.
    """
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise TaskError(f"{origin} is not valid YAML: {_one_line(error)}") from None
    groups = content.get("groups") if isinstance(content, dict) else None
    if not isinstance(groups, dict) or not all(isinstance(m, dict) for m in groups.values()):
        raise TaskError(f"{origin} is no label file: expected 'groups: {{group: {{id: name}}}}'")
    classes = [
        TaskClass(id=str(class_id), name=str(name) or str(class_id), group=str(group))
        for group, members in groups.items()
        for class_id, name in members.items()
    ]
    excluded = content.get("excluded") or {}
    if not isinstance(excluded, dict):
        raise TaskError(f"{origin} is no label file: expected 'excluded: {{id: reason}}'")
    return Task(
        name=str(content.get("name") or Path(origin).stem),
        classes=tuple(sorted(classes, key=lambda item: item.id)),
        groups=tuple(str(group) for group in groups),
        excluded={str(key): str(reason) for key, reason in excluded.items()},
    )


def shipped_tasks() -> tuple[str, ...]:
    """The names of the label files that come with vitcut."""
    folder = resources.files("vitcut") / "assets" / "tasks"
    return tuple(sorted(Path(item.name).stem for item in folder.iterdir()))


def _load_shipped(name: str) -> Task:
    if name not in shipped_tasks():
        raise TaskError(
            f"no task named {name!r}: expected the path of a .yaml label file, or one of "
            f"{', '.join(shipped_tasks())}"
        )
    resource = resources.files("vitcut") / "assets" / "tasks" / f"{name}.yaml"
    return parse_task(resource.read_text(encoding="utf-8"), origin=f"{name}.yaml")


def _check(task: Task) -> None:
    if len(task.groups) < 2:
        raise TaskError(f"task {task.name!r} needs at least 2 groups, got {len(task.groups)}")
    for class_id, count in Counter(task.class_ids).items():
        if count > 1:
            where = ", ".join(item.group for item in task.classes if item.id == class_id)
            raise TaskError(f"task {task.name!r}: class {class_id} is in {count} groups: {where}")
    if list(task.class_ids) != sorted(task.class_ids):
        raise TaskError(
            f"task {task.name!r}: the classes are not in the order of their ids: sort them by id"
        )
    members = Counter(item.group for item in task.classes)
    for group in sorted(members.keys() - set(task.groups)):
        raise TaskError(
            f"task {task.name!r} has a class of group {group!r}, expected one of "
            f"{', '.join(task.groups)}: list the group, or mend the class"
        )
    for group in task.groups:
        if members[group] == 0:
            raise TaskError(
                f"task {task.name!r}: group {group!r} is empty: name a class or drop it"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.BaseLoader):
    """YAML lets a later duplicate key win without a word; a label file must not.

    Every scalar stays text: YAML 1.1 would read the class id 010 as 8, and no as False.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        counts = Counter(key for key in keys if isinstance(key, Hashable))
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]!r} is listed twice", node.start_mark
            )
        return super().construct_mapping(node, deep)
