"""The masked model of a circuit that cuts whole heads and neurons, on one residual stream.

It computes what `masked_run` defines, with what stands in for cut parts folded into constants and
into the output weights of kept parts: cut heads and neurons are not computed. So it gets faster as
more is cut, and a backward pass through it needs little memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitcut.circuit import Circuit
from vitcut.compact.layers import ACTIVATIONS
from vitcut.errors import CircuitError
from vitcut.graph import SiteKey
from vitcut.masked.fill import Fill
from vitcut.model.forward import (
    activate,
    attend,
    classify,
    embed,
    norm_and_rotate,
    normalise,
    read_out,
)
from vitcut.model.weights import AttentionWeights, MlpWeights, ViTWeights
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Int, Tensor


@dataclass(frozen=True, kw_only=True)
class Site:
    """The kept heads or neurons of one layer and token kind."""

    features: Int[Tensor, "kept"]
    """Their features among all of the layer: head_dim for each head, one for each neuron."""
    writes: Float[Tensor, "width kept"]
    """What each feature adds to the stream: its output weights, and its share in cut features."""
    constant: Float[Tensor, "#tokens width"]
    """What cut features add whatever the image, and the output bias."""


class Attended(NamedTuple):
    """What the kept heads of a block and token kind attend with."""

    queries: Float[Tensor, "images heads queries head_dim"]
    keys: Float[Tensor, "images heads tokens head_dim"]
    values: Float[Tensor, "images heads tokens head_dim"]
    scale: float

    @property
    def z(self) -> Float[Tensor, "images queries features"]:
        """What they mix."""
        mixed = F.scaled_dot_product_attention(
            self.queries, self.keys, self.values, scale=self.scale
        )
        return mixed.transpose(1, 2).flatten(2)

    @property
    def pattern(self) -> Float[Tensor, "images heads queries tokens"]:
        """How much of each value."""
        return attend(self.queries, self.keys, self.scale)


class Write(NamedTuple):
    """What the kept features of one site were, and the stream right after they were written."""

    features: Float[Tensor, "images tokens kept"]
    stream: Float[Tensor, "images tokens width"]
    """Of the tokens of the kind."""
    attended: Attended | None = None
    """Of heads, what they attend with; None for neurons."""


@dataclass(frozen=True, kw_only=True)
class PartRun:
    """One forward pass."""

    logits: Float[Tensor, "images classes"]
    writes: Mapping[SiteKey, Write]
    """Of the sites that keep something; empty unless asked for."""


class PartModel:
    """A model with whole heads and neurons cut."""

    @torch.no_grad()
    def __init__(self, weights: ViTWeights, circuit: Circuit, fill: Fill) -> None:
        """Fold the fill.

        Args:
            weights: The model.
            circuit: What is kept: each source, in each token kind, is read by all or by none.
            fill: One value for all images.

        Raises:
            CircuitError: The circuit cuts single edges, or the fill belongs to another circuit or
                differs from image to image.
        """
        if circuit.read_by_all is None:
            raise CircuitError("expected a circuit that cuts whole heads and neurons, not edges")
        weights, fill = fill.applied(weights, circuit)
        if fill.sources.ndim != 3:
            raise CircuitError("expected a fill with one value for all images, got one per image")
        self._weights = weights
        self.rows = weights.rows_of(circuit.graph)
        self.sites: dict[SiteKey, Site] = {}
        kinds, graph = len(self.rows), weights.graph
        # [sources of the unsplit graph, kinds]
        alive = torch.from_numpy(circuit.read_by_all.reshape(-1, kinds).copy()).to(weights.device)
        tables = fill.sources
        self._embedding = [
            None if bool(alive[0, kind]) else tables[0, span] for kind, span in enumerate(self.rows)
        ]
        for layer, block in enumerate(weights.blocks):
            heads = slice(graph.head_source(layer, 0), graph.mlp_source(layer))
            head_dim = block.attn.q_weight.shape[1]
            for kind, span in enumerate(self.rows):
                kept = alive[heads, kind]
                out = block.attn.out_weight
                if fill.head_maps is not None:
                    out = out + fill.head_maps[layer, kind]
                constant = block.attn.out_bias + tables[heads, span][~kept].sum(0)
                features = kept.repeat_interleave(head_dim).nonzero().flatten()
                writes = out[kept].permute(1, 0, 2).flatten(1)
                self.sites[layer, "heads", kind] = Site(
                    features=features, writes=writes, constant=constant
                )
                self.sites[layer, "neurons", kind] = self._mlp_site(
                    circuit, fill, layer, kind, alive=bool(alive[graph.mlp_source(layer), kind])
                )

    def _mlp_site(
        self, circuit: Circuit, fill: Fill, layer: int, kind: int, *, alive: bool
    ) -> Site:
        mlp, span = self._weights.blocks[layer].mlp, self.rows[kind]
        kept = torch.full((self._weights.num_neurons,), alive, device=self._weights.device)
        if not alive:
            constant = fill.sources[self._weights.graph.mlp_source(layer), span]
        else:
            constant = torch.zeros_like(mlp.out_bias)[None]
            if circuit.neurons is not None:
                kept = torch.from_numpy(circuit.neurons[layer, kind].copy()).to(kept.device)
            if not kept.all() and fill.neurons is not None:
                constant = fill.neurons[layer, span][:, ~kept] @ mlp.out_weight[:, ~kept].T
        writes = mlp.out_weight
        if fill.neuron_maps is not None:
            writes = writes + fill.neuron_maps[layer, kind]
        return Site(
            features=kept.nonzero().flatten(),
            writes=writes[:, kept],
            constant=constant + mlp.out_bias,
        )

    def run(
        self,
        pixels: Float[Tensor, "images channels y x"],
        *,
        trace: bool = False,
        log_weights: Float[Tensor, "images patches"] | None = None,
    ) -> PartRun:
        """Run the model.

        Args:
            pixels: Normalised images.
            trace: Keep what each site computes.
            log_weights: Logarithms of the patches' weights where the classifier pools them; None
                weighs all alike.
        """
        weights, writes = self._weights, dict[SiteKey, Write]()
        embedded = embed(weights, pixels)
        streams = [
            embedded[:, span] if table is None else table.expand_as(embedded[:, span])
            for span, table in zip(self.rows, self._embedding, strict=True)
        ]

        def write(place: SiteKey, features: Tensor | None, attended: Attended | None) -> None:
            site, kind = self.sites[place], place[2]
            if features is None:
                streams[kind] = streams[kind] + site.constant
                return
            streams[kind] = streams[kind] + (F.linear(features, site.writes) + site.constant)
            if trace:
                writes[place] = Write(features, streams[kind], attended)

        for layer, block in enumerate(weights.blocks):
            for kind, attended in enumerate(self._attend(layer, streams)):
                z = None if attended is None else attended.z
                write((layer, "heads", kind), z, attended)
            for kind in range(len(streams)):
                kept, hidden = self.sites[layer, "neurons", kind].features, None
                if len(kept):
                    normed = normalise(block.mlp_norm, streams[kind])
                    hidden = _activate_some(block.mlp, normed, kept)
                write((layer, "neurons", kind), hidden, None)
        readout = read_out(weights, torch.cat(streams, 1))
        return PartRun(logits=classify(weights, readout, log_weights), writes=writes)

    def _attend(
        self, layer: int, streams: list[Float[Tensor, "images _tokens width"]]
    ) -> list[Attended | None]:
        """What the kept heads of each kind attend with; None where none is kept."""
        block = self._weights.blocks[layer]
        head_dim = block.attn.q_weight.shape[1]
        by_kind = [
            self.sites[layer, "heads", kind].features[::head_dim] // head_dim
            for kind in range(len(streams))
        ]
        heads = torch.cat(by_kind).unique()
        if not len(heads):
            return [None] * len(streams)
        normed = normalise(block.attn_norm, torch.cat(streams, 1))
        k, v = (_project_some(block.attn, letter, normed, heads) for letter in LETTERS[1:])
        found: list[Attended | None] = []
        for rows, kept in zip(self.rows, by_kind, strict=True):
            if not len(kept):
                found.append(None)
                continue
            q = _project_some(block.attn, "q", normed[:, rows], kept, rows)
            keys, values = k, v
            if len(kept) < len(heads):
                chosen = torch.isin(heads, kept)
                keys, values = k[:, chosen], v[:, chosen]
            found.append(Attended(q, keys, values, block.attn.scale))
        return found


def _project_some(
    attn: AttentionWeights,
    letter: Letter,
    normed: Float[Tensor, "images rows width"],
    heads: Int[Tensor, "heads"],
    rows: slice = slice(None),
) -> Float[Tensor, "images heads rows head_dim"]:
    """q, k or v of some heads, for the tokens that are in ``normed``."""
    weight, bias = getattr(attn, f"{letter}_weight")[heads], getattr(attn, f"{letter}_bias")[heads]
    found = F.linear(normed, weight.flatten(0, 1), bias.flatten())
    found = found.unflatten(2, (len(heads), -1)).transpose(1, 2)
    turn = None
    if attn.rotation is not None:
        # [cos and sin, heads or 1, tokens, head_dim]: one rotation may serve all heads.
        turn = attn.rotation if attn.rotation.shape[1] == 1 else attn.rotation[:, heads]
        turn = turn[:, :, rows]
    return norm_and_rotate(attn, letter, found, turn)


def _activate_some(
    mlp: MlpWeights, normed: Float[Tensor, "images rows width"], kept: Int[Tensor, "kept"]
) -> Float[Tensor, "images rows kept"]:
    """Some hidden units of an MLP. A norm over hidden units needs all of them."""
    if mlp.norm is not None:
        return activate(mlp, normed)[..., kept]
    hidden = F.linear(normed, mlp.in_weight[kept], mlp.in_bias[kept])
    if mlp.gate is None:
        return ACTIVATIONS[mlp.activation](hidden)
    weight, bias = mlp.gate
    return ACTIVATIONS[mlp.activation](F.linear(normed, weight[kept], bias[kept])) * hidden
