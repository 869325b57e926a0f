"""Where each head group of an attention finds its queries, keys and values among the products."""

from collections.abc import Sequence
from itertools import pairwise

from vitcut.compact.plan import AttentionPlan, HeadGroupPlan
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Tensor

Piece = tuple[int, int, int]
"""Neighbouring columns of a projection: its number, the first, and the end."""


class Routes:
    """The ways through one attention, found once."""

    def __init__(self, plan: AttentionPlan, head_dim: int) -> None:
        self._plan = plan
        self._head_dim = head_dim
        read = [item.streams for item in plan.projections]
        read += [streams for group in plan.groups for streams in (group.keys, group.values)]
        self.inputs = [streams for streams in dict.fromkeys(read) if streams]
        """Streams whose tokens are put one after the other, each once."""
        self.pieces = [
            tuple(self._find(group, letter) for letter in LETTERS) for group in plan.groups
        ]
        """Per head group and letter, the columns to be joined, in the order of its heads."""

    def cut(self, columns: Sequence[Tensor]) -> dict[Piece, Tensor]:
        """The pieces of all projections."""
        used = {piece for by_letter in self.pieces for pieces in by_letter for piece in pieces}
        found: dict[Piece, Tensor] = {}
        for number, whole in enumerate(columns):
            pieces = sorted(piece for piece in used if piece[0] == number)
            if _partition(pieces):
                sizes = [end - first for _, first, end in pieces]
                parts = whole.split(sizes, dim=-1) if len(sizes) > 1 else (whole,)
                found |= dict(zip(pieces, parts, strict=True))
            else:
                found |= {piece: whole[..., piece[1] : piece[2]] for piece in pieces}
        return found

    def _find(self, group: HeadGroupPlan, letter: Letter) -> list[Piece]:
        absorbed = {"q": (), "k": group.keys, "v": group.values}[letter]
        if letter in group.constant or absorbed:
            return []
        pieces: list[Piece] = []
        for head in group.heads:
            number, place = self._owner(group, letter, head)
            first, end = place * self._head_dim, (place + 1) * self._head_dim
            if pieces and pieces[-1][0] == number and pieces[-1][2] == first:
                pieces[-1] = (number, pieces[-1][1], end)
            else:
                pieces.append((number, first, end))
        return pieces

    def _owner(self, group: HeadGroupPlan, letter: Letter, head: int) -> tuple[int, int]:
        """The projection that computes a head's letter, and the place among its columns."""
        for number, item in enumerate(self._plan.projections):
            columns = [(name, one) for name in LETTERS for one in getattr(item, name)]
            if (letter, head) in columns and (letter != "q" or item.rows == group.rows):
                return number, columns.index((letter, head))
        raise KeyError(f"no projection computes {letter} of head {head}")


def _partition(pieces: Sequence[Piece]) -> bool:
    """Whether the pieces, in their order, are neighbours without overlap; they then are all."""
    return pieces[0][1] == 0 and all(one[2] == other[1] for one, other in pairwise(pieces))
