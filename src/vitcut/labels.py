"""The classes that a model or a data set knows, and which of them a person means.

Grouping them is left to `task`.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

from vitcut.errors import TaskError

_POSITION = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Classes in their order, with what they are called."""

    owner: str
    """Whose classes they are, for messages: "the data"."""
    ids: tuple[str, ...]
    """In the order of a model's logits; those of data are sorted."""
    names: tuple[str, ...]
    """What a person calls them, in the same order; commas may separate synonyms."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names):
            raise TaskError(
                f"{self.owner} has {len(self.ids)} class ids and {len(self.names)} names: expected "
                "as many names as ids"
            )

    def find(self, written: str) -> int | None:
        """The position of the class that was written; None where no class is called that.

        An id, exactly as it stands, goes before a position, and a position before a name. Of a name
        neither case nor underscores matter, and one synonym is enough.

        Raises:
            TaskError: Several classes have the id or the name.
        """
        same_id = [at for at, class_id in enumerate(self.ids) if class_id == written]
        if not same_id and _POSITION.fullmatch(written) and int(written) < len(self.ids):
            return int(written)
        found = same_id or self._positions_of_name.get(_plain(written), [])
        if len(found) > 1:
            listed = ", ".join(f"{self.ids[at]} ({self.names[at]})" for at in found[:5])
            raise TaskError(
                f"{written!r} is the name of {len(found)} classes of {self.owner}: {listed}: "
                "write the id instead"
            )
        return found[0] if found else None

    def nearest(self, written: str) -> list[str]:
        """Up to three ids and names that look like what was written, the likeliest first."""
        known = {_plain(item): item for item in self.ids} | {
            plain: self._as_said(plain, at[0]) for plain, at in self._positions_of_name.items()
        }
        return [known[plain] for plain in get_close_matches(_plain(written), list(known), n=3)]

    @cached_property
    def _positions_of_name(self) -> dict[str, list[int]]:
        """The classes that a plain name means: a whole name, or one of its synonyms."""
        positions: dict[str, list[int]] = {}
        for at, name in enumerate(self.names):
            for plain in {_plain(name), *map(_plain, name.split(","))} - {""}:
                positions.setdefault(plain, []).append(at)
        return positions

    def _as_said(self, plain: str, position: int) -> str:
        said = (part.strip() for part in self.names[position].split(","))
        return next((part for part in said if _plain(part) == plain), self.names[position])


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
