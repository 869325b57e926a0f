"""Pass e of planning: a block's attention, from the streams that its heads read to head sets.

Few queries need no keys and values: a head set whose weights of keys and values cost more than
they save meets the normalised tokens directly (see ``HeadSetPlan.keys``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vitcut.compact.operations import head_set_macs
from vitcut.compact.plan import AttentionPlan, HeadSetPlan, ProjectionPlan, Rows, StreamPlan
from vitcut.compiler.joining import Run
from vitcut.compiler.streams import Stream, StreamBuilder
from vitcut.names import LETTERS, Letter

Want = tuple[Run, tuple[int, ...]]
"""A stream by what it is: its groups, and the sources kept in each."""
Column = tuple[Letter, int]
"""A letter and a head."""
_DIRECT: dict[Letter, str] = {"k": "keys", "v": "values"}
"""What a head set's plan calls the streams that stand in for a letter."""


@dataclass(frozen=True, kw_only=True)
class DraftAttention:
    """A block's attention but for its outputs: later streams decide on them."""

    streams: tuple[Stream, ...]
    projections: tuple[ProjectionPlan, ...]
    head_sets: tuple[HeadSetPlan, ...]

    def plan(self, streams: Iterable[StreamPlan]) -> AttentionPlan:
        """The plan, yet without outputs."""
        return AttentionPlan(
            streams=tuple(streams),
            projections=self.projections,
            head_sets=self.head_sets,
            outputs=(),
        )


def draft_attention(builder: StreamBuilder, layer: int) -> DraftAttention | None:
    """Plan a block's attention, and make its head sets known to the builder."""
    return _Drafter(builder, layer).draft()


@dataclass(kw_only=True)
class _Columns:
    """What one product computes."""

    q: list[int] = field(default_factory=list[int])
    k: list[int] = field(default_factory=list[int])
    v: list[int] = field(default_factory=list[int])


class _Drafter:
    """Finds streams, then head sets, then products."""

    def __init__(self, builder: StreamBuilder, layer: int) -> None:
        self.builder = builder
        self.layer = layer
        self.runs: dict[int, tuple[Run, ...]] = {
            head.number: builder.joins.written[head.source]
            for head in builder.reads.blocks[layer].heads
            if head.source in builder.joins.written
        }
        """Per head the groups that ask."""
        self.reads: dict[tuple[Letter, int, Run | None], tuple[Want, ...]] = {}
        """What q of a head reads for a run, and its k and v (None) for all tokens; constant inputs
        are left out."""
        self.inputs: dict[tuple[Letter, int, Run | None], tuple[int, ...]] = {}
        """The same by the streams' numbers within the attention."""

    def draft(self) -> DraftAttention | None:
        if not self.runs:
            return None
        self._find_reads()
        streams = self._build_streams()
        groups = [(run, self._merge(run, group)) for run, group in self._absorb(self._head_sets())]
        self.builder.head_sets[self.layer] = groups
        plans = tuple(group for _, group in groups)
        return DraftAttention(
            streams=streams, projections=self._projections(groups), head_sets=plans
        )

    def _target(self, letter: Letter, head: int) -> int:
        return self.builder.reads.blocks[self.layer].heads[head].targets[letter]

    def _find_reads(self) -> None:
        joins, builder = self.builder.joins, self.builder
        everything = (0, builder.reads.num_groups - 1)
        known: dict[tuple[int, ...], tuple[Want, ...]] = {}
        # Constant rows come beside the others after the LayerNorm, if no query needs them before.
        apart = not any(everything in runs for runs in self.runs.values())
        for head, runs in self.runs.items():
            target = self._target("q", head)
            for run in runs:
                if joins.live(target, run):
                    self.reads["q", head, run] = ((run, builder.keys(target, run)),)
            for letter in ("k", "v"):
                target = self._target(letter, head)
                if not joins.live(target, everything):
                    continue
                keys = builder.keys(target, everything)
                if keys not in known:
                    pieces = joins.runs(target, builder.reads.groups, constants_apart=apart)
                    known[keys] = tuple((piece, builder.keys(target, piece)) for piece in pieces)
                self.reads[letter, head, None] = known[keys]

    def _build_streams(self) -> tuple[Stream, ...]:
        """All streams, small sums first: larger ones can then build on them."""
        targets = {
            want: self._target(letter, head)
            for (letter, head, run), wants in self.reads.items()
            for want in wants
            if run is None
        }
        for (letter, head, run), wants in self.reads.items():
            if run is not None:
                want = _within(wants[0], targets)
                self.reads[letter, head, run] = (want,)
                targets.setdefault(want, self._target(letter, head))

        def size(want: Want) -> int:
            return self.builder.joins.live(targets[want], want[0]).bit_count()

        ordered = sorted(targets, key=size)
        numbers = {want: number for number, want in enumerate(ordered)}
        self.inputs = {
            key: tuple(numbers[want] for want in wants) for key, wants in self.reads.items()
        }
        return tuple(self.builder.build(targets[want], want[0]) for want in ordered)

    def _head_sets(self) -> list[tuple[Run, HeadSetPlan]]:
        """Heads with the same query rows and the same constant inputs, in the order of streams."""
        members: dict[tuple[Run, tuple[Letter, ...]], list[int]] = {}
        for head, runs in self.runs.items():
            for run in runs:
                constant: tuple[Letter, ...] = tuple(
                    letter for letter in LETTERS if not self._inputs(letter, head, run)
                )
                members.setdefault((run, constant), []).append(head)
        return [
            (run, self._head_set(run, constant, heads))
            for (run, constant), heads in members.items()
        ]

    def _inputs(self, letter: Letter, head: int, run: Run) -> tuple[int, ...]:
        """The numbers of the streams that a head's input comes from; none where it is constant."""
        return self.inputs.get((letter, head, run if letter == "q" else None), ())

    def _head_set(
        self, run: Run, constant: tuple[Letter, ...], heads: Sequence[int]
    ) -> HeadSetPlan:
        def order(head: int) -> list[tuple[int, ...]]:
            return [*(self._inputs(letter, head, run) for letter in LETTERS), (head,)]

        return HeadSetPlan(
            heads=tuple(sorted(heads, key=order)),
            rows=self.builder.rows(run),
            constant=constant,
            queries=(),
            keys=(),
            values=(),
            merged_values=False,
        )

    def _absorb(self, groups: list[tuple[Run, HeadSetPlan]]) -> list[tuple[Run, HeadSetPlan]]:
        """Let groups of few queries do without keys or values, where that takes fewer MACs."""
        shape = self.builder.shape
        product = shape.num_tokens * shape.width * shape.head_dim
        computed: dict[str, set[int]] = {"k": set(), "v": set()}
        found = list(groups)
        # What many queries need anyway costs few queries nothing.
        order = sorted(range(len(groups)), key=lambda number: -groups[number][1].rows.count)
        for number in order:
            run, group = found[number]
            for letter, name in _DIRECT.items():
                if letter in group.constant or (letter == "k" and shape.needs_keys):
                    continue
                own = set(group.heads) - computed[letter]
                inputs = {self._inputs(letter, head, run) for head in group.heads}
                direct = replace(group, **{name: min(inputs)})
                saved = (
                    head_set_macs(shape, group) + len(own) * product - head_set_macs(shape, direct)
                )
                if len(inputs) == 1 and saved > 0:
                    group = direct
                else:
                    computed[letter] |= own
            found[number] = run, group
        return found

    def _merge(self, run: Run, group: HeadSetPlan) -> HeadSetPlan:
        """Let absorbed heads do with one product where two that follow each other are slower."""
        inputs = {self._inputs("q", head, run) for head in group.heads}
        merged: list[dict[str, Any]] = []
        if group.keys and "q" not in group.constant and len(inputs) == 1:
            merged.append({"queries": min(inputs)})
        if group.values:
            merged.append({"merged_values": True})
        for change in merged:
            other = replace(group, **change)
            if self.builder.costs.prefers(self.builder.shape, other, group):
                group = other
        return group

    def _projections(self, groups: Iterable[tuple[Run, HeadSetPlan]]) -> tuple[ProjectionPlan, ...]:
        """One product per input; queries of most rows are computed with the keys and values."""
        columns: dict[tuple[tuple[int, ...], Rows], _Columns] = {}
        for letter in reversed(LETTERS):
            for run, group in groups:
                direct = {"q": group.queries, "k": group.keys, "v": group.values}[letter]
                if letter in group.constant or direct:
                    continue
                for head in group.heads:
                    key = self._place(letter, head, run, group.rows, columns)
                    heads: list[int] = getattr(columns.setdefault(key, _Columns()), letter)
                    if head not in heads:
                        heads.append(head)
        return tuple(
            ProjectionPlan(
                streams=streams, rows=rows, q=tuple(item.q), k=tuple(item.k), v=tuple(item.v)
            )
            for (streams, rows), item in sorted(
                columns.items(), key=lambda pair: (pair[0][0], pair[0][1].first, pair[0][1].end)
            )
        )

    def _place(
        self,
        letter: Letter,
        head: int,
        run: Run,
        rows: Rows,
        known: Iterable[tuple[tuple[int, ...], Rows]],
    ) -> tuple[tuple[int, ...], Rows]:
        """The streams and rows of the product that a head input goes to."""
        everything = self.builder.shape.all_rows
        inputs = self._inputs(letter, head, run)
        if letter != "q":
            return inputs, everything
        if 2 * rows.count > everything.count:
            for streams, others in known:
                if others == everything and set(inputs) <= set(streams):
                    return streams, everything
        return inputs, rows


def _within(want: Want, others: Iterable[Want]) -> Want:
    """One of the others that holds the same sums for more groups, or else the want itself."""
    (first, last), keys = want
    for run, others_keys in sorted(others):
        if run[0] <= first and last <= run[1]:
            skipped = first - run[0]
            if others_keys[skipped : skipped + len(keys)] == keys:
                return run, others_keys
    return want
