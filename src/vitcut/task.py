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
from vitcut.labels import Labels, plain_name
from vitcut.store import parse_yaml
from vitcut.wordnet import classes_below, find_synsets, known_synsets, synsets

_FORMS = ("groups", "classes", "one")
_ENTRIES = ("name", "source", "excluded", "rest", "folders", "model", *_FORMS)
_IGNORE = "ignore"
_FOLDERS = "'folders: {group: [folder, ...]}'"


@dataclass(frozen=True, kw_only=True)
class TaskClass:
    """One fine class."""

    id: str
    """What the model and the data call it; a WordNet id for ImageNet's classes. Before `Task.among`
    it may also be a position, a name or a WordNet ancestor, as written in the label file."""
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
    folders: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Ids of the data's classes by group, where these are whole groups (``cat/`` and ``dog/``).
    Empty if the images are labelled with the fine classes."""
    model: dict[str, str] = field(default_factory=dict[str, str])
    """What the model calls a class of the data, by the data's id: the model's id, position or
    name. Classes that are not listed are matched by their own ids and names."""

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
        for group in self.folders.keys() - set(self.groups):
            raise TaskError(
                f"{owner} has folders for {group!r}, expected one of {', '.join(self.groups)}"
            )
        for folder, count in Counter(f for own in self.folders.values() for f in own).items():
            if count > 1:
                listed = ", ".join(group for group, own in self.folders.items() if folder in own)
                raise TaskError(f"{owner}: folder {folder!r} is listed {count} times: {listed}")

    def among(self, labels: Labels) -> "Task":
        """Look up the classes of this task in the classes of a model or of data.

        Returns:
            The task with ids in place of positions and names. A WordNet ancestor is replaced by
            the classes below it, without those that are excluded. The rest, if there is one, is
            listed class by class. Looking the task up again changes nothing.

        Raises:
            TaskError: A class is unknown, ambiguous or named twice, or no class is left for the
                rest.
        """
        positions, above = self._positions_in(labels)
        # What the model or data lack may be left out too.
        left_out = set(self.excluded)
        for written in self.excluded:
            position = labels.find(written)
            places = positions_below(written, labels) if position is None else (position,)
            left_out |= {labels.ids[place] for place in places}
        found: dict[str, TaskClass] = {}
        for item in self.classes:
            for position in positions[item.id]:
                class_id = labels.ids[position]
                if item.id in above and class_id in left_out:
                    continue
                if class_id in found:
                    raise TaskError(
                        f"task {self.name!r} names class {class_id} twice, as {item.id!r} in group "
                        f"{item.group!r} and in group {found[class_id].group!r}: name it once"
                    )
                name = labels.names[position]
                if item.id in above:
                    name = synsets()[class_id].names if name == class_id else name
                elif item.name != item.id:
                    name = item.name
                found[class_id] = TaskClass(id=class_id, name=name, group=item.group)
        if self.rest is not None:
            named = found.keys() | left_out
            for class_id, name in zip(labels.ids, labels.names, strict=True):
                if class_id not in named:
                    found[class_id] = TaskClass(id=class_id, name=name, group=self.rest)
            if self.rest not in {item.group for item in found.values()}:
                raise TaskError(
                    f"task {self.name!r} names all classes of {labels.owner} and leaves none for "
                    f"{self.rest!r}: remove 'rest', or name fewer classes"
                )
        return replace(self, classes=tuple(found[key] for key in sorted(found)))

    def _positions_in(self, labels: Labels) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Positions of what each class as written stands for; and which of them are ancestors."""
        positions: dict[str, tuple[int, ...]] = {}
        above: set[str] = set()
        doubts: list[str] = []
        for written in self.class_ids:
            try:
                position = labels.find(written)
                positions[written] = () if position is None else (position,)
                if position is None:
                    above.add(written)
                    positions[written] = positions_below(written, labels)
            except TaskError as error:
                doubts.append(str(error))
        if doubts:
            raise TaskError("; ".join(doubts))
        unknown = [written for written, found in positions.items() if not found]
        if unknown:
            raise TaskError(unknown_classes(self.name, unknown, labels))
        return positions, above

    def naming(self, data: Labels) -> "Task":
        """Read ``{0: cat}`` as "the data's class cat is the model's logit 0".

        Only a position is read so that the data does not have as an id, and only beside a name of
        one of the data's classes.
        """
        times = Counter(item.name for item in self.classes)

        def own(written: str) -> str:
            places = data.called(written)
            return data.ids[places[0]] if len(places) == 1 else written

        classes, said = list[TaskClass](), {own(key): logit for key, logit in self.model.items()}
        for item in self.classes:
            is_position = item.id.isdecimal() and item.id not in data.ids and item.id != item.name
            if is_position and times[item.name] == len(data.called(item.name)) == 1:
                said[own(item.name)] = item.id
                classes.append(replace(item, id=own(item.name)))
            else:
                classes.append(item)
        ordered = tuple(sorted(classes, key=lambda item: item.id))
        return replace(self, classes=ordered, model=said)

    def for_data(self, data: Labels) -> "Task":
        """Settle what the images are labelled with: the fine classes, or whole groups.

        If the data has none of the fine classes, a group's images are those of the data's class
        with the name of the group, whatever its case. ``folders`` says so explicitly.

        Args:
            data: The classes of the data. The task names its own by their ids.

        Returns:
            The task, with folders for every group or for none.

        Raises:
            TaskError: The data lacks a class or a folder.
        """
        named = [item for item in self.classes if item.group != self.rest]
        missing = [item.id for item in named if item.id not in data.ids]
        if not self.folders and not missing:
            return self
        found: dict[str, tuple[str, ...]] = {}
        for group in self.groups:
            own = tuple(item.id for item in named if item.group == group)
            # Where the data has all classes of a group, its images are theirs.
            whole = own if set(own).isdisjoint(missing) else ()
            found[group] = self.folders.get(group) or _called(group, data) or whole
        stray = any(item.id in data.ids and item.id not in found[item.group] for item in named)
        by_name = any(_called(group, data) for group in self.groups)
        if not self.folders and (stray or not by_name):
            raise TaskError(
                f"{unknown_classes(self.name, missing, data)}; if its classes are whole groups, "
                f"list them: 'folders: {{{self.groups[0]}: [{data.ids[0]}]}}'"
            )
        for group, folders in found.items():
            unknown = [folder for folder in folders if folder not in data.ids]
            if unknown or not folders:
                lacks = f"the folder {unknown[0]!r}" if unknown else "a folder of that name"
                raise TaskError(
                    f"task {self.name!r}: {data.owner} lacks {lacks} for group {group!r}, it has "
                    f"{', '.join(data.ids[:5])}{', ...' if len(data.ids) > 5 else ''}: give the "
                    f"label file 'folders: {{{group}: [FOLDER]}}', or remove the group"
                )
        return replace(self, folders=found)

    def describe(self) -> list[str]:
        """What each group is made of: ``cat: 5 classes (tabby, tiger cat, Persian cat, ...)``."""
        lines: list[str] = []
        for group in self.groups:
            names = [item.name.split(",")[0] for item in self.classes if item.group == group]
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            count = "1 class" if len(names) == 1 else f"{len(names)} classes"
            lines.append(f"{group}: {count} ({listed})")
        return lines

    @cached_property
    def label_ids(self) -> tuple[str, ...]:
        """Ids of the classes that images are labelled with, in order: fine ones, or folders."""
        if not self.folders:
            return self.class_ids
        return tuple(sorted(folder for own in self.folders.values() for folder in own))

    @cached_property
    def group_of_label(self) -> NDArray[np.int64]:
        """The group number of each class that images are labelled with, shape [labels]."""
        if not self.folders:
            return self.group_of_class
        group_of = {folder: group for group, own in self.folders.items() for folder in own}
        numbers = [self.groups.index(group_of[folder]) for folder in self.label_ids]
        return np.array(numbers, dtype=np.int64)

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
        rest: dict[str, Any] = {} if self.rest is None else {"rest": self.rest}
        folders = {group: list(own) for group, own in self.folders.items()}
        rest |= {"folders": folders} if folders else {}
        rest |= {"model": dict(self.model)} if self.model else {}
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
    return Task(**parse_labels(text, origin=origin))


def parse_labels(text: str, *, origin: str) -> dict[str, Any]:
    """The arguments of `Task` that a label file stands for; it may be unfinished.

    Of `Task`'s rules, such as two groups or more, none is checked yet.

    Raises:
        TaskError: The text is not a label file.
    """
    try:
        content = parse_yaml(text, _UniqueKeyLoader)
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
    folders = content.get("folders") or {}
    if not isinstance(folders, dict):
        raise TaskError(f"{origin} is not a label file: expected {_FOLDERS}")
    model = content.get("model") or {}
    if not isinstance(model, dict) or not all(isinstance(own, str) for own in model.values()):
        raise TaskError(
            f"{origin} is not a label file: expected 'model: {{class of the data: what the model "
            "calls it}}'"
        )
    classes = [
        TaskClass(id=written, name=name or written, group=group)
        for group, members in groups.items()
        for written, name in members
    ]
    return {
        "name": str(content.get("name") or Path(origin).stem),
        "classes": tuple(sorted(classes, key=lambda item: item.id)),
        "groups": tuple(groups) if rest == _IGNORE or rest in groups else (*groups, rest),
        "excluded": {str(key): str(reason) for key, reason in excluded.items()},
        "rest": None if rest == _IGNORE else rest,
        "folders": {
            group: tuple(folder for folder, _ in listed)
            for group, listed in _members_by_group(folders, origin, _FOLDERS).items()
        },
        "model": {str(key): logit for key, logit in model.items()},
    }


def unknown_classes(name: str, unknown: list[str], labels: Labels) -> str:
    """The message for classes of a task that a model or data do not have.

    Args:
        name: Of the task.
        unknown: The classes, as written.
        labels: The classes that exist.
    """
    for written in unknown:
        ancestors = [key for key in find_synsets(written) if len(classes_below()[key]) > 1]
        if ancestors:
            return (
                f"task {name!r} names {written!r}, but {labels.owner} has no class below WordNet's "
                f"{ancestors[0]} ({synsets()[ancestors[0]].names}); its classes are such as "
                f"{', '.join(labels.ids[:3])}: name some of them, or use another model or source"
            )
    listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    near = [(own, labels.nearest(own)) for own in unknown[:5]]
    nearest = [f"{at[0]} (for {own})" for own, at in near if at]
    if len(unknown) == 1:
        nearest = near[0][1]
    nearest = nearest or list(labels.ids[:3])
    # Only a model can be taught classes that it lacks.
    taught = ", name the model's classes (--labels), or train it for yours (vitcut train --model)"
    return (
        f"task {name!r} names {len(unknown)} classes that {labels.owner} lacks: {listed}; "
        f"{labels.owner} has {len(labels.ids)} classes, such as {', '.join(nearest)}: "
        f"name them in a label file (--task) by id, position (0 to {len(labels.ids) - 1}) or name, "
        f"or use another source{taught if labels.owner.startswith('model ') else ''}"
    )


def positions_below(written: str, labels: Labels) -> tuple[int, ...]:
    """Positions of the classes below a WordNet ancestor; none if there are no such classes.

    Args:
        written: Id or name of the ancestor.
        labels: Classes, some of which have the WordNet ids of ImageNet-1k.

    Raises:
        TaskError: Several ancestors have the name, and other classes.
    """
    position = known_synsets(labels)
    found: dict[tuple[int, ...], str] = {}
    for key in find_synsets(written):
        below = tuple(position[own] for own in classes_below()[key] if own in position)
        if below:
            found.setdefault(below, key)
    if len(found) > 1:
        listed = ", ".join(
            f"{key} ({synsets()[key].names}: {len(below)} classes)" for below, key in found.items()
        )
        raise TaskError(
            f"{written!r} is the name of {len(found)} ancestors in WordNet: {listed}: write the id "
            "instead"
        )
    return next(iter(found), ())


def _called(group: str, data: Labels) -> tuple[str, ...]:
    """The class of the data with the name of a group, if there is one."""
    if group in data.ids:
        return (group,)
    found = [own for own in data.ids if plain_name(own) == plain_name(group)]
    if len(found) > 1:
        raise TaskError(
            f"{len(found)} classes of {data.owner} have the name of group {group!r}: "
            f"{', '.join(found)}: give the label file 'folders: {{{group}: [FOLDER]}}'"
        )
    return tuple(found)


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
    return _members_by_group(groups, origin, expected)


def _members_by_group(
    groups: dict[Any, Any], origin: str, expected: str
) -> dict[str, list[tuple[str, str]]]:
    """The members of each group; a single one may stand without brackets."""
    return {
        str(group): _members([own] if isinstance(own, str) and own else own, origin, expected)
        for group, own in groups.items()
    }


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
