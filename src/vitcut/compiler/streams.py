"""Streams: the sums that targets read, each built on an earlier one (pass 4 of ``planning.py``).

Everything here is a draft: which sources a sum takes, in which rows. The numbers are folded later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vitcut.compact.plan import EMBED as EMBED_TERM
from vitcut.compact.plan import HeadSetPlan, Rows, StreamPlan, TermPlan, ViTShape
from vitcut.compiler.liveness import EMBED, NOTHING, Joins, Mask, Run, first_sources, union

Marks = tuple[Mask, Mask, Mask]
"""What the constants of a sum come from in one token kind: kept constant sources, ablated sources,
MLPs that lack neurons. Equal marks mean equal constants, up to output biases."""


@dataclass(kw_only=True)
class DraftProduct:
    """What heads of a head set or an MLP write; every stream that adds it shares it."""

    name: str
    run: Run
    """The token kinds that it is computed for."""
    rows: Rows
    """The rows that some stream adds; grows as streams are built, so read it after the last."""
    bias: int
    """Which output bias it carries: 2 * block for attention, 2 * block + 1 for the MLP."""
    readers: int = 0
    """How many streams add it; also final only after the last stream."""


@dataclass(frozen=True, kw_only=True)
class DraftStream:
    """A sum of sources and constants, and what it is computed from."""

    name: str
    run: Run
    rows: Rows
    kept: tuple[Mask, ...]
    """Per kind of the run, the sources that the target keeps."""
    num_sources: int
    """How many sources are written before it."""
    num_biases: int
    """How many output biases are."""
    live: Mask
    """Sources that are added as they are computed, image by image. All others are constants."""
    marks: tuple[Marks, ...]
    """Per kind of the run, what its constants come from."""
    parent: "DraftStream | None"
    """The earlier stream that it is built on."""
    embeds: bool
    """Whether the patch embedding itself is among the terms."""
    products: tuple[DraftProduct, ...]

    @property
    def table_rows(self) -> int:
        """Rows of the constant that it adds: one per token, 1 if all are equal, or 0 for none."""
        before: tuple[Marks, ...] = ((NOTHING, NOTHING, NOTHING),) * len(self.run)
        first_bias = 0
        if self.parent:
            before = self.parent.marks[self.run.start - self.parent.run.start :][: len(self.run)]
            first_bias = self.parent.num_biases
        if self.marks != before:
            return self.rows.count
        # What is left are output biases. None is missing if each came with exactly one product.
        carried = sorted(product.bias for product in self.products)
        has_terms = self.parent or self.embeds or self.products
        return int(carried != list(range(first_bias, self.num_biases)) or not has_terms)

    def plan(self, shape: ViTShape, *, table_rows: int) -> StreamPlan:
        """What the plan says of it, once all streams are built and the rows of products final.

        ``table_rows`` is the property's, or 0 where the bias of a product holds the constants.
        """
        terms: list[TermPlan] = []
        if self.parent:
            terms.append(TermPlan(name=self.parent.name, rows=self.parent.rows))
        if self.embeds:
            terms.append(TermPlan(name=EMBED_TERM, rows=shape.patch_rows))
        terms += [TermPlan(name=product.name, rows=product.rows) for product in self.products]
        return StreamPlan(name=self.name, rows=self.rows, terms=tuple(terms), table_rows=table_rows)


class StreamBuilder:
    """Builds streams in the order in which a model computes them, and remembers them."""

    def __init__(self, shape: ViTShape, joins: Joins) -> None:
        self.shape, self.joins, self.reads = shape, joins, joins.reads
        self.streams: list[DraftStream] = []
        self.head_sets: list[list[tuple[Run, HeadSetPlan]]] = [[] for _ in joins.reads.blocks]
        """By block, with the kinds that ask. The caller adds them before later streams."""
        self.mlps: list[list[DraftProduct]] = [[] for _ in joins.reads.blocks]
        """By block, likewise."""
        self.outputs: list[dict[tuple[int, tuple[int, ...]], DraftProduct]] = [
            {} for _ in joins.reads.blocks
        ]
        """By block, head set and heads: outputs of attention, made as streams ask for them."""
        self._rows_of_kind = tuple(shape.kind_rows.values())

    def rows(self, run: Run) -> Rows:
        """The tokens of a run of kinds."""
        first, last = self._rows_of_kind[run[0]], self._rows_of_kind[run[-1]]
        return Rows(first=first.first, end=last.end)

    def kept(self, target: int, run: Run) -> tuple[Mask, ...]:
        """What a target keeps in each kind of a run: the same for targets that share a stream."""
        return tuple(self.reads.masks[kind][target] for kind in run)

    def build(self, target: int, run: Run) -> DraftStream:
        """Build the stream that a target, and all that read like it, reads in a run of kinds."""
        graph = self.reads.graph
        kept = self.kept(target, run)
        num_sources = graph.num_written(target)
        live = self.joins.live(target, run)
        parent, seen = self._find_parent(kept, live, run, num_sources)
        # The parent may bring constants that were computed along with a varying source.
        extra, live = live & ~seen, live | seen
        products = self._find_products(extra & ~EMBED, run)
        for product in products:
            product.readers += 1
        # Per block there are two biases; that of its attention comes before its MLP reads.
        layer, place = divmod(num_sources - 1, graph.num_heads + 1)
        stream = DraftStream(
            name=f"stream.{len(self.streams)}",
            run=run,
            rows=self.rows(run),
            kept=kept,
            num_sources=num_sources,
            num_biases=2 * layer + (place > 0),
            live=live,
            marks=self._marks(kept, run, live, num_sources),
            parent=parent,
            embeds=bool(extra & EMBED),
            products=tuple(products),
        )
        self.streams.append(stream)
        return stream

    def _find_parent(
        self, kept: Sequence[Mask], live: Mask, run: Run, num_sources: int
    ) -> tuple[DraftStream | None, Mask]:
        """The earlier stream that leaves the fewest sources to add, then the fewest constants.

        Returns:
            The stream, and the sources that it has added in the rows of the run, image by image.
        """
        # Sources that are constant in all of the run may come as a constant, or as computed for
        # other kinds: there, the parent's sum has them already.
        allowed = ~NOTHING
        for kind, own in zip(run, kept, strict=True):
            allowed &= own & ~self.joins.liveness.varying[kind]
        allowed |= live
        # The embedding is zero but in patch rows, which only runs up to the last kind have.
        visible = ~NOTHING if run.stop == self.reads.kinds.stop else ~EMBED
        found: DraftStream | None = None
        found_seen, fewest, fewest_marks = NOTHING, 0, 0
        for stream in reversed(self.streams):
            seen = stream.live & visible
            if not seen or seen & ~allowed or not covers(stream.run, run):
                continue
            missing = (live & ~seen).bit_count()
            if found and missing > fewest:
                continue
            marks = self._marks(kept, run, live | seen, num_sources)
            others = stream.marks[run.start - stream.run.start :]
            differing = sum(
                (one ^ other).bit_count()
                for mine, theirs in zip(marks, others, strict=False)
                for one, other in zip(mine, theirs, strict=True)
            )
            if not found or (missing, differing) < (fewest, fewest_marks):
                found, found_seen, fewest, fewest_marks = stream, seen, missing, differing
        return found, found_seen

    def _marks(
        self, kept: Sequence[Mask], run: Run, live: Mask, num_sources: int
    ) -> tuple[Marks, ...]:
        """Per kind, what the constants of a sum come from."""
        written = first_sources(num_sources)
        # Positions and the class token are constants that come with the varying embedding.
        constant = ~live | EMBED
        if not self.reads.ablates:
            return tuple((own & constant, NOTHING, NOTHING) for own in kept)
        return tuple(
            (own & constant, written & ~own, live & self.reads.cut_neurons[kind])
            for kind, own in zip(run, kept, strict=True)
        )

    def _find_products(self, sources: Mask, run: Run) -> list[DraftProduct]:
        """The products that write some sources in a run of kinds, made where there is none yet."""
        found: list[DraftProduct] = []
        rows = self.rows(run)
        for layer, block in enumerate(self.reads.blocks):
            left = sources & block.sources
            if not left:
                continue
            outputs = self.outputs[layer]
            for number, (own, head_set) in enumerate(self.head_sets[layer]):
                heads = tuple(head for head in head_set.heads if left & block.heads[head].source)
                if not heads or not covers(own, run):
                    continue
                left &= ~union(block.heads[head].source for head in heads)
                product = outputs.get((number, heads))
                if product is None:
                    product = DraftProduct(
                        name=f"out.{layer}.{len(outputs)}", run=own, rows=rows, bias=2 * layer
                    )
                    outputs[number, heads] = product
                product.rows = Rows(
                    first=min(product.rows.first, rows.first), end=max(product.rows.end, rows.end)
                )
                found.append(product)
            if left & block.mlp_source:
                found += [mlp for mlp in self.mlps[layer] if covers(mlp.run, run)]
        return found


def covers(run: Run, other: Run) -> bool:
    """Whether a run contains all kinds of another."""
    return run.start <= other.start and other.stop <= run.stop
