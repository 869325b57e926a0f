"""Pass c of planning: streams, the sums that targets read, each built on an earlier one.

What the products around them are is left to ``planning.py``, the numbers to ``folding.py``.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vitcut.circuit import Circuit
from vitcut.compact.plan import EMBED, HeadGroupPlan, OutputPlan, Rows, StreamPlan
from vitcut.compiler.liveness import Liveness

EMBED_SOURCE = 0
"""The number of ``embed`` among the sources of any graph."""

Item = tuple[Literal["position", "attention_bias", "mlp_bias", "value", "ablated"], int]
"""One constant that a target's input is made of.

``position`` (0): the embedding of an image whose patches are all zero; ``attention_bias`` and
``mlp_bias`` (block): output biases; ``value`` (source): what a constant source writes;
``ablated`` (source): what stands in for a cut edge.
"""
Items = Counter[Item]
"""How often each constant is added; a negative count takes it away again."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A sum of sources and constants, and how it is made from what is there already."""

    name: str
    rows: Rows
    sources: frozenset[int]
    """The sources that depend on the image."""
    items: Items
    """All constants in the sum."""
    terms: tuple[str, ...]
    added: Items
    """The constants to be added to the terms."""


@dataclass(kw_only=True)
class Output:
    """A product from some heads of a group to the stream; all streams share it."""

    name: str
    group: int
    heads: tuple[int, ...]
    rows: Rows


def input_items(circuit: Circuit, liveness: Liveness, target: int) -> Items:
    """The constants in a target's input, ``embed``'s included."""
    graph = circuit.graph
    readable = graph.num_written(target)
    items: Items = Counter()
    for source in range(readable):
        kept = circuit.kept[source, target]
        if kept and source == EMBED_SOURCE:
            items["position", 0] += 1
        elif kept and source in liveness.constant_sources:
            items["value", source] += 1
        elif not kept and circuit.ablation != "zero":
            items["ablated", source] += 1
    for layer in range(graph.num_layers):
        if readable >= graph.mlp_source(layer):
            items["attention_bias", layer] += 1
        if readable > graph.mlp_source(layer):
            items["mlp_bias", layer] += 1
    return items


@dataclass(kw_only=True)
class StreamBuilder:
    """Builds streams in the order in which a model needs them."""

    circuit: Circuit
    liveness: Liveness
    streams: list[Stream] = field(default_factory=list[Stream])
    groups: dict[int, tuple[HeadGroupPlan, ...]] = field(
        default_factory=dict[int, tuple[HeadGroupPlan, ...]]
    )
    """Head groups by block; added by the caller as soon as a block's are known."""
    outputs: dict[int, list[Output]] = field(default_factory=dict[int, list[Output]])
    """Products to the stream by block."""

    def live_sources(self, target: int) -> frozenset[int]:
        """The kept sources of a target that depend on the image."""
        kept = np.flatnonzero(self.circuit.kept[:, target]).tolist()
        return frozenset(kept) - self.liveness.constant_sources

    def build(self, target: int, rows: Rows) -> Stream:
        """The stream that a target, and all that read like it, reads in the given rows."""
        items = input_items(self.circuit, self.liveness, target)
        sources = self.live_sources(target)
        parent = self._parent(sources, items, rows)
        extra = sources - parent.sources if parent else sources
        terms, carried = self._terms(extra, rows)
        added = Counter(items)
        added.subtract(carried)
        if parent:
            terms = [parent.name, *terms]
            added.subtract(parent.items)
        stream = Stream(
            name=f"stream.{len(self.streams)}",
            rows=rows,
            sources=sources,
            items=items,
            terms=tuple(terms),
            added=Counter({item: count for item, count in added.items() if count}),
        )
        self.streams.append(stream)
        return stream

    def output_plans(self, layer: int) -> tuple[OutputPlan, ...]:
        """A block's products to the stream; complete once all streams are built."""
        return tuple(
            OutputPlan(name=item.name, group=item.group, heads=item.heads, rows=item.rows)
            for item in self.outputs.get(layer, [])
        )

    def _parent(self, sources: frozenset[int], items: Items, rows: Rows) -> Stream | None:
        """The earlier stream that leaves the least to add: fewest sources, then constants."""
        # The class token's row of the patch embedding is zero: there, embed adds nothing.
        free = {EMBED_SOURCE} if rows == "readout" else set[int]()
        fitting = [
            stream
            for stream in self.streams
            if set() < stream.sources - free <= sources
            and (rows == "readout" or stream.rows == "all")
        ]

        def missing(stream: Stream) -> tuple[int, int]:
            difference = Counter(items)
            difference.subtract(stream.items)
            return len(sources - free - stream.sources), sum(map(bool, difference.values()))

        return min(reversed(fitting), key=missing, default=None)

    def _terms(self, sources: frozenset[int], rows: Rows) -> tuple[list[str], Items]:
        """Names of writers that add up to ``sources``, and the constants that they carry."""
        graph = self.circuit.graph
        terms: list[str] = []
        carried: Items = Counter()
        if EMBED_SOURCE in sources and rows == "all":
            terms.append(EMBED)
        for layer in range(graph.num_layers):
            heads = [h for h in range(graph.num_heads) if graph.head_source(layer, h) in sources]
            for number, group in enumerate(self.groups.get(layer, ())):
                chosen = tuple(head for head in group.heads if head in heads)
                if chosen:
                    terms.append(self._output(layer, number, chosen, rows))
                    carried["attention_bias", layer] += 1
            if graph.mlp_source(layer) in sources:
                terms.append(f"mlp.{layer}")
                carried["mlp_bias", layer] += 1
        return terms, carried

    def _output(self, layer: int, group: int, heads: tuple[int, ...], rows: Rows) -> str:
        known = self.outputs.setdefault(layer, [])
        for item in known:
            if (item.group, item.heads) == (group, heads):
                item.rows = "all" if rows == "all" else item.rows
                return item.name
        name = f"out.{layer}.{len(known)}"
        known.append(Output(name=name, group=group, heads=heads, rows=rows))
        return name


def stream_plan(stream: Stream, num_tokens: int) -> StreamPlan:
    """What the plan says of a stream."""
    same_everywhere = all(kind in {"attention_bias", "mlp_bias"} for kind, _ in stream.added)
    one_row = same_everywhere or stream.rows == "readout"
    table_rows = 0 if not stream.added else 1 if one_row else num_tokens
    return StreamPlan(name=stream.name, rows=stream.rows, terms=stream.terms, table_rows=table_rows)
