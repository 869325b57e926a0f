"""Tasks: fine classes in coarse groups, and the label files that describe them."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from vitcut.errors import TaskError, one_line
from vitcut.labels import Labels

_FORMS = ("groups", "classes", "one")
_ENTRIES = ("name", "source", "excluded", "rest", *_FORMS)
_IGNORE = "ignore"


@dataclass(frozen=True, kw_only=True)
class TaskClass:
    """One fine class."""

    id: str
    """What the model and the data call it; a WordNet id for ImageNet's classes. Before `Task.among`
    it may also be a position or a name, as written in the label file."""
    name: str
    """Name for people."""
    group: str
    """The coarse group of the class."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Fine classes, numbered by sorted id, in groups, numbered in the order of the label file."""

    name: str
    classes: tuple[TaskClass, ...]
    groups: tuple[str, ...]
    excluded: dict[str, str] = field(default_factory=dict[str, str])
    """Ids that were left out on purpose, with the reason."""
    rest: str | None = None
    """The group of all classes that the task does not name; None ignores them."""

    def __post_init__(self) -> None:
        owner = f"task {self.name!r}"
        if len(self.groups) < 2:
            raise TaskError(f"{owner} needs at least 2 groups, got {len(self.groups)}")
        for group, count in Counter(self.groups).items():
            if count > 1:
                raise TaskError(f"{owner} lists group {group!r} {count} times, expected once")
        for class_id, count in Counter(self.class_ids).items():
            if count > 1:
                listed = ", ".join(item.group for item in self.classes if item.id == class_id)
                raise TaskError(f"{owner}: class {class_id} is in {count} groups: {listed}")
        if list(self.class_ids) != sorted(self.class_ids):
            raise TaskError(f"{owner}: the classes are not sorted by id: sort them")
        sizes = Counter(item.group for item in self.classes)
        for group in sorted(sizes.keys() - set(self.groups)):
            raise TaskError(
                f"{owner} has a class in group {group!r}, expected one of "
                f"{', '.join(self.groups)}: add the group, or correct the class"
            )
        for group in self.groups:
            if sizes[group] == 0 and group != self.rest:
                raise TaskError(f"{owner}: group {group!r} is empty: add a class or remove it")

    def among(self, labels: Labels) -> "Task":
        """Look up the classes of this task in the classes of a model or of data.

        Returns:
            The task with ids in place of positions and names, and with the rest, if it has one,
            listed class by class. Looking it up again changes nothing.

        Raises:
            TaskError: A class is unknown, ambiguous or named twice, or no class is left for the
                rest.
        """
        positions = {item.id: labels.find(item.id) for item in self.classes}
        unknown = [written for written, position in positions.items() if position is None]
        if unknown:
            raise TaskError(unknown_classes(self.name, unknown, labels))
        found: dict[str, TaskClass] = {}
        for item in self.classes:
            position = positions[item.id] or 0
            class_id = labels.ids[position]
            if class_id in found:
                raise TaskError(
                    f"task {self.name!r} names class {class_id} twice, as {item.id!r} in group "
                    f"{item.group!r} and in group {found[class_id].group!r}: name it once"
                )
            name = labels.names[position] if item.name == item.id else item.name
            found[class_id] = TaskClass(id=class_id, name=name, group=item.group)
        if self.rest is not None:
            named = found.keys() | self.excluded.keys()
            for class_id, name in zip(labels.ids, labels.names, strict=True):
                if class_id not in named:
                    found[class_id] = TaskClass(id=class_id, name=name, group=self.rest)
            if self.rest not in {item.group for item in found.values()}:
                raise TaskError(
                    f"task {self.name!r} names all classes of {labels.owner} and leaves none for "
                    f"{self.rest!r}: remove 'rest', or name fewer classes"
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
        """The content of a label file for this task."""
        members = {
            group: {item.id: item.name for item in self.classes if item.group == group}
            for group in self.groups
        }
        # Without a rest there is no entry: run directories of earlier versions have none either.
        rest = {} if self.rest is None else {"rest": self.rest}
        groups = {group: listed for group, listed in members.items() if listed}
        return {"name": self.name, "excluded": dict(self.excluded), **rest, "groups": groups}


def all_classes_task(labels: Labels) -> Task:
    """Make the task that tells all classes apart: each is a group of its own.

    Groups are in the order of the sorted ids, and are named like their classes. Where several
    classes share a name, the id is added.

    Raises:
        TaskError: There are fewer than two classes.
    """
    shared = {name for name, count in Counter(labels.names).items() if count > 1}
    classes = tuple(
        TaskClass(id=key, name=name, group=f"{name} ({key})" if name in shared else name)
        for key, name in sorted(zip(labels.ids, labels.names, strict=True))
    )
    return Task(name="all", classes=classes, groups=tuple(item.group for item in classes))


def load_task(name_or_path: str | Path) -> Task:
    """Load a shipped task by name ("animals"), or a label file by path.

    Raises:
        TaskError: There is no such task, or the label file is malformed.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"cannot read the label file {path}: {error}") from None
        return parse_task(text, origin=str(path))
    name = str(name_or_path)
    if name not in shipped_tasks():
        raise TaskError(
            f"no task named {name!r}: expected the path of a .yaml label file, or one of "
            f"{', '.join(shipped_tasks())}"
        )
    resource = resources.files("vitcut") / "assets" / "tasks" / f"{name}.yaml"
    return parse_task(resource.read_text(encoding="utf-8"), origin=f"{name}.yaml")


def shipped_tasks() -> tuple[str, ...]:
    """The names of the label files that come with vitcut."""
    folder = resources.files("vitcut") / "assets" / "tasks"
    return tuple(sorted(Path(item.name).stem for item in folder.iterdir()))


def parse_task(text: str, *, origin: str) -> Task:
    """Parse a label file.

    Ids stay as written: ``007`` is not a number, and ``no`` is not a truth value. A class without a
    name is called as it is written, until `Task.among` knows better.

    Args:
        text: YAML with one of the entries "groups", "classes" and "one".
        origin: The file, for messages.

    Raises:
        TaskError: The text is not a label file.
    """
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise TaskError(f"{origin} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise TaskError(f"{origin} is not a label file: expected 'groups: {{group: {{id: name}}}}'")
    for entry in content:
        if entry not in _ENTRIES:
            near = get_close_matches(str(entry), _ENTRIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_ENTRIES)}"
            raise TaskError(f"{origin} is not a label file: unknown entry {entry!r}, {hint}")
    groups = _groups(content, origin)
    excluded = content.get("excluded") or {}
    if not isinstance(excluded, dict):
        raise TaskError(f"{origin} is not a label file: expected 'excluded: {{id: reason}}'")
    rest = content.get("rest", "other" if "one" in content else _IGNORE)
    if not isinstance(rest, str) or not rest:
        raise TaskError(f"{origin}: 'rest' must be a group's name or {_IGNORE!r}, got {rest!r}")
    classes = [
        TaskClass(id=written, name=name or written, group=group)
        for group, members in groups.items()
        for written, name in members
    ]
    return Task(
        name=str(content.get("name") or Path(origin).stem),
        classes=tuple(sorted(classes, key=lambda item: item.id)),
        groups=tuple(groups) if rest == _IGNORE or rest in groups else (*groups, rest),
        excluded={str(key): str(reason) for key, reason in excluded.items()},
        rest=None if rest == _IGNORE else rest,
    )


def unknown_classes(name: str, unknown: list[str], labels: Labels) -> str:
    """The message for classes of a task that a model or data do not have.

    Args:
        name: Of the task.
        unknown: The classes, as written.
        labels: The classes that exist.
    """
    listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    near = next((near for near in map(labels.nearest, unknown) if near), list(labels.ids[:3]))
    # Only a model can be taught classes that it lacks.
    taught = ", or train it for your classes (vitcut train --model)"
    return (
        f"task {name!r} names {len(unknown)} classes that {labels.owner} lacks: {listed}; "
        f"{labels.owner} has {len(labels.ids)} classes, such as {', '.join(near)}: correct the "
        f"label file (ids, positions 0 to {len(labels.ids) - 1}, or names), or use another source"
        f"{taught if labels.owner.startswith('model ') else ''}"
    )


def _groups(content: dict[Any, Any], origin: str) -> dict[str, list[tuple[str, str]]]:
    """The classes of each group, as written, with their names, which may be empty."""
    forms = [form for form in _FORMS if form in content]
    if len(forms) > 1:
        raise TaskError(f"{origin} has {' and '.join(map(repr, forms))}: expected one of them")
    if forms == ["one"]:
        one = content["one"]
        if not isinstance(one, str) or not one:
            raise TaskError(f"{origin}: 'one' must be a class, got {one!r}")
        return {one: [(one, "")]}
    if forms == ["classes"]:
        expected = "'classes: [class, ...]' or 'classes: {id: name}'"
        members = _members(content["classes"], origin, expected)
        names = [name or written for written, name in members]
        for name, count in Counter(names).items():
            if count > 1:
                raise TaskError(f"{origin}: {count} classes are called {name!r}: expected one")
        return {name: [member] for name, member in zip(names, members, strict=True)}
    expected = "'groups: {group: {id: name}}' or 'groups: {group: [class, ...]}'"
    groups = content.get("groups")
    if not isinstance(groups, dict):
        raise TaskError(f"{origin} is not a label file: expected {expected}")
    return {str(group): _members(listed, origin, expected) for group, listed in groups.items()}


def _members(listed: Any, origin: str, expected: str) -> list[tuple[str, str]]:
    if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
        return [(item, "") for item in listed]
    if isinstance(listed, dict) and all(
        isinstance(item, str) for pair in listed.items() for item in pair
    ):
        return list(listed.items())
    raise TaskError(f"{origin} is not a label file: expected {expected}")


class _UniqueKeyLoader(yaml.BaseLoader):
    """Refuses duplicate keys, of which YAML keeps the last one silently, and reads scalars as text.

    YAML 1.1 would read the class id 010 as 8, and no as False.
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
