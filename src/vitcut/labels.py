"""The classes that a model or a data set knows, and how to look up one that a person wrote."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

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

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names):
            raise TaskError(
                f"{self.owner} has {len(self.ids)} class ids and {len(self.names)} names: expected "
                "one name for each id"
            )

    def find(self, written: str) -> int | None:
        """Look up a class by its id, else by its position, else by its name.

        Ids must match exactly. Names match whatever the case, with spaces for underscores, and by a
        single synonym.

        Returns:
            The position of the class, or None if there is none.

        Raises:
            TaskError: Several classes have the id or the name.
        """
        found = [position for position, class_id in enumerate(self.ids) if class_id == written]
        if not found and _POSITION.fullmatch(written) and int(written) < len(self.ids):
            return int(written)
        found = found or self._positions_of_name.get(plain_name(written), [])
        if len(found) > 1:
            listed = ", ".join(f"{self.ids[at]} ({self.names[at]})" for at in found[:5])
            raise TaskError(
                f"{written!r} is the name of {len(found)} classes of {self.owner}: {listed}: "
                "write the id instead"
            )
        return found[0] if found else None

    def nearest(self, written: str) -> list[str]:
        """Up to three ids and names similar to what was written, the most similar first."""
        known = {plain_name(item): item for item in self.ids}
        for plain, positions in self._positions_of_name.items():
            name = self.names[positions[0]]
            synonyms = (part.strip() for part in name.split(","))
            known[plain] = next((part for part in synonyms if plain_name(part) == plain), name)
        return [known[plain] for plain in get_close_matches(plain_name(written), list(known), n=3)]

    @cached_property
    def _positions_of_name(self) -> dict[str, list[int]]:
        """Positions of the classes with a plain name, as a whole or as one of the synonyms."""
        positions: dict[str, list[int]] = {}
        for at, name in enumerate(self.names):
            for plain in {plain_name(name), *map(plain_name, name.split(","))} - {""}:
                positions.setdefault(plain, []).append(at)
        return positions


def plain_name(name: str) -> str:
    """A name as it is compared: whatever the case, with spaces for underscores."""
    return " ".join(name.casefold().replace("_", " ").split())
