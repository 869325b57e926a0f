"""What leaving out patches does, from the attention patterns of one pass.

Leaving out a set S of patches frees their share of every attention pattern to the others: a query
mixes

    z_S = (z - sum_{j in S} a_j v_j) / (1 - sum_{j in S} a_j).

To first order, log q(y|x) changes by the sum of < grad log q at z, z_S - z > over heads, blocks and
the queries that stay. The patterns, the values and the gradients are held, so that both are known
at any time: how log q changed with what is gone, and how it will with each patch that goes next.
Of two neighbours that show the same, one is cheap; once it is gone the other is not, since its
share has grown. Where the classifier pools patches, the pool moves likewise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from vitcut.graph import SiteKey
from vitcut.masked.part_model import PartModel, PartRun
from vitcut.model.weights import ViTWeights
from vitcut.selection.greedy import Alive
from vitcut.shapes import Bool, Float, Int, Tensor

_MOST_AT_ONCE = 1 << 24
"""Shares that are looked at together: 64 MiB in float32, of which a few copies are made."""


class Attention(NamedTuple):
    """The kept heads of a block and token kind; their queries are the tokens of the kind."""

    pattern: Float[Tensor, "images heads queries tokens"]
    values: Float[Tensor, "images heads tokens head_dim"]
    gradients: Float[Tensor, "probes images queries width"]
    """At the stream that the heads write into."""
    writes: Float[Tensor, "width features"]
    """What z of the heads adds to the stream."""
    first: int
    """Number of the first query among all tokens."""


class CutParts:
    """Which parts of a site are left, and which were cut since its last refresh."""

    def __init__(self, place: SiteKey, alive: Bool[Tensor, "parts"]) -> None:
        self.place = place
        self.alive = alive.clone()
        self._pending = torch.zeros_like(self.alive)

    def cut(self, parts: Sequence[int]) -> None:
        """Mark parts as cut. The others take over from them only at the next ``refresh``."""
        self.alive[list(parts)] = False
        self._pending[list(parts)] = True

    @property
    def num_pending(self) -> int:
        """How many parts were cut since the last refresh."""
        return int(self._pending.sum())


class PositionSite(CutParts):
    """The positions of a model, and the responses to leaving them out."""

    def __init__(
        self,
        alive: Bool[Tensor, "patches"],
        attentions: Sequence[Attention],
        *,
        pooled: Float[Tensor, "probes images kept"],
        num_prefix: int,
        kind: int,
        expand: Callable[[Float[Tensor, "probes images *parts"]], Tensor],
    ) -> None:
        """Score every position that is there.

        Args:
            alive: True for the patches that the pass had, of all patches of the image.
            attentions: Of every block and token kind that keeps heads.
            pooled: < grad log q at the pool, what is pooled of a patch less the pool >; zero if
                the classifier pools no patches.
            num_prefix: Tokens before the patches.
            kind: Number of the patches' token kind.
            expand: Makes the responses of all classes from those to the probes.
        """
        super().__init__((0, "positions", kind), alive)
        self._kept: Int[Tensor, "kept"] = alive.nonzero().flatten()
        self._attentions, self._pooled = attentions, pooled
        self._num_prefix, self._expand = num_prefix, expand
        self._gone, self._next = self._respond()

    def responses(self) -> Float[Tensor, "parts responses"]:
        """The response to leaving out each position next; zero for those that are gone."""
        found = self._expand(self._next)
        everything = found.new_zeros(len(self.alive), len(found))
        everything[self._kept] = found.T
        return everything * self.alive[:, None]

    def refresh(self) -> Float[Tensor, "responses"]:
        """Let the others take over; return the response to all cuts since the last refresh."""
        before = self._gone
        self._pending[:] = False
        self._gone, self._next = self._respond()
        return self._expand(self._gone - before)

    def _respond(
        self,
    ) -> tuple[Float[Tensor, "probes images"], Float[Tensor, "probes images kept"]]:
        """The response to what is gone, and to each position that goes next."""
        there = self.alive[self._kept]
        count = int(there.sum())
        # The pool of those that are there, and where it goes without one more of them.
        gone = (self._pooled * there).sum(2) / count
        following = (gone[..., None] - self._pooled) / max(1, count - 1)
        for attention in self._attentions:
            self._add(attention, there, gone, following)
        return gone, following

    def _add(
        self,
        attention: Attention,
        there: Bool[Tensor, "kept"],
        gone: Float[Tensor, "probes images"],
        following: Float[Tensor, "probes images kept"],
    ) -> None:
        """Add what one attention contributes."""
        writes, prefix = attention.writes, self._num_prefix
        heads, queries = attention.pattern.shape[1:3]
        present = torch.cat([there.new_ones(prefix), there]).to(writes)
        asking = present[attention.first : attention.first + queries, None]
        others = torch.ones(queries, len(present), dtype=writes.dtype, device=writes.device)
        others.diagonal(attention.first).zero_()  # A position takes its own query with it.
        # Shares are held with few digits, so that they sum to one only roughly.
        least = 16 * torch.finfo(writes.dtype).eps
        images = max(1, _MOST_AT_ONCE // attention.pattern[0].numel())
        for start in range(0, gone.shape[1], images):
            span = slice(start, start + images)
            whole, values = (x[span].to(writes) for x in (attention.pattern, attention.values))
            whole = whole / whole.sum(-1, keepdim=True)
            pattern = whole * present
            pattern /= pattern.sum(-1, keepdim=True).clamp_min(least)
            mixed = pattern @ values
            moved = (mixed - whole @ values) * asking
            # How far each further key that goes moves z, per z - v: [images heads queries patches].
            share = pattern / (1 - pattern).clamp_min(least) * (asking * others)
            share = share[..., prefix:]
            for probe, gradients in enumerate(attention.gradients[:, span]):
                along = (gradients.to(writes) @ writes).unflatten(2, (heads, -1)).transpose(1, 2)
                gone[probe, span] += (along * moved).sum((1, 2, 3))
                towards = (share.mT @ along * values[:, :, prefix:]).sum((1, 3))
                away = ((along * mixed).sum(-1, keepdim=True) * share).sum((1, 2))
                following[probe, span] += away - towards


class PositionTrace:
    """Collects what a `PositionSite` holds, chunk by chunk of a pass; nothing if none is cut."""

    def __init__(
        self,
        model: PartModel,
        weights: ViTWeights,
        alive: Alive,
        chosen: Mapping[SiteKey, Bool[Tensor, "_kept"]],
        *,
        num_images: int,
        num_probes: int,
        held: torch.dtype,
    ) -> None:
        """Make room.

        Args:
            model: The model as cut so far.
            weights: Its weights, on the positions that it keeps.
            alive: The parts that are not cut.
            chosen: Per site, which of the features that the model keeps are alive.
            num_images: Over all chunks.
            num_probes: Backward passes.
            held: The type in which patterns and values are held.
        """
        self._model, self._weights, self._alive = model, weights, alive.positions
        self._heads: dict[SiteKey, Tensor] = {}
        self._patterns: dict[SiteKey, Tensor] = {}
        self._values: dict[SiteKey, Tensor] = {}
        like, tokens = weights.patch_weight, weights.num_tokens
        head_dim = weights.blocks[0].attn.q_weight.shape[1]
        self._pooled = like.new_zeros(num_probes, num_images, len(weights.positions))
        for place, features in chosen.items() if self._alive is not None else ():
            if place[1] != "heads":
                continue
            self._heads[place] = features[::head_dim]
            queries = len(range(tokens)[model.rows[place[2]]])
            shape = num_images, int(self._heads[place].sum())
            self._patterns[place] = like.new_empty(*shape, queries, tokens, dtype=held)
            self._values[place] = like.new_empty(*shape, tokens, head_dim, dtype=held)

    def leaf(self, chunk: Float[Tensor, "images channels y x"]) -> Tensor | None:
        """What to differentiate for the pool of patches, if there is one; zeros."""
        if self._alive is None or self._weights.patch_readout == "none":
            return None
        return chunk.new_zeros(len(chunk), self._pooled.shape[2], requires_grad=True)

    @torch.no_grad()
    def keep(self, span: slice, run: PartRun) -> None:
        """Keep what a chunk attends with."""
        for place, heads in self._heads.items():
            attended = run.writes[place].attended
            if attended is not None:
                self._patterns[place][span] = attended.pattern[:, heads]
                self._values[place][span] = attended.values[:, heads]

    def keep_pool(self, probe: int, span: slice, gradient: Float[Tensor, "images kept"]) -> None:
        """Keep the gradient of a probe with respect to ``leaf``."""
        # The gradient with respect to one weight out of n alike is < g, patch - pool > / n.
        self._pooled[probe, span] = gradient * gradient.shape[1]

    def sites(
        self,
        gradients: Mapping[SiteKey, Float[Tensor, "probes images _queries width"]],
        writes: Mapping[SiteKey, Float[Tensor, "width _features"]],
        expand: Callable[[Float[Tensor, "probes images *parts"]], Tensor],
    ) -> Iterator[PositionSite]:
        """The site of all positions that are alive, if they may be cut."""
        if self._alive is None:
            return
        rows, tokens = self._model.rows, self._weights.num_tokens
        attentions = [
            Attention(
                pattern=self._patterns.pop(place),
                values=self._values.pop(place),
                gradients=gradients[place],
                writes=writes[place],
                first=range(tokens)[rows[place[2]]].start,
            )
            for place in self._heads
        ]
        yield PositionSite(
            torch.from_numpy(self._alive.copy()).to(self._pooled.device),
            attentions,
            pooled=self._pooled,
            num_prefix=self._weights.num_prefix,
            kind=len(rows) - 1,
            expand=expand,
        )
