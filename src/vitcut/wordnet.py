"""WordNet 3.0, reduced to ImageNet-1k's synsets and their ancestors: names, and groups of classes.

The table and WordNet's licence lie in ``assets/wordnet``; writing a label file is left to others.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from vitcut.errors import ConfigError, TaskError


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One meaning in WordNet."""

    names: str
    """Its synonyms, separated by commas, as ImageNet lists them."""
    hypernyms: tuple[str, ...]
    """The ids of the next more general synsets, in WordNet's order; none for the root."""


@cache
def synsets() -> dict[str, Synset]:
    """Every synset of the table, by id, in the order of the ids."""
    table = resources.files("vitcut") / "assets" / "wordnet" / "imagenet-1k.tsv"
    rows = (
        line.split("\t")
        for line in table.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    return {
        synset: Synset(names=names, hypernyms=tuple(hypernyms.split()))
        for synset, names, hypernyms in rows
    }


@cache
def imagenet_names() -> dict[str, str]:
    """ImageNet-1k's classes with their names, in the order of their ids, which is the usual one.

    They are the synsets of the table that are nobody's ancestor.
    """
    ancestors = {above for synset in synsets().values() for above in synset.hypernyms}
    return {key: synset.names for key, synset in synsets().items() if key not in ancestors}


def suggest_groups(class_ids: Iterable[str], count: int) -> dict[str, tuple[str, ...]]:
    """Group classes of ImageNet-1k by their ancestors in WordNet, into groups of similar size.

    The largest group is divided by the ancestor that parts it most evenly, until there are enough.
    Where a synset has several hypernyms the first counts.

    Args:
        class_ids: Of the classes.
        count: How many groups.

    Returns:
        The sorted class ids of each group, by the name of what they have in common.

    Raises:
        TaskError: A class is not ImageNet-1k's.
        ConfigError: ``count`` is less than 2, or more than there are classes.
    """
    members = sorted(set(class_ids))
    unknown = [class_id for class_id in members if class_id not in imagenet_names()]
    if unknown:
        raise TaskError(
            f"{len(unknown)} classes are not ImageNet-1k's, first {unknown[0]!r}: expected WordNet "
            "ids such as n01440764; leave the others out"
        )
    if not 2 <= count <= len(members):
        raise ConfigError(f"groups must be between 2 and {len(members)}, the classes, got {count}")
    groups = [members]
    while len(groups) < count:
        largest = max(groups, key=len)
        groups.remove(largest)
        groups.extend(_halves(largest))
    return _named(sorted(groups))


def _halves(members: list[str]) -> tuple[list[str], list[str]]:
    """The members below one of their ancestors, and the others: as even as can be."""
    below: dict[str, list[str]] = {}
    for member in members:
        for ancestor in _line(member):
            below.setdefault(ancestor, []).append(member)
    # Of equally good ones the most general, which comes first in a line.
    chosen = max(below.values(), key=lambda part: min(len(part), len(members) - len(part)))
    return chosen, [member for member in members if member not in chosen]


def _named(groups: list[list[str]]) -> dict[str, tuple[str, ...]]:
    """By the most special synset above all members; what another group lies below is the rest."""
    tops = [_common(members) for members in groups]
    named: dict[str, tuple[str, ...]] = {}
    for top, members in zip(tops, groups, strict=True):
        name = synsets()[top].names.split(",")[0]
        if any(top in _line(other[0]) for other in groups if other is not members):
            name = f"other {name}"
        named[name if name not in named else f"{name} ({top})"] = tuple(members)
    return named


def _common(members: list[str]) -> str:
    shared = [
        ancestor
        for ancestor in _line(members[0])
        if all(ancestor in _line(member) for member in members)
    ]
    return shared[-1]


@cache
def _line(synset: str) -> tuple[str, ...]:
    """From the root down to the synset, by first hypernyms."""
    above = synsets()[synset].hypernyms
    return (*(_line(above[0]) if above else ()), synset)
