"""What a circuit and its fill leave of a model's weights, and all that depends on no image.

Constants are per token kind, shape [tokens of the kind, width], in the precision of the weights.
"""

from functools import cache

import torch

from vitcut.circuit import Circuit
from vitcut.compact.plan import Rows
from vitcut.compiler.liveness import EMBED, NOTHING, Mask, Reads
from vitcut.compiler.streams import DraftStream
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
from vitcut.shapes import Bool, Float, Tensor


class FilledWeights:
    """A model's output weights with the maps of a fill, and its constants under a circuit."""

    def __init__(self, weights: ViTWeights, circuit: Circuit, reads: Reads, fill: Fill) -> None:
        """``circuit`` is over the model's token kinds, ``fill`` in the precision of the weights."""
        self._weights = weights
        self._neurons = circuit.neurons
        self._reads = reads
        self._fill = fill
        # [blocks, 1 or kinds, ...]: the maps of a fill over whole tokens hold for every kind.
        maps, kinds = (fill.head_maps, fill.neuron_maps), len(reads.kinds)
        self._head_maps, self._neuron_maps = (
            each if each is None else each.expand(-1, kinds, *each.shape[2:]) for each in maps
        )
        self.rows = tuple(weights.kind_rows.values())
        """The tokens of each kind."""
        self._value = cache(self._compute_value)
        # A blank image gives what enters block 0 whatever the image: [tokens width], of positions,
        # prefix tokens and biases. The patch embedding of a compact model has no bias.
        side = weights.image_size
        blank = fill.sources.new_zeros(1, weights.channels, side, side)
        self._embedding = embed(weights, blank)[0]
        if weights.patch_norm is not None:
            # Positions come before this norm, so the compact model adds them. Its bias is left.
            self._embedding[weights.num_prefix :] = weights.patch_norm.bias

    def head(self, layer: int, head: int, kind: int) -> Float[Tensor, "width head_dim"]:
        """What a head writes of its z, for itself and for the cut heads that it predicts."""
        own, maps = self._weights.blocks[layer].attn.out_weight[head], self._head_maps
        return own if maps is None else own + maps[layer, kind, head]

    def mlp(self, layer: int, kind: int) -> Float[Tensor, "width kept"]:
        """What kept neurons write, for themselves and for the cut ones that they predict."""
        own, maps = self._weights.blocks[layer].mlp.out_weight, self._neuron_maps
        # As in the masked model, a fill's maps have no effect where no neuron can be cut.
        total = own if maps is None or self._neurons is None else own + maps[layer, kind]
        return total[:, self.kept_neurons(layer, kind)]

    def cut_neurons(self, layer: int, kind: int) -> Float[Tensor, "tokens width"]:
        """What the cut neurons of a kind write: the same for every image."""
        cut = ~self.kept_neurons(layer, kind)
        own = self._weights.blocks[layer].mlp.out_weight[:, cut]
        if self._fill.neurons is None:
            return own.new_zeros(1, len(own))
        # [tokens cut] x [cut width]
        return self._fill.neurons[layer][self.rows[kind]][:, cut] @ own.T

    def kept_neurons(self, layer: int, kind: int) -> Bool[Tensor, "neurons"]:
        """Which neurons are kept."""
        if self._neurons is None:
            return torch.ones(self._weights.num_neurons, dtype=torch.bool)
        return torch.from_numpy(self._neurons[layer, kind].copy())

    def table(self, stream: DraftStream) -> Float[Tensor, "rows width"]:
        """All constants that a stream adds to its terms."""
        parts: list[Tensor] = []
        for place, kind in enumerate(stream.run):
            total = self._sum(stream.kept[place], stream.live, stream.num_sources, kind)
            # The parent brings its own constants, and each product the bias of its block.
            if parent := stream.parent:
                kept = parent.kept[kind - parent.run.start]
                total = total - self._sum(kept, parent.live, parent.num_sources, kind)
            for product in stream.products:
                block = self._weights.blocks[product.bias // 2]
                total = total - (block.mlp if product.bias % 2 else block.attn).out_bias
            parts.append(total)
        return torch.cat(parts)

    def read_out(self, kind: int) -> Float[Tensor, "features"]:
        """What the classifier reads of a constant kind: prefix tokens, or the mean of patches."""
        weights = self._weights
        table = self._input(weights.graph.classifier, kind)
        if self.rows[kind].stop <= weights.num_read:
            return normalise_last(weights, table).flatten()
        if weights.patch_readout == "mean":
            return normalise_last(weights, table.mean(0))
        return normalise_last(weights, table).mean(0)

    def projected(
        self, layer: int, letter: Letter, head: int, rows: Rows
    ) -> Float[Tensor, "tokens head_dim"]:
        """The constant q, k or v of a head, without the attention scale."""
        target = self._reads.graph.head_target(layer, head, letter)
        normed = torch.cat(
            [
                self._normalised_input(target, kind)
                for kind, own in enumerate(self.rows)
                if rows.first <= own.start < rows.end
            ]
        )
        attn, span = self._weights.blocks[layer].attn, slice(rows.first, rows.end)
        return project_head(attn, letter, head, normed[None], span)[0]

    def _normalised_input(self, target: int, kind: int) -> Float[Tensor, "tokens width"]:
        """What a constant target of a block reads, after its LayerNorm."""
        item = self._reads.graph.targets[target]
        block = self._weights.blocks[item.layer]
        norm = block.mlp_norm if item.role == "mlp" else block.attn_norm
        return normalise(norm, self._input(target, kind))

    def _input(self, target: int, kind: int) -> Float[Tensor, "tokens width"]:
        """What a constant target reads, before its LayerNorm."""
        num_sources = self._reads.graph.num_written(target)
        return self._sum(self._reads.masks[kind][target], NOTHING, num_sources, kind)

    def _sum(
        self, kept: Mask, live: Mask, num_sources: int, kind: int
    ) -> Float[Tensor, "tokens width"]:
        """The constants in the input of a target that keeps some sources.

        Args:
            kept: What the target keeps.
            live: The sources that come as they are computed, image by image.
            num_sources: How many sources are written before the target.
            kind: The token kind.
        """
        rows = self.rows[kind]
        # Summed in the order of writing, as in the masked model.
        total = output_bias(self._weights, num_sources).expand_as(self._embedding[rows])
        for number in range(num_sources):
            source = 1 << number
            if not kept & source:
                total = total + self._fill.sources[number][rows]
            elif not live & source or source == EMBED:
                # Also of a live embedding: prefix tokens and positions are constants beside it.
                total = total + self._value(number, kind)
            elif self._reads.cut_neurons[kind] & source:
                layer = self._reads.graph.sources[number].layer
                total = total + self.cut_neurons(layer, kind)
        return total

    def _compute_value(self, source: int, kind: int) -> Float[Tensor, "tokens width"]:
        """What a constant source writes."""
        own = self.rows[kind]
        item = self._reads.graph.sources[source]
        layer, head = item.layer, item.head
        if item.role == "embed":
            return self._embedding[own]
        block = self._weights.blocks[layer]
        if item.role == "head":
            q = self.projected(layer, "q", head, Rows(first=own.start, end=own.stop))
            all_rows = self._weights.shape.all_rows
            k, v = (self.projected(layer, letter, head, all_rows) for letter in ("k", "v"))
            # [queries keys] x [keys head_dim] x [head_dim width]
            return attend(q, k, block.attn.scale) @ v @ self.head(layer, head, kind).T
        total = self.cut_neurons(layer, kind)
        kept = self.kept_neurons(layer, kind)
        if not kept.any():
            return total
        normed = self._normalised_input(self._reads.graph.mlp_target(layer), kind)
        hidden = activate(block.mlp, normed[None])[0]
        return total + hidden[:, kept] @ self.mlp(layer, kind).T
