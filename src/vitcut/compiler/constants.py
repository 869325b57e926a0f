"""Values that depend on no image, computed once: constant sources, inputs and attention patterns.

All tables are [tokens, width] in the precision of the weights. Rows that nothing reads may hold
arbitrary numbers: a source that is constant in the class token's row alone is one such case.
"""

from collections.abc import Mapping
from functools import cache

import torch

from vitcut.circuit import Circuit
from vitcut.compiler.liveness import Liveness
from vitcut.compiler.streams import EMBED_SOURCE, Item, input_items
from vitcut.intervention.forward import (
    attend,
    embed,
    normalise,
    project_head,
    run_mlp,
    write_head,
)
from vitcut.names import Letter
from vitcut.shapes import Float, Tensor
from vitcut.vits.weights import ViTWeights


class Constants:
    """The constants of one circuit."""

    def __init__(
        self,
        weights: ViTWeights,
        circuit: Circuit,
        liveness: Liveness,
        ablated: Float[Tensor, "sources tokens width"],
    ) -> None:
        self._weights = weights
        self._circuit = circuit
        self._liveness = liveness
        self._ablated = ablated
        self._value = cache(self._compute_value)

    def table(self, items: Mapping[Item, int]) -> Float[Tensor, "tokens width"]:
        """The sum of some constants."""
        total = torch.zeros_like(self._ablated[EMBED_SOURCE])
        for item, count in items.items():
            total = total + count * self._item(item)
        return total

    def normalised_input(self, target: int) -> Float[Tensor, "tokens width"]:
        """What a constant target reads, after its LayerNorm."""
        item = self._circuit.graph.targets[target]
        table = self.table(input_items(self._circuit, self._liveness, target))
        if item.kind == "classifier":
            return normalise(self._weights.norm, table)
        block = self._weights.blocks[item.layer]
        return normalise(block.mlp_norm if item.kind == "mlp" else block.attn_norm, table)

    def projected(self, layer: int, letter: Letter, head: int) -> Float[Tensor, "tokens head_dim"]:
        """The constant q, k or v of a head; the attention scale is left out."""
        normed = self.normalised_input(self._circuit.graph.head_target(layer, head, letter))
        return project_head(self._weights.blocks[layer].attn, letter, head, normed[None])[0]

    def pattern(self, layer: int, head: int) -> Float[Tensor, "queries keys"]:
        """The attention pattern of a head whose q and k are constant."""
        q, k = self.projected(layer, "q", head), self.projected(layer, "k", head)
        return attend(q, k, self._weights.blocks[layer].attn.scale)

    def _item(self, item: Item) -> Float[Tensor, "*tokens width"]:
        kind, number = item
        if kind == "position":
            return self._position()
        if kind == "ablated":
            return self._ablated[number]
        if kind == "value":
            return self._value(number)
        block = self._weights.blocks[number]
        return block.attn.out_bias if kind == "attention_bias" else block.mlp.out_bias

    def _position(self) -> Float[Tensor, "tokens width"]:
        side = self._weights.image_size
        blank = self._ablated.new_zeros(1, self._weights.channels, side, side)
        return embed(self._weights, blank)[0]

    def _compute_value(self, source: int) -> Float[Tensor, "tokens width"]:
        item = self._circuit.graph.sources[source]
        block = self._weights.blocks[item.layer]
        if item.kind == "mlp":
            target = self._circuit.graph.mlp_target(item.layer)
            return run_mlp(block.mlp, self.normalised_input(target)[None])[0]
        z = self.pattern(item.layer, item.head) @ self.projected(item.layer, "v", item.head)
        return write_head(block.attn, item.head, z[None])[0]
