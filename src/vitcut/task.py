"""A task: fine classes and the coarse groups they belong to. Knows no images and no model.

What a label file may say stands here too; which class a person means is left to `labels`.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml
from numpy.typing import NDArray

from vitcut.errors import TaskError
from vitcut.labels import Labels

_WAYS = ("groups", "classes", "one")
_ENTRIES = ("name", "source", "excluded", "rest", *_WAYS)
_IGNORE = "ignore"
_REST = "other"
"""What the rest is called where one class stands against it."""


@dataclass(frozen=True, kw_only=True)
class TaskClass:
    """One fine class."""

    id: str
    """What the model and the data call it; a WordNet id for ImageNet's. Before `Task.among`: how it
    was written, which may be a position or a name."""
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
    rest: str | None = None
    """The group of all classes that are not named; None: they are ignored."""

    def __post_init__(self) -> None:
        _check(self)

    def among(self, labels: Labels) -> "Task":
        """This task with its classes called by their ids, and the rest listed where it counts.

        Where that was done, doing it again changes nothing.

        Args:
            labels: The classes of the model, or of the data.

        Raises:
            TaskError: A class is not among the labels, is named twice, or could be several.
        """
        positions = {item.id: labels.find(item.id) for item in self.classes}
        unknown = [written for written, position in positions.items() if position is None]
        if unknown:
            raise TaskError(unknown_classes(self.name, unknown, labels))
        found: dict[str, TaskClass] = {}
        for item in self.classes:
            at = positions[item.id] or 0
            class_id = labels.ids[at]
            if class_id in found:
                raise TaskError(
                    f"task {self.name!r} names class {class_id} twice, as {item.id!r} in group "
                    f"{item.group!r} and in group {found[class_id].group!r}: name it once"
                )
            name = labels.names[at] if item.name == item.id else item.name
            found[class_id] = TaskClass(id=class_id, name=name, group=item.group)
        if self.rest is not None:
            left = set(labels.ids) - found.keys() - self.excluded.keys()
            for class_id, name in zip(labels.ids, labels.names, strict=True):
                if class_id in left:
                    found[class_id] = TaskClass(id=class_id, name=name, group=self.rest)
            if self.rest not in {item.group for item in found.values()}:
                raise TaskError(
                    f"task {self.name!r} names all classes of {labels.owner}, so that none is left "
                    f"for {self.rest!r}: leave out 'rest', or name fewer"
                )
        return replace(self, classes=tuple(found[key] for key in sorted(found)))

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
        # Named only where it was given: run directories of before knew none.
        rest = {} if self.rest is None else {"rest": self.rest}
        groups = {group: listed for group, listed in members.items() if listed}
        return {"name": self.name, "excluded": dict(self.excluded), **rest, "groups": groups}


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
    class without a name is called as it was written, until `Task.among` knows better.

    Raises:
        TaskError: The text is not a label file.
    """
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise TaskError(f"{origin} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise TaskError(f"{origin} is no label file: expected 'groups: {{group: {{id: name}}}}'")
    _refuse_unknown_entries(content, origin)
    groups = _groups(content, origin)
    excluded = content.get("excluded") or {}
    if not isinstance(excluded, dict):
        raise TaskError(f"{origin} is no label file: expected 'excluded: {{id: reason}}'")
    rest = content.get("rest", _REST if "one" in content else _IGNORE)
    if not isinstance(rest, str) or not rest:
        raise TaskError(f"{origin}: 'rest' must be a group's name or {_IGNORE!r}, got {rest!r}")
    classes = [
        TaskClass(id=written, name=name or written, group=group)
        for group, members in groups.items()
        for written, name in members
    ]
    counted = [] if rest == _IGNORE or rest in groups else [rest]
    return Task(
        name=str(content.get("name") or Path(origin).stem),
        classes=tuple(sorted(classes, key=lambda item: item.id)),
        groups=(*groups, *counted),
        excluded={str(key): str(reason) for key, reason in excluded.items()},
        rest=None if rest == _IGNORE else rest,
    )


def shipped_tasks() -> tuple[str, ...]:
    """The names of the label files that come with vitcut."""
    folder = resources.files("vitcut") / "assets" / "tasks"
    return tuple(sorted(Path(item.name).stem for item in folder.iterdir()))


def unknown_classes(name: str, unknown: list[str], labels: Labels) -> str:
    """The message for classes that are not there: which, what is near, and how to name one."""
    listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    near = next((near for near in map(labels.nearest, unknown) if near), list(labels.ids[:3]))
    return (
        f"task {name!r} names {len(unknown)} classes that {labels.owner} lacks: {listed}; "
        f"{labels.owner} has {len(labels.ids)} classes, such as {', '.join(near)}: mend the label "
        f"file (ids, positions 0 to {len(labels.ids) - 1}, or names), or take another source"
    )


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
        if members[group] == 0 and group != task.rest:
            raise TaskError(
                f"task {task.name!r}: group {group!r} is empty: name a class or drop it"
            )


def _groups(content: dict[str, Any], origin: str) -> dict[str, list[tuple[str, str]]]:
    """What a label file names: by group, the classes as they are written, with their names."""
    given = [way for way in _WAYS if way in content]
    if len(given) > 1:
        raise TaskError(
            f"{origin} has {' and '.join(repr(way) for way in given)}: expected one of them"
        )
    if given == ["one"]:
        one = content["one"]
        if not isinstance(one, str) or not one:
            raise TaskError(f"{origin}: 'one' must be a class, got {one!r}")
        return {one: [(one, "")]}
    if given == ["classes"]:
        return _groups_of_one(_members(content["classes"]), origin)
    groups = content.get("groups")
    found = (
        {key: _members(value) for key, value in groups.items()} if _is_dict(groups) else {"": None}
    )
    members = {str(key): listed for key, listed in found.items() if listed is not None}
    if len(members) < len(found):
        raise TaskError(
            f"{origin} is no label file: expected 'groups: {{group: {{id: name}}}}' or "
            "'groups: {group: [class, ...]}'"
        )
    return members


def _groups_of_one(
    members: list[tuple[str, str]] | None, origin: str
) -> dict[str, list[tuple[str, str]]]:
    if members is None:
        raise TaskError(
            f"{origin} is no label file: expected 'classes: [class, ...]' or "
            "'classes: {id: name}'"
        )
    called = Counter(name or written for written, name in members)
    for name, count in called.items():
        if count > 1:
            raise TaskError(f"{origin}: {count} classes are called {name!r}: expected one of each")
    return {name or written: [(written, name)] for written, name in members}


def _members(listed: Any) -> list[tuple[str, str]] | None:
    """Classes as they are written, with their names where they are given; None if malformed."""
    if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
        return [(item, "") for item in listed]
    if _is_dict(listed) and all(isinstance(item, str) for item in (*listed, *listed.values())):
        return list(listed.items())
    return None


def _is_dict(value: Any) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def _refuse_unknown_entries(content: dict[Any, Any], origin: str) -> None:
    for entry in content:
        if entry not in _ENTRIES:
            near = get_close_matches(str(entry), _ENTRIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_ENTRIES)}"
            raise TaskError(f"{origin} is no label file: unknown entry {entry!r}, {hint}")


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
