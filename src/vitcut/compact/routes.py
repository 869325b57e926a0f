"""Where each head set of an attention finds its queries, keys and values among the products."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from vitcut.compact.plan import AttentionPlan, HeadSetPlan, Rows
from vitcut.compact.stream import by_head, by_image
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Tensor


class Piece(NamedTuple):
    """Neighbouring head inputs among those that a projection computes."""

    projection: int
    first: int
    end: int


class Routes:
    """The ways through one attention, found once."""

    def __init__(self, plan: AttentionPlan, head_dim: int) -> None:
        self._plan = plan
        self._head_dim = head_dim
        self._pieces: list[dict[Letter, list[Piece]]] = [
            {letter: self._find(head_set, letter) for letter in LETTERS}
            for head_set in plan.head_sets
        ]
        self._cuts = self._sorted_pieces()
        """Per projection the pieces that it falls into."""
        self._one_by_one = self._read_by_heads_alone()
        """Projections whose inputs are all read by heads that stand alone."""
        read = [
            streams for head_set in plan.head_sets for streams in (head_set.keys, head_set.values)
        ]
        read += [item.streams for item in plan.projections if len(item.streams) > 1]
        self.read_together = [streams for streams in dict.fromkeys(read) if streams]
        """Streams whose tokens are put one after the other, image by image."""
        self.read_by_image = frozenset(one for streams in self.read_together for one in streams)
        """Streams among them."""

    def cut(self, columns: Sequence[Tensor]) -> "Parts":
        """What all projections computed, each of shape [tokens, columns], in pieces."""
        found: dict[Piece, Tensor] = {}
        for number, (product, pieces) in enumerate(zip(columns, self._cuts, strict=True)):
            # Put into heads all at once: at one image every reshape and transposition counts.
            rows = self._plan.projections[number].rows
            if number in self._one_by_one:
                whole, dim, size = by_image(product, rows), 2, self._head_dim
            else:
                heads = self._plan.projections[number].num_columns
                whole, dim, size = by_head(product, rows, heads), 1, 1
            if _partition(pieces):
                sizes = [size * (piece.end - piece.first) for piece in pieces]
                parts = whole.split(sizes, dim=dim) if len(sizes) > 1 else (whole,)
            else:
                parts = tuple(
                    whole.narrow(dim, size * piece.first, size * (piece.end - piece.first))
                    for piece in pieces
                )
            found |= dict(zip(pieces, parts, strict=True))
        return Parts(self._plan, self._pieces, found)

    def _read_by_heads_alone(self) -> frozenset[int]:
        shared = {
            piece.projection
            for head_set, of in zip(self._plan.head_sets, self._pieces, strict=True)
            for pieces in of.values()
            for piece in pieces
            if not head_set.stands_alone
        }
        return frozenset(range(len(self._plan.projections))) - shared

    def _sorted_pieces(self) -> list[list[Piece]]:
        used = {piece for of in self._pieces for pieces in of.values() for piece in pieces}
        return [
            sorted(piece for piece in used if piece.projection == number)
            for number in range(len(self._plan.projections))
        ]

    def _find(self, head_set: HeadSetPlan, letter: Letter) -> list[Piece]:
        """The pieces to be joined, in the order of a head_set's heads."""
        direct = {"q": head_set.queries, "k": head_set.keys, "v": head_set.values}[letter]
        if letter in head_set.constant or direct:
            return []
        pieces: list[Piece] = []
        for head in head_set.heads:
            number, place = self._owner(head_set, letter, head)
            if pieces and pieces[-1].projection == number and pieces[-1].end == place:
                pieces[-1] = pieces[-1]._replace(end=place + 1)
            else:
                pieces.append(Piece(projection=number, first=place, end=place + 1))
        return pieces

    def _owner(self, head_set: HeadSetPlan, letter: Letter, head: int) -> tuple[int, int]:
        """The projection that computes a head's letter, and the place among its head inputs."""
        found: list[tuple[int, int, int]] = []
        for number, item in enumerate(self._plan.projections):
            inputs = [(name, one) for name in LETTERS for one in getattr(item, name)]
            if (letter, head) in inputs and _covers(item.rows, head_set.rows):
                found.append((item.rows.count, number, inputs.index((letter, head))))
        if not found:
            raise KeyError(f"no projection computes {letter} of head {head}")
        _, number, place = min(found)
        return number, place


class Parts:
    """What the projections of one attention computed, cut into pieces."""

    def __init__(
        self,
        plan: AttentionPlan,
        pieces: Sequence[Mapping[Letter, Sequence[Piece]]],
        found: Mapping[Piece, Tensor],
    ) -> None:
        self._plan = plan
        self._pieces = pieces
        self._found = found

    def of(
        self, head_set: int, letter: Letter
    ) -> Float[Tensor, "images *heads rows head_dim"] | None:
        """The queries, keys or values of a head set; None where no projection computes them.

        A head that stands alone has no dimension of its own.
        """
        plan = self._plan.head_sets[head_set]
        parts = [self._found[piece] for piece in self._pieces[head_set][letter]]
        if not parts:
            return None
        if letter == "q":
            parts = [
                self._take_rows(part, piece.projection, plan.rows)
                for part, piece in zip(parts, self._pieces[head_set]["q"], strict=True)
            ]
        whole = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return whole.squeeze(1) if plan.stands_alone and whole.ndim == 4 else whole

    def _take_rows(self, found: Tensor, projection: int, wanted: Rows) -> Tensor:
        own = self._plan.projections[projection].rows
        if own == wanted:
            return found
        return found.narrow(-2, wanted.first - own.first, wanted.count)


def _covers(rows: Rows, others: Rows) -> bool:
    return rows.first <= others.first and others.end <= rows.end


def _partition(pieces: Sequence[Piece]) -> bool:
    """Whether the pieces, in their order, are neighbours without overlap; they then are all."""
    return pieces[0].first == 0 and all(one.end == other.first for one, other in pairwise(pieces))
