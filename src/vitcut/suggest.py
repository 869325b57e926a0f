"""Suggest a task for classes of ImageNet-1k: groups by their common ancestors in WordNet."""

from functools import cache

from vitcut.errors import ConfigError, TaskError
from vitcut.task import Task, TaskClass
from vitcut.wordnet import imagenet_names, synsets


def suggest(class_ids: list[str], num_groups: int, name: str) -> Task:
    """Group classes of ImageNet-1k into groups of similar size.

    The largest group is split by the ancestor that splits it most evenly, until there are enough
    groups. Each is named after the most specific ancestor that its classes have in common.

    Args:
        class_ids: Classes of the data; those that are not ImageNet-1k's are excluded from the task.
        num_groups: The number of groups.
        name: The name of the task.

    Raises:
        TaskError: Fewer than two classes are ImageNet-1k's.
        ConfigError: ``num_groups`` is less than 2, or more than there are classes.
    """
    known = sorted({key for key in class_ids if key in imagenet_names()})
    others = sorted({key for key in class_ids if key not in imagenet_names()})
    if len(known) < 2:
        first = f", the first other one is {others[0]!r}" if others else ""
        raise TaskError(
            f"{len(known)} of {len(known) + len(others)} classes are WordNet ids of ImageNet-1k, "
            f"such as n01440764, expected at least 2{first}: write a label file by hand"
        )
    if not 2 <= num_groups <= len(known):
        raise ConfigError(
            f"groups must be between 2 and {len(known)}, the number of classes, got {num_groups}"
        )
    groups = [known]
    while len(groups) < num_groups:
        largest = max(groups, key=len)
        groups.remove(largest)
        below: dict[str, list[str]] = {}
        for class_id in largest:
            for ancestor in _path(class_id):
                below.setdefault(ancestor, []).append(class_id)
        # Of equally even splits the most general ancestor wins: it comes first in every path.
        part = max(below.values(), key=lambda part: min(len(part), len(largest) - len(part)))
        groups += [part, [class_id for class_id in largest if class_id not in part]]
    groups.sort()

    named: dict[str, list[str]] = {}
    for members in groups:
        path = _path(members[0])
        top = [key for key in path if all(key in _path(member) for member in members)][-1]
        group = synsets()[top].names.split(",")[0]
        # Another group has been split off below this ancestor, so this one is what remains.
        if any(top in _path(other[0]) for other in groups if other is not members):
            group = f"other {group}"
        named[group if group not in named else f"{group} ({top})"] = members
    group_of = {class_id: group for group, members in named.items() for class_id in members}
    return Task(
        name=name,
        classes=tuple(
            TaskClass(id=key, name=imagenet_names()[key].split(",")[0], group=group_of[key])
            for key in known
        ),
        groups=tuple(named),
        excluded=dict.fromkeys(others, "not ImageNet-1k's"),
    )


@cache
def _path(synset: str) -> tuple[str, ...]:
    """From the root down to the synset, always along the first hypernym."""
    above = synsets()[synset].hypernyms
    return (*(_path(above[0]) if above else ()), synset)
