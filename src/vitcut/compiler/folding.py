"""Folding: the tensors of a compact model from a draft, weights and ablated values, in float64.

LayerNorm's affine part goes into the product that follows, the attention scale into q, constants
into tables. A target's LayerNorm is applied to the same sum as in the masked model, so this is
exact up to rounding.
"""

import torch

from vitcut.circuit import Circuit
from vitcut.compact.plan import (
    AttentionPlan,
    HeadGroupPlan,
    MlpPlan,
    ProjectionPlan,
    StreamPlan,
    ViTShape,
)
from vitcut.compiler.constants import Constants
from vitcut.compiler.liveness import find_liveness
from vitcut.compiler.planning import Draft
from vitcut.errors import CircuitError
from vitcut.names import LETTERS
from vitcut.shapes import Float, Tensor
from vitcut.vits.weights import AttentionWeights, NormWeights, ViTWeights

Tensors = dict[str, Tensor]
"""Tensors by their name in the module's ``state_dict``."""


def fold(
    draft: Draft,
    weights: ViTWeights,
    circuit: Circuit,
    ablated: Float[Tensor, "sources tokens width"],
) -> Tensors:
    """The compact model's ``state_dict``, in float64.

    Args:
        draft: The circuit's plan.
        weights: The model.
        circuit: The circuit.
        ablated: What each source writes along cut edges; zeros under ``zero``.

    Raises:
        CircuitError: ``ablated`` does not fit the model or the ablation.
    """
    _require_table(weights, circuit, ablated)
    return _Folder(draft, weights.to(torch.float64, "cpu"), circuit, ablated.double().cpu()).fold()


def _require_table(weights: ViTWeights, circuit: Circuit, ablated: Tensor) -> None:
    expected = (len(circuit.graph.sources), weights.num_tokens, weights.width)
    if tuple(ablated.shape) != expected:
        raise CircuitError(
            f"ablated values must have shape {expected} (sources, tokens, width), got "
            f"{tuple(ablated.shape)}"
        )
    if circuit.ablation == "zero" and bool(ablated.any()):
        raise CircuitError(
            "the circuit is under zero ablation, but the ablated values are not all zero: pass "
            "zeros, or circuit.with_ablation('mean')"
        )


class _Folder:
    """Walks the plan and gathers the tensors."""

    def __init__(
        self, draft: Draft, weights: ViTWeights, circuit: Circuit, ablated: Tensor
    ) -> None:
        self.draft = draft
        self.weights = weights
        self.graph = circuit.graph
        self.constants = Constants(weights, circuit, find_liveness(circuit), ablated)
        self.tensors: Tensors = {}

    def fold(self) -> Tensors:
        plan = self.draft.plan
        if plan.embeds:
            self.tensors["patch_embed.weight"] = self.weights.patch_weight
        for layer, block in enumerate(plan.blocks):
            if block.attention is not None:
                self._attention(layer, block.attention)
            if block.mlp is not None:
                self._mlp(layer, block.mlp)
        weight, bias = _after_norm(
            self.weights.norm, self.weights.head_weight, self.weights.head_bias
        )
        if plan.classifier is not None:
            self._stream("stream", plan.classifier)
            self._linear("classifier", weight, bias)
        else:
            readout = self.constants.normalised_input(self.graph.classifier)[0]
            self.tensors["logits"] = self.weights.head_weight @ readout + self.weights.head_bias
        return self.tensors

    def _attention(self, layer: int, plan: AttentionPlan) -> None:
        prefix = f"blocks.{layer}.attention"
        attn = self.weights.blocks[layer].attn
        for number, stream in enumerate(plan.streams):
            self._stream(f"{prefix}.streams.{number}", stream)
        for number, projection in enumerate(plan.projections):
            weight, bias = _projection(attn, projection)
            self._linear(
                f"{prefix}.projections.{number}",
                *_after_norm(self.weights.blocks[layer].attn_norm, weight, bias),
            )
        for number, group in enumerate(plan.groups):
            self._group_tables(f"{prefix}.groups.{number}", layer, group)
        for number, output in enumerate(plan.outputs):
            weight = torch.cat([attn.out_weight[head] for head in output.heads], dim=1)
            self._linear(f"{prefix}.outputs.{number}.product", weight, attn.out_bias)

    def _group_tables(self, prefix: str, layer: int, group: HeadGroupPlan) -> None:
        shape: ViTShape = self.draft.plan.shape
        queries = shape.num_rows(group.rows)
        if group.fixed_pattern:
            patterns = [self.constants.pattern(layer, head)[:queries] for head in group.heads]
            self.tensors[f"{prefix}.tables.pattern"] = torch.stack(patterns)[None]
        scales = {"q": self.weights.blocks[layer].attn.scale, "k": 1.0, "v": 1.0}
        for letter in LETTERS:
            if letter not in group.constant or (group.fixed_pattern and letter != "v"):
                continue
            rows = queries if letter == "q" else shape.num_tokens
            tables = [
                self.constants.projected(layer, letter, head)[:rows] * scales[letter]
                for head in group.heads
            ]
            self.tensors[f"{prefix}.tables.{letter}"] = torch.stack(tables)[None]

    def _mlp(self, layer: int, plan: MlpPlan) -> None:
        block = self.weights.blocks[layer]
        prefix = f"blocks.{layer}.mlp"
        self._stream(f"{prefix}.stream", plan.stream)
        weight, bias = _after_norm(block.mlp_norm, block.mlp.in_weight, block.mlp.in_bias)
        self._linear(f"{prefix}.fc1", weight, bias)
        self._linear(f"{prefix}.fc2", block.mlp.out_weight, block.mlp.out_bias)

    def _stream(self, prefix: str, plan: StreamPlan) -> None:
        if plan.table_rows:
            table = self.constants.table(self.draft.tables[plan.name])
            self.tensors[f"{prefix}.table"] = table[: plan.table_rows]

    def _linear(self, prefix: str, weight: Tensor, bias: Tensor) -> None:
        self.tensors[f"{prefix}.weight"] = weight
        self.tensors[f"{prefix}.bias"] = bias


def _projection(attn: AttentionWeights, plan: ProjectionPlan) -> tuple[Tensor, Tensor]:
    """The rows of q, k and v that a projection computes, the attention scale in q's."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for letter in LETTERS:
        scale = attn.scale if letter == "q" else 1.0
        for head in getattr(plan, letter):
            weights.append(getattr(attn, f"{letter}_weight")[head] * scale)
            biases.append(getattr(attn, f"{letter}_bias")[head] * scale)
    return torch.cat(weights), torch.cat(biases)


def _after_norm(
    norm: NormWeights, weight: Float[Tensor, "outputs width"], bias: Float[Tensor, "outputs"]
) -> tuple[Float[Tensor, "outputs width"], Float[Tensor, "outputs"]]:
    """A product that takes over the affine part of the LayerNorm before it."""
    return weight * norm.weight, bias + weight @ norm.bias
