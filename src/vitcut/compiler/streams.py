"""Pass d of planning: streams, the sums that targets read, each built on an earlier one.

What the products around them are is left to ``planning.py``, the numbers to ``folding.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from vitcut.compact.plan import EMBED, HeadSetPlan, Rows, StreamPlan, TermPlan, ViTShape
from vitcut.compiler.cost import CostModel
from vitcut.compiler.joining import Joins, Run
from vitcut.compiler.liveness import Liveness
from vitcut.compiler.reads import EMBED_BIT, Reads


@dataclass(kw_only=True)
class Product:
    """What heads of a group or an MLP write; every stream that adds it shares it."""

    name: str
    layer: int
    run: Run
    rows: Rows
    bias: int
    """Which output bias it carries: 2 x block for attention, one more for the MLP."""
    head_set: int = -1
    """Number of the head set within the block's attention; -1 for an MLP."""
    heads: tuple[int, ...] = ()
    readers: int = 0
    """How many streams add it."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A sum of sources and constants, and how it is made from what is there already."""

    name: str
    run: Run
    rows: Rows
    keys: tuple[int, ...]
    """Per group the sources that are kept."""
    num_sources: int
    """How many sources are written before it."""
    num_biases: int
    """How many output biases are."""
    live: int
    """The sources that are added as they come, image by image; all others are constants."""
    marks: tuple[int, ...]
    """Per group its constants, biases left out, in one number: equal where they are."""
    parent: "Stream | None"
    embeds: bool
    """Whether the patch embedding itself is among the terms."""
    products: tuple[Product, ...]

    @property
    def adds_biases(self) -> bool:
        """Whether its output biases are not just those of its parent and its products."""
        first = self.parent.num_biases if self.parent else 0
        carried = sorted(product.bias for product in self.products)
        return carried != list(range(first, self.num_biases))

    @property
    def adds_tables(self) -> bool:
        """Whether it adds constants that differ between tokens."""
        before = (0,) * len(self.keys)
        if self.parent:
            skipped = self.run[0] - self.parent.run[0]
            before = self.parent.marks[skipped : skipped + len(self.keys)]
        return self.marks != before


@dataclass(kw_only=True)
class StreamBuilder:
    """Builds streams in the order in which a model needs them."""

    shape: ViTShape
    reads: Reads
    liveness: Liveness
    joins: Joins
    costs: CostModel
    streams: list[Stream] = field(default_factory=list[Stream])
    products: dict[int, list[Product]] = field(default_factory=dict[int, list[Product]])
    """By block: outputs of attention as streams ask for them, MLPs as they are planned."""
    head_sets: dict[int, list[tuple[Run, HeadSetPlan]]] = field(
        default_factory=dict[int, list[tuple[Run, HeadSetPlan]]]
    )
    """Head groups by block; added by the caller as soon as a block's are known."""

    def __post_init__(self) -> None:
        self._spans = tuple(self.shape.kind_rows.values())

    def rows(self, run: Run) -> Rows:
        """The tokens of a run of groups."""
        return Rows(first=self._spans[run[0]].first, end=self._spans[run[1]].end)

    def keys(self, target: int, run: Run) -> tuple[int, ...]:
        """What a target keeps in each group of a run: equal for targets that read the same."""
        return tuple(self.reads.masks[group][target] for group in range(run[0], run[1] + 1))

    def build(self, target: int, run: Run) -> Stream:
        """The stream that a target, and all that read like it, reads in a run of groups."""
        keys = self.keys(target, run)
        graph = self.reads.graph
        num_sources = graph.num_written(target)
        layer, place = divmod(num_sources - 1, graph.num_heads + 1)
        live = self.joins.live(target, run)
        parent = self._parent(keys, live, run, num_sources)
        seen = self._seen(parent, run) if parent else 0
        extra, live = live & ~seen, live | seen
        products = self._products(extra & ~EMBED_BIT, run)
        for product in products:
            product.readers += 1
        stream = Stream(
            name=f"stream.{len(self.streams)}",
            run=run,
            rows=self.rows(run),
            keys=keys,
            num_sources=num_sources,
            num_biases=2 * layer + (place > 0),
            live=live,
            marks=self._marks(keys, run, live, num_sources),
            parent=parent,
            embeds=bool(extra & EMBED_BIT),
            products=tuple(products),
        )
        self.streams.append(stream)
        return stream

    def add_mlp(self, layer: int, run: Run, name: str) -> None:
        """Make an MLP known, as soon as its stream is built."""
        product = Product(name=name, layer=layer, run=run, rows=self.rows(run), bias=2 * layer + 1)
        self.products.setdefault(layer, []).append(product)

    def _seen(self, stream: Stream, run: Run) -> int:
        """What a stream adds image by image within a run: in rows of no patch, embed is zero."""
        return stream.live if run[1] == self.reads.num_groups - 1 else stream.live & ~EMBED_BIT

    def _constants(self, keys: Iterable[int], run: Run) -> int:
        """Kept sources that are constant in a run: they may come as they are computed, too."""
        total = -1
        for group, kept in enumerate(keys, run[0]):
            total &= kept & ~self.liveness.varying[group]
        return total

    def _parent(
        self, keys: tuple[int, ...], live: int, run: Run, num_sources: int
    ) -> Stream | None:
        """The earlier stream that leaves the least to add: fewest sources, then constants."""
        allowed = live | self._constants(keys, run)
        best: tuple[int, int] | None = None
        found: Stream | None = None
        for stream in reversed(self.streams):
            seen = self._seen(stream, run)
            if not seen or seen & ~allowed or not _covers(stream.run, run):
                continue
            marks = self._marks(keys, run, live | seen, num_sources)
            others = stream.marks[run[0] - stream.run[0] :]
            different = sum((x ^ y).bit_count() for x, y in zip(marks, others, strict=False))
            cost = (live & ~seen).bit_count(), different
            if best is None or cost < best:
                best, found = cost, stream
        return found

    def _marks(self, keys: Iterable[int], run: Run, live: int, num_sources: int) -> tuple[int, ...]:
        """Per group the constants of a sum: values, ablated sources, MLPs that lack neurons."""
        full, width = (1 << num_sources) - 1, len(self.reads.graph.sources)
        marks: list[int] = []
        for group, kept in enumerate(keys, run[0]):
            mark = kept & ~(live & ~EMBED_BIT)
            if self.reads.ablates:
                mark |= (full & ~kept) << width
                mark |= (live & self.reads.cut_neurons[group]) << 2 * width
            marks.append(mark)
        return tuple(marks)

    def _products(self, sources: int, run: Run) -> list[Product]:
        """What writes the given sources in a run of groups."""
        found: list[Product] = []
        graph = self.reads.graph
        per_block = graph.num_heads + 1
        for layer in range(graph.num_layers):
            bits = sources >> (1 + layer * per_block) & ((1 << per_block) - 1)
            if not bits:
                continue
            for number, (own, group) in enumerate(self.head_sets.get(layer, ())):
                heads = tuple(head for head in group.heads if bits >> head & 1)
                if heads and _covers(own, run):
                    found.append(self._output(layer, number, heads, run))
                    bits &= ~sum(1 << head for head in heads)
            if bits >> graph.num_heads:
                found += [
                    product
                    for product in self.products.get(layer, ())
                    if product.head_set < 0 and _covers(product.run, run)
                ]
        return found

    def _output(self, layer: int, group: int, heads: tuple[int, ...], run: Run) -> Product:
        known = self.products.setdefault(layer, [])
        rows = self.rows(run)
        for product in known:
            if (product.head_set, product.heads) == (group, heads):
                old = product.rows
                product.rows = Rows(first=min(old.first, rows.first), end=max(old.end, rows.end))
                return product
        outputs = sum(product.head_set >= 0 for product in known)
        name = f"out.{layer}.{outputs}"
        own = self.head_sets[layer][group][0]
        made = Product(
            name=name, layer=layer, run=own, rows=rows, bias=2 * layer, head_set=group, heads=heads
        )
        known.append(made)
        return made


def stream_plan(stream: Stream, shape: ViTShape, *, table_rows: int) -> StreamPlan:
    """What the plan says of a stream; complete once all streams are built."""
    terms: list[TermPlan] = []
    if stream.parent:
        terms.append(TermPlan(name=stream.parent.name, rows=stream.parent.rows))
    if stream.embeds:
        terms.append(TermPlan(name=EMBED, rows=shape.patch_rows))
    terms += [TermPlan(name=product.name, rows=product.rows) for product in stream.products]
    return StreamPlan(name=stream.name, rows=stream.rows, terms=tuple(terms), table_rows=table_rows)


def table_rows(stream: Stream) -> int:
    """Rows of the constant that a stream adds."""
    if stream.adds_tables:
        return stream.rows.count
    has_terms = stream.parent or stream.embeds or stream.products
    return int(stream.adds_biases or not has_terms)


def _covers(run: Run, other: Run) -> bool:
    return run[0] <= other[0] and other[1] <= run[1]
