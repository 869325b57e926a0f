"""Folding: the tensors of a compact model from a draft, weights and a fill, in float64.

LayerNorm's affine part goes into the product that follows, the attention scale into q, constants
into tables, the maps of a fill into the output weights. A target's LayerNorm is applied to the same
sum as in the masked model, so this is exact up to rounding.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vitcut.circuit import Circuit
from vitcut.compact.plan import AttentionPlan, HeadSetPlan, MlpPlan, OutputPlan, Rows, StreamPlan
from vitcut.compiler.constants import Constants, Writers
from vitcut.compiler.planning import Draft
from vitcut.errors import CircuitError
from vitcut.masked.fill import Fill
from vitcut.model.weights import NormWeights, ViTWeights
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Tensor

Tensors = dict[str, Tensor]
"""Tensors by their name in the module's ``state_dict``."""


def fold(draft: Draft, weights: ViTWeights, circuit: Circuit, fill: Fill) -> Tensors:
    """The compact model's ``state_dict``, in float64.

    Args:
        draft: The circuit's plan.
        weights: The model.
        circuit: The circuit, over the token kinds of the model.
        fill: What stands in for cut parts.

    Raises:
        CircuitError: The fill does not fit the model.
    """
    plain = weights.to(torch.float64, "cpu")
    double = _over_groups(fill.like(plain.patch_weight), circuit.graph.num_kinds)
    _require_tables(plain, double)
    return _Folder(draft, plain, Writers(plain, circuit, double), double).fold()


def _over_groups(fill: Fill, groups: int) -> Fill:
    """A fill whose maps, if any, are per token kind."""

    def expand(maps: Tensor | None) -> Tensor | None:
        if maps is None:
            return None
        return maps.expand(-1, groups, *maps.shape[2:])

    return replace(fill, head_maps=expand(fill.head_maps), neuron_maps=expand(fill.neuron_maps))


def _require_tables(weights: ViTWeights, fill: Fill) -> None:
    expected = (len(weights.graph.sources), weights.num_tokens, weights.width)
    if tuple(fill.sources.shape) != expected:
        raise CircuitError(
            f"the fill's sources must have shape {expected} (sources, tokens, width), got "
            f"{tuple(fill.sources.shape)}"
        )
    hidden = (len(weights.blocks), weights.num_tokens, weights.num_neurons)
    if fill.neurons is not None and tuple(fill.neurons.shape) != hidden:
        raise CircuitError(
            f"the fill's neurons must have shape {hidden} (blocks, tokens, neurons), got "
            f"{tuple(fill.neurons.shape)}"
        )


class _Folder:
    """Walks the plan and gathers the tensors."""

    def __init__(self, draft: Draft, weights: ViTWeights, writers: Writers, fill: Fill) -> None:
        self.draft = draft
        self.weights = weights
        self.writers = writers
        self.constants = Constants(weights, draft.reads, fill, writers)
        self.tensors: Tensors = {}
        self.moved: dict[str, Tensor] = {}
        """Biases that their product's only reader holds elsewhere."""
        self.holders: dict[str, str] = {}
        """Per stream without a table the bias that holds its constants, where one does."""

    def fold(self) -> Tensors:
        plan = self.draft.plan
        if plan.embeds:
            self._embed()
        for layer, block in enumerate(plan.blocks):
            if block.attention is not None:
                self._attention(layer, block.attention)
            for number, mlp in enumerate(block.mlps):
                self._mlp(f"blocks.{layer}.mlps.{number}", layer, mlp)
        self._classifier(plan.readout)
        self._fill_holders()
        return self.tensors

    def _embed(self) -> None:
        weights = self.weights
        self.tensors["patch_embed.weight"] = weights.patch_weight
        if weights.patch_norm is not None:
            self.tensors["positions"] = weights.positions + weights.patch_bias
            self.tensors["embed_norm.weight"] = weights.patch_norm.weight

    def _classifier(self, streams: Sequence[StreamPlan]) -> None:
        """The product behind all that is read; what of that is constant goes into its bias."""
        weights, live = self.weights, {self._group_of(stream.rows) for stream in streams}
        prefix = weights.num_read * weights.width
        by_group = [weights.head_weight[:, :prefix], weights.head_weight[:, prefix:]]
        by_group = [weight for weight in by_group if weight.numel()]
        products: list[Tensor] = []
        bias = weights.head_bias
        for group, own in zip(self.draft.reads.readout, by_group, strict=True):
            if group not in live:
                bias = bias + own @ self.constants.read_out(group)
                continue
            for weight in own.split(weights.width, dim=1):
                product = weight
                if weights.norm is not None:
                    product, bias = _after_norm(weights.norm, weight, bias)
                products.append(product)
        for number, stream in enumerate(streams):
            self._stream(f"readout.{number}", stream)
        if products:
            self._linear("classifier", torch.cat(products, dim=1), bias)
        else:
            self.tensors["logits"] = bias

    def _attention(self, layer: int, plan: AttentionPlan) -> None:
        prefix = f"blocks.{layer}.attention"
        for number, stream in enumerate(plan.streams):
            self._stream(f"{prefix}.streams.{number}", stream)
        for number, projection in enumerate(plan.projections):
            columns = [
                self._letter(layer, letter, head)
                for letter in LETTERS
                for head in getattr(projection, letter)
            ]
            weight, bias = (torch.cat(parts) for parts in zip(*columns, strict=True))
            self._linear(f"{prefix}.projections.{number}", weight, bias)
        for number, group in enumerate(plan.head_sets):
            self._set_tables(f"{prefix}.head_sets.{number}", layer, group)
        for number, output in enumerate(plan.outputs):
            self._output(f"{prefix}.outputs.{number}.product", layer, output, plan)

    def _letter(self, layer: int, letter: Letter, head: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a head's q, k or v behind a LayerNorm; q is scaled."""
        block = self.weights.blocks[layer]
        # A norm behind the product would undo a scale before it.
        scale = block.attn.scale if letter == "q" and block.attn.q_norm is None else 1.0
        weight = getattr(block.attn, f"{letter}_weight")[head]
        bias = getattr(block.attn, f"{letter}_bias")[head]
        return _after_norm(block.attn_norm, weight * scale, bias * scale)

    def _set_tables(self, prefix: str, layer: int, group: HeadSetPlan) -> None:
        everything = self.draft.plan.shape.all_rows
        tables: dict[Letter, list[Tensor]] = {}
        for letter in group.constant:
            rows = group.rows if letter == "q" else everything
            tables[letter] = [
                self.constants.projected(layer, letter, head, rows) for head in group.heads
            ]
        q = [table * self.weights.blocks[layer].attn.scale for table in tables.get("q", ())]
        keys, values = (
            [self._letter(layer, letter, head)[0] for head in group.heads] for letter in ("k", "v")
        )
        found: dict[str, Tensor] = {}
        self._places(prefix, layer, group)
        if group.fixed_pattern:
            found["tables.pattern"] = torch.softmax(
                torch.stack(q) @ torch.stack(tables["k"]).mT, -1
            )
        elif group.keys and q:
            products = [one @ key for one, key in zip(q, keys, strict=True)]
            self.tensors[f"{prefix}.tables.q"] = torch.cat(products)
        elif q:
            found["tables.q"] = torch.stack(q)
        elif "k" in tables:
            found["tables.k"] = torch.stack(tables["k"])
        if "v" in tables:
            found["tables.v"] = torch.stack(tables["v"])
        self.tensors |= {f"{prefix}.{name}": table[None] for name, table in found.items()}
        if group.queries:
            merged = [
                (key.T @ weight, key.T @ bias)
                for key, (weight, bias) in zip(
                    keys, (self._letter(layer, "q", head) for head in group.heads), strict=True
                )
            ]
            weight, bias = (torch.cat(parts) for parts in zip(*merged, strict=True))
            self._linear(f"{prefix}.queries", weight, bias)
        elif group.keys and not q:
            self.tensors[f"{prefix}.key_weight"] = torch.stack(keys)
        if group.values and not group.merged_values:
            self.tensors[f"{prefix}.value_weight"] = torch.stack(values).mT

    def _places(self, prefix: str, layer: int, group: HeadSetPlan) -> None:
        """Norms and rotary positions of queries and keys that are computed."""
        attn = self.weights.blocks[layer].attn
        rows = {"q": group.rows, "k": self.draft.plan.shape.all_rows}
        for letter, norm in (("q", attn.q_norm), ("k", attn.k_norm)):
            if letter in group.constant:
                continue
            if norm is not None:
                scale = attn.scale if letter == "q" else 1.0
                self.tensors[f"{prefix}.norms.{letter}.weight"] = norm.weight * scale
                self.tensors[f"{prefix}.norms.{letter}.bias"] = norm.bias * scale
            if attn.rotation is not None:
                heads = list(group.heads) if attn.rotation.shape[1] > 1 else [0]
                own = attn.rotation[:, heads, rows[letter].first : rows[letter].end]
                each = own.expand(-1, len(group.heads), -1, -1)
                self.tensors[f"{prefix}.{letter}_rotation"] = each

    def _output(self, prefix: str, layer: int, plan: OutputPlan, attention: AttentionPlan) -> None:
        group = attention.head_sets[plan.head_set]
        number = self._group_of(group.rows)
        parts = [self.writers.head(layer, head, number) for head in plan.heads]
        bias = self.weights.blocks[layer].attn.out_bias
        if group.values:
            # A mixture of tokens takes each with a share, and the shares add up to 1.
            letters = [self._letter(layer, "v", head) for head in plan.heads]
            for part, (_, own) in zip(parts, letters, strict=True):
                bias = bias + part @ own
            if group.merged_values:
                parts = [part @ weight for part, (weight, _) in zip(parts, letters, strict=True)]
        self._product(prefix, plan.name, torch.cat(parts, dim=1), bias)

    def _mlp(self, prefix: str, layer: int, plan: MlpPlan) -> None:
        block = self.weights.blocks[layer]
        group = self._group_of(plan.stream.rows)
        kept = self.writers.kept_neurons(layer, group)
        computed = kept.nonzero()[:, 0]
        if block.mlp.norm is not None:
            # It takes all neurons; those that are read come first.
            computed = torch.cat([computed, (~kept).nonzero()[:, 0]])
        self._stream(f"{prefix}.stream", plan.stream)
        weight, bias = _after_norm(
            block.mlp_norm, block.mlp.in_weight[computed], block.mlp.in_bias[computed]
        )
        if block.mlp.gate is not None:
            gate_weight, gate_bias = block.mlp.gate
            gate = _after_norm(block.mlp_norm, gate_weight[computed], gate_bias[computed])
            weight, bias = torch.cat([gate[0], weight]), torch.cat([gate[1], bias])
        self._linear(f"{prefix}.fc1", weight, bias)
        weight, bias = self.writers.mlp(layer, group), block.mlp.out_bias
        if (norm := block.mlp.norm) is not None:
            weight, bias = weight * norm.weight[kept], bias + weight @ norm.bias[kept]
        self._product(f"{prefix}.fc2", plan.name, weight, bias)

    def _product(self, prefix: str, name: str, weight: Tensor, bias: Tensor) -> None:
        """A product to the stream."""
        self.tensors[f"{prefix}.weight"] = weight
        if name in self.draft.unbiased:
            self.moved[name] = bias
        else:
            self.tensors[f"{prefix}.bias"] = bias
        if name in self.draft.biases:
            self.holders[self.draft.biases[name]] = f"{prefix}.bias"

    def _fill_holders(self) -> None:
        """Biases that hold the constants of a whole stream."""
        for name, holder in self.holders.items():
            stream = self.draft.streams[name]
            moved = [self.moved.get(product.name, 0.0) for product in stream.products]
            self.tensors[holder] = (
                self.tensors[holder] + self.constants.table(stream)[0] + sum(moved)
            )

    def _group_of(self, rows: Rows) -> int:
        """The first token kind of a range; the others of a range write alike."""
        starts = [own.start for own in self.writers.rows]
        return starts.index(rows.first)

    def _stream(self, prefix: str, plan: StreamPlan) -> None:
        if plan.table_rows:
            table = self.constants.table(self.draft.streams[plan.name])
            for term in plan.terms:
                table = table + self.moved.get(term.name, 0.0)
            self.tensors[f"{prefix}.table"] = table[: plan.table_rows]

    def _linear(self, prefix: str, weight: Tensor, bias: Tensor) -> None:
        self.tensors[f"{prefix}.weight"] = weight
        self.tensors[f"{prefix}.bias"] = bias


def _after_norm(
    norm: NormWeights, weight: Float[Tensor, "outputs width"], bias: Float[Tensor, "outputs"]
) -> tuple[Float[Tensor, "outputs width"], Float[Tensor, "outputs"]]:
    """A product that takes over the affine part of the LayerNorm before it."""
    return weight * norm.weight, bias + weight @ norm.bias
