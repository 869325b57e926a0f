"""The classes that a model or a data set knows, and how to look up one that a person wrote."""

import re
import unicodedata
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from vitcut.errors import TaskError

_POSITION = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Classes in order, with their names."""

    owner: str
    """Whose classes they are, for messages: "the data"."""
    ids: tuple[str, ...]
    """In the order of a model's logits; those of data are sorted."""
    names: tuple[str, ...]
    """Names for people, in the same order; commas may separate synonyms."""
    also: tuple[frozenset[str], ...] = ()
    """Other ids of each class, such as its WordNet id; empty if there are none."""
    stated: tuple[str, ...] = ()
    """Ids in the order that data itself gives its classes, with those of no image; empty if it
    gives none."""
    stated_by: str = ""
    """What states that order, for messages: "the ClassLabel of the parquet file"."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names):
            raise TaskError(
                f"{self.owner} has {len(self.ids)} class ids and {len(self.names)} names: expected "
                "one name for each id"
            )

    def find(self, written: str) -> int | None:
        """Look up a class by its id, else by its position, else by its name.

        Ids must match exactly. Names match whatever the case, separators and form of Unicode, and
        by a single synonym.

        Returns:
            The position of the class, or None if there is none.

        Raises:
            TaskError: Several classes have the id or the name.
        """
        found = self._positions_of_id.get(written, [])
        if not found and _POSITION.fullmatch(written) and int(written) < len(self.ids):
            return int(written)
        found = found or self._positions_of_name.get(plain_name(written), [])
        if len(found) > 1:
            listed = ", ".join(
                f"{self.ids[at]} ({self.names[at]}, position {at})" for at in found[:5]
            )
            raise TaskError(
                f"{written!r} is the name of {len(found)} classes of {self.owner}: {listed}: "
                "write the id or the position instead; which of them a class of the data is, a "
                f"label file says with 'model: {{{written}: {found[0]}}}'"
            )
        return found[0] if found else None

    def called(self, written: str) -> tuple[int, ...]:
        """Positions of the classes with an id, or else with a name; a number is no position."""
        found = self._positions_of_id.get(written)
        return tuple(found or self._positions_of_name.get(plain_name(written), []))

    def nearest(self, written: str) -> list[str]:
        """Up to three ids and names similar to what was written, the most similar first."""
        known = {plain_name(item): item for item in self.ids}
        for plain, positions in self._positions_of_name.items():
            name = self.names[positions[0]]
            synonyms = (part.strip() for part in name.split(","))
            known[plain] = next((part for part in synonyms if plain_name(part) == plain), name)
        return [known[plain] for plain in get_close_matches(plain_name(written), list(known), n=3)]

    def may_be(self, other: "Labels") -> list[set[int]]:
        """For each class, the positions of the classes of ``other`` that share a name with it."""
        found: list[set[int]] = [set() for _ in self.ids]
        for plain, places in self._positions_of_any.items():
            for at in places:
                found[at].update(other._positions_of_any.get(plain, ()))
        return found

    def match(self, other: "Labels") -> dict[int, int]:
        """Find the classes that two owners have in common, each by itself.

        A class is another's by an id, or else by a name that no second class has. Where several
        have it, whole names decide if all of them have one: "maillot" is not "maillot, tank suit"
        where both owners tell these two apart.

        Returns:
            Positions in ``other`` by position here. Classes in doubt are left out.
        """
        pairs = _pairs_of(self._positions_of_id, other._positions_of_id)
        by_name = _pairs_of(self._positions_of_whole, other._positions_of_whole)
        by_name = {**_pairs_of(self._positions_of_any, other._positions_of_any), **by_name}
        near, far = self.may_be(other), other.may_be(self)
        own, others = pairs.keys() | by_name.keys(), {*pairs.values(), *by_name.values()}
        taken = set(pairs.values())
        for at, there in by_name.items():
            clear = near[at] <= others and far[there] <= own
            # Several synonyms, all of them the same, leave no doubt.
            same = plain_name(self.names[at]) == plain_name(other.names[there])
            clear |= same and "," in self.names[at]
            if clear and at not in pairs and there not in taken:
                pairs[at] = there
        return pairs

    @cached_property
    def _positions_of_id(self) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = {}
        for at, own in enumerate(self.ids):
            for key in {own, *(self.also[at] if self.also else ())}:
                positions.setdefault(key, []).append(at)
        return positions

    @cached_property
    def _positions_of_name(self) -> dict[str, list[int]]:
        """Positions of the classes with a plain name, as a whole or as one of the synonyms."""
        return _places([[name, *name.split(",")] for name in self.names])

    @cached_property
    def _positions_of_whole(self) -> dict[str, list[int]]:
        """Positions of the classes with a plain id or whole name."""
        return _places([[*pair] for pair in zip(self.ids, self.names, strict=True)])

    @cached_property
    def _positions_of_any(self) -> dict[str, list[int]]:
        """The same, and by each single synonym."""
        pairs = zip(self.ids, self.names, strict=True)
        return _places([[own, name, *name.split(",")] for own, name in pairs])


def _places(written: list[list[str]]) -> dict[str, list[int]]:
    """The numbers of the lists in which something is written, by its plain form."""
    places: dict[str, list[int]] = {}
    for at, texts in enumerate(written):
        for plain in {*map(plain_name, texts)} - {""}:
            places.setdefault(plain, []).append(at)
    return places


def plain_name(name: str) -> str:
    """A name as it is compared: whatever its case, separators, apostrophes and Unicode form."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(re.sub(r"[_\-./\s]+", " ", re.sub("['\u2019]", "", folded)).split())


def read_labels(path: Path) -> tuple[str, ...]:
    """Read a file that names the classes of a model, one per line, in the order of its logits.

    Raises:
        TaskError: It cannot be read, or a line is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read the labels {path}: {error}") from None
    names = tuple(line.strip() for line in lines)
    if not names or not all(names):
        number = names.index("") + 1 if names else 1
        raise TaskError(
            f"line {number} of {path} is empty: expected the name of one class on every line, in "
            "the order of the model's logits"
        )
    return names


def _pairs_of(own: dict[str, list[int]], other: dict[str, list[int]]) -> dict[int, int]:
    """Classes that share a key, where neither shares one with a second class."""
    near: dict[int, set[int]] = {}
    far: dict[int, set[int]] = {}
    for key, places in own.items():
        for at in places:
            for there in other.get(key, ()):
                near.setdefault(at, set()).add(there)
                far.setdefault(there, set()).add(at)
    return {at: min(found) for at, found in near.items() if len(found) == len(far[min(found)]) == 1}
