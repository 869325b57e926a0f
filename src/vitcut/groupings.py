"""Suggest a task: groups of ImageNet-1k's classes by their common ancestors in WordNet."""

from vitcut.errors import ConfigError, TaskError
from vitcut.labels import Labels, plain_name
from vitcut.task import Task, TaskClass
from vitcut.wordnet import (
    classes_below,
    find_synsets,
    imagenet_names,
    known_synsets,
    path_to,
    synsets,
    with_wordnet_ids,
)


def is_coarser(class_ids: list[str]) -> bool:
    """Whether classes of data are whole groups of ImageNet-1k's, to judge by their names."""
    fine = sum(class_id in imagenet_names() for class_id in class_ids)
    return fine < 2 <= sum(bool(_candidates(class_id)) for class_id in class_ids)


def propose(class_ids: list[str], labels: Labels, name: str) -> tuple[Task, list[str]]:
    """Make each class of the data a group of the model's classes, by its name.

    A name stands for the classes below the WordNet synset that has it; several may have. A domestic
    animal comes first (for a cat, the domestic cat before all that WordNet calls cats), then
    whatever has the most classes. A plural is understood.

    Args:
        class_ids: Classes of the data, such as "cat"; those without a synset are excluded.
        labels: The model's classes.
        name: The name of the task.

    Returns:
        The task, whose groups are ancestors, and a line on each of them: what it is made of, and
        what else has its name.

    Raises:
        TaskError: Fewer than two classes have a synset, or one includes another.
    """
    known = set(known_synsets(with_wordnet_ids(labels)))
    chosen: list[TaskClass] = []
    below: dict[str, set[str]] = {}
    lines: list[str] = []
    for group in class_ids:
        found = [key for key in _candidates(group) if known.intersection(classes_below()[key])]
        if found:
            told = [_describe(key, known) for key in found]
            lines.append(f"{group}: {'; or '.join(told)}")
            below[group] = known.intersection(classes_below()[found[0]])
            top = synsets()[found[0]].names.split(",")[0]
            chosen.append(TaskClass(id=found[0], name=top, group=group))
    if len(chosen) < 2:
        raise TaskError(
            f"{len(chosen)} of {len(class_ids)} classes have the name of classes of {labels.owner} "
            "in WordNet, expected at least 2: write a label file by hand"
        )
    for group, own in below.items():
        for other, others in below.items():
            if group != other and own <= others:
                raise TaskError(
                    f"{other!r} includes {group!r} in WordNet, and a class is of one group only: "
                    "write a label file by hand"
                )
    task = Task(
        name=name,
        classes=tuple(sorted(chosen, key=lambda item: item.id)),
        groups=tuple(below),
        excluded={key: "no name in WordNet" for key in class_ids if key not in below},
    )
    return task, lines


def _candidates(written: str) -> tuple[str, ...]:
    """Synsets that a name may mean, the most likely one first."""
    plain = plain_name(written)
    for word in (plain, plain.removesuffix("s")):
        found = sorted(find_synsets(word), key=lambda key: -len(classes_below()[key]))
        if found:
            return tuple(dict.fromkeys([*find_synsets(f"domestic {word}"), *found]))
    return ()


def _describe(synset: str, known: set[str]) -> str:
    classes = [key for key in classes_below()[synset] if key in known]
    names = [imagenet_names()[key].split(",")[0] for key in classes[:3]]
    listed = ", ".join(names) + (", ..." if len(classes) > 3 else "")
    count = "1 class" if len(classes) == 1 else f"{len(classes)} classes"
    return f"{synset} ({synsets()[synset].names.split(',')[0]}), {count}: {listed}"


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
            for ancestor in path_to(class_id):
                below.setdefault(ancestor, []).append(class_id)
        # Of equally even splits the most general ancestor wins: it comes first in every path.
        part = max(below.values(), key=lambda part: min(len(part), len(largest) - len(part)))
        groups += [part, [class_id for class_id in largest if class_id not in part]]
    groups.sort()

    named: dict[str, list[str]] = {}
    for members in groups:
        path = path_to(members[0])
        top = [key for key in path if all(key in path_to(member) for member in members)][-1]
        group = synsets()[top].names.split(",")[0]
        # Another group has been split off below this ancestor, so this one is what remains.
        if any(top in path_to(other[0]) for other in groups if other is not members):
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
