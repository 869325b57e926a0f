"""Values that depend on no image, computed once: constant sources, inputs and attention patterns.

All are per token kind, [tokens of the group, width], in the precision of the weights.
"""

from functools import cache

import torch

from vitcut.circuit import Circuit
from vitcut.compact.plan import Rows
from vitcut.compiler.reads import EMBED_SOURCE, Reads
from vitcut.compiler.streams import Stream
from vitcut.masked.fill import Fill
from vitcut.model.forward import (
    activate,
    attend,
    embed,
    normalise,
    normalise_last,
    output_bias,
    project_head,
)
from vitcut.model.weights import ViTWeights
from vitcut.names import Letter
from vitcut.shapes import Float, Tensor


class Writers:
    """Output weights of heads and MLPs as a circuit and its fill leave them, per token kind."""

    def __init__(self, weights: ViTWeights, circuit: Circuit, fill: Fill) -> None:
        self._weights = weights
        self._fill = fill
        self._neurons = circuit.neurons
        self.rows = tuple(weights.kind_rows.values())
        """The tokens of each group."""

    def head(self, layer: int, head: int, group: int) -> Float[Tensor, "width head_dim"]:
        """What a head writes of its z, for itself and for cut heads."""
        own = self._weights.blocks[layer].attn.out_weight[head]
        maps = self._fill.head_maps
        return own if maps is None else own + maps[layer, group, head]

    def mlp(self, layer: int, group: int) -> Float[Tensor, "width kept"]:
        """What kept neurons write, for themselves and for cut ones."""
        own = self._weights.blocks[layer].mlp.out_weight
        maps, kept = self._fill.neuron_maps, self.kept_neurons(layer, group)
        # As in the masked model, a fill's maps mean nothing where no neuron can be cut.
        total = own if maps is None or self._neurons is None else own + maps[layer, group]
        return total[:, kept]

    def cut_neurons(self, layer: int, group: int) -> Float[Tensor, "tokens width"]:
        """What the cut neurons of a group write: constants."""
        cut = ~self.kept_neurons(layer, group)
        own = self._weights.blocks[layer].mlp.out_weight[:, cut]
        if self._fill.neurons is None:
            return own.new_zeros(1, len(own))
        return self._fill.neurons[layer][self.rows[group]][:, cut] @ own.T

    def kept_neurons(self, layer: int, group: int) -> Tensor:
        """Which neurons are kept, shape [neurons]."""
        if self._neurons is None:
            return torch.ones(self._weights.num_neurons, dtype=torch.bool)
        return torch.from_numpy(self._neurons[layer, group].copy())


class Constants:
    """The constants of one circuit."""

    def __init__(
        self,
        weights: ViTWeights,
        reads: Reads,
        fill: Fill,
        writers: Writers,
    ) -> None:
        self._weights = weights
        self._reads = reads
        self._fill = fill
        self._writers = writers
        self._value = cache(self._compute_value)
        side = weights.image_size
        blank = fill.sources.new_zeros(1, weights.channels, side, side)
        embedding = embed(weights, blank)[0]
        if weights.patch_norm is not None:
            embedding[weights.num_prefix :] = weights.patch_norm.bias
        self._embedding = embedding
        """What enters block 0 but for what the embedding of a compact model gives."""

    def table(self, stream: Stream) -> Float[Tensor, "rows width"]:
        """All constants that a stream adds to its terms."""
        parts = [self._added(stream, group) for group in range(stream.run[0], stream.run[1] + 1)]
        return torch.cat(parts)

    def normalised_input(self, target: int, group: int) -> Float[Tensor, "tokens width"]:
        """What a constant target of a block reads, after its LayerNorm."""
        item = self._reads.graph.targets[target]
        table = self._input(target, group)
        block = self._weights.blocks[item.layer]
        return normalise(block.mlp_norm if item.role == "mlp" else block.attn_norm, table)

    def read_out(self, group: int) -> Float[Tensor, "features"]:
        """What the classifier reads of a constant group."""
        table, weights = self._input(self._weights.graph.classifier, group), self._weights
        if self._writers.rows[group].stop <= weights.num_read:
            return normalise_last(weights, table).flatten()
        if weights.patch_readout == "mean":
            return normalise_last(weights, table.mean(0))
        return normalise_last(weights, table).mean(0)

    def projected(
        self, layer: int, letter: Letter, head: int, rows: Rows
    ) -> Float[Tensor, "tokens head_dim"]:
        """The constant q, k or v of a head; the attention scale is left out."""
        target = self._reads.graph.head_target(layer, head, letter)
        groups = [
            g for g, own in enumerate(self._writers.rows) if rows.first <= own.start < rows.end
        ]
        normed = torch.cat([self.normalised_input(target, group) for group in groups])
        attn, span = self._weights.blocks[layer].attn, slice(rows.first, rows.end)
        return project_head(attn, letter, head, normed[None], span)[0]

    def pattern(self, layer: int, head: int, rows: Rows) -> Float[Tensor, "queries keys"]:
        """The attention pattern of a head whose q and k are constant."""
        everything = Rows(first=0, end=self._weights.num_tokens)
        q = self.projected(layer, "q", head, rows)
        k = self.projected(layer, "k", head, everything)
        return attend(q, k, self._weights.blocks[layer].attn.scale)

    def _input(self, target: int, group: int) -> Float[Tensor, "tokens width"]:
        """What a constant target reads, before its LayerNorm."""
        num_sources = self._reads.graph.num_written(target)
        return self._sum(self._reads.masks[group][target], 0, num_sources, group)

    def _added(self, stream: Stream, group: int) -> Float[Tensor, "tokens width"]:
        """A stream's constants less those that come with its terms."""
        place = group - stream.run[0]
        total = self._sum(stream.keys[place], stream.live, stream.num_sources, group)
        parent = stream.parent
        if parent:
            key = parent.keys[group - parent.run[0]]
            total = total - self._sum(key, parent.live, parent.num_sources, group)
        for product in stream.products:
            total = total - self._bias(product.bias)
        return total

    def _sum(
        self, kept: int, live: int, num_sources: int, group: int
    ) -> Float[Tensor, "tokens width"]:
        """The constants in the input of a target that keeps some sources, of which some live."""
        rows = self._writers.rows[group]
        total = output_bias(self._weights, num_sources).expand_as(self._embedding[rows])
        for source in range(num_sources):
            if not kept >> source & 1:
                total = total + self._fill.sources[source][rows]
            elif not live >> source & 1 or source == EMBED_SOURCE:
                total = total + self._value(source, group)
            elif self._reads.cut_neurons[group] >> source & 1:
                layer = self._reads.graph.sources[source].layer
                total = total + self._writers.cut_neurons(layer, group)
        return total

    def _bias(self, number: int) -> Float[Tensor, "width"]:
        block = self._weights.blocks[number // 2]
        return block.mlp.out_bias if number % 2 else block.attn.out_bias

    def _compute_value(self, source: int, group: int) -> Float[Tensor, "tokens width"]:
        if source == EMBED_SOURCE:
            return self._embedding[self._writers.rows[group]]
        item = self._reads.graph.sources[source]
        if item.role == "mlp":
            return self._mlp_value(item.layer, group)
        own = self._writers.rows[group]
        rows = Rows(first=own.start, end=own.stop)
        everything = Rows(first=0, end=self._weights.num_tokens)
        v = self.projected(item.layer, "v", item.head, everything)
        z = self.pattern(item.layer, item.head, rows) @ v
        return z @ self._writers.head(item.layer, item.head, group).T

    def _mlp_value(self, layer: int, group: int) -> Float[Tensor, "tokens width"]:
        total = self._writers.cut_neurons(layer, group)
        kept = self._writers.kept_neurons(layer, group)
        if not kept.any():
            return total
        normed = self.normalised_input(self._reads.graph.mlp_target(layer), group)
        hidden = activate(self._weights.blocks[layer].mlp, normed[None])[0]
        return total + hidden[:, kept] @ self._writers.mlp(layer, group).T
