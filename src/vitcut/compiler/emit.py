"""From a circuit and a model's weights to a compact model that computes the same, and the check.

Folding runs in float64. LayerNorm's affine part goes into the product that follows, the attention
scale into q, constants into tables, the maps of a fill into the output weights. Each target's
LayerNorm is applied to the same sum as in the masked model, so this is exact up to rounding.
"""

from dataclasses import dataclass

import torch

from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.plan import AttentionPlan, HeadSetPlan, MlpPlan, Rows, StreamPlan
from vitcut.compiler.constants import FilledWeights
from vitcut.compiler.cost import CostModel
from vitcut.compiler.planning import Draft, draft_circuit, split_circuit
from vitcut.errors import CircuitError, ExactnessError
from vitcut.masked.fill import Fill
from vitcut.masked.masking import masked_forward
from vitcut.model.tracing import tolerance
from vitcut.model.weights import NormWeights, ViTWeights
from vitcut.names import LETTERS, Letter
from vitcut.shapes import Float, Tensor

_CHUNK = 16
"""Images per masked forward, which holds every source of every image."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """How far a compact model is from the masked one."""

    max_abs_diff: float
    """Largest difference between two logits."""
    tolerance: float
    """Largest difference that rounding explains."""
    images: int
    """How many images were compared."""


@torch.no_grad()
def compile_circuit(
    weights: ViTWeights,
    circuit: Circuit,
    fill: Fill,
    *,
    dtype: torch.dtype = torch.float32,
    costs: CostModel | None = None,
) -> CompactViT:
    """Compile a circuit into the small model that computes the same.

    Args:
        weights: The model that the circuit is of; folded in float64 whatever its precision.
        circuit: The circuit, under ``zero``, ``mean`` or ``linear`` ablation.
        fill: What stands in for cut parts.
        dtype: The precision of the compact model.
        costs: Decides between ways to compute the same; the shipped costs if None.

    Returns:
        The compact model, on the CPU and in eval mode.

    Raises:
        CircuitError: The circuit does not fit the model or the fill, or its ablation cannot be
            compiled.
    """
    fill.require_fit(circuit)
    draft = draft_circuit(weights.shape, circuit, costs)
    weights = weights.at(circuit.positions)
    fill = fill.on(weights)
    with torch.device("meta"):
        model = CompactViT(draft.plan)
    tokens = weights.num_tokens
    sources = (len(weights.graph.sources), tokens, weights.width)
    neurons = (len(weights.blocks), tokens, weights.num_neurons)
    for name, axes, tensor, expected in (
        ("sources", "sources, tokens, width", fill.sources, sources),
        ("neurons", "blocks, tokens, neurons", fill.neurons, neurons),
        ("head_weight", "classes, features", fill.head_weight, tuple(weights.head_weight.shape)),
        ("head_bias", "classes", fill.head_bias, tuple(weights.head_bias.shape)),
    ):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise CircuitError(
                f"the fill's {name} must have shape {expected} ({axes}), got "
                f"{tuple(tensor.shape)}: fit it to this model"
            )
    double = fill.refitted(weights).to(torch.float64, "cpu")
    split, fill = split_circuit(weights.shape, circuit), fill.like(double.patch_weight)
    folded = _Folder(draft, double, FilledWeights(double, split, draft.reads, fill)).fold()
    # Copies: training the compact model must not change the original.
    state = {
        name: tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in folded.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


@torch.no_grad()
def verify(
    compact: CompactViT,
    weights: ViTWeights,
    circuit: Circuit,
    fill: Fill,
    pixels: Float[Tensor, "images channels y x"],
) -> Exactness:
    """Check that a compact model computes what the masked model does: compact(x) == masked(x).

    Args:
        compact: The compact model; its precision sets the tolerance.
        weights: The model.
        circuit: The circuit.
        fill: What stands in for cut parts.
        pixels: Normalised images.

    Raises:
        ExactnessError: They differ by more than rounding explains, or there are no images.
    """
    if len(pixels) == 0:
        raise ExactnessError("a compact model is verified on at least 1 image, got 0")
    parameter = next(compact.parameters())
    masked: list[Tensor] = []
    own: list[Tensor] = []
    for chunk in pixels.to(weights.device, weights.dtype).split(_CHUNK):
        filled = fill.like(weights.patch_weight)
        masked.append(masked_forward(weights, chunk, circuit, filled).cpu())
        own.append(compact(chunk.to(parameter.device, parameter.dtype)).cpu())
    expected, got = torch.cat(masked), torch.cat(own)
    difference = float((got - expected).abs().max())
    allowed = tolerance(got.dtype, expected)
    # Written this way round, NaN fails too.
    if not difference <= allowed:
        raise ExactnessError(
            f"the compact model's logits differ from the masked model's by {difference:.3g}, "
            f"expected at most {allowed:.3g}: it was not saved; please report this circuit"
        )
    return Exactness(max_abs_diff=difference, tolerance=allowed, images=len(got))


class _Folder:
    """Walks the plan and gathers the tensors, by their names in the module's ``state_dict``."""

    def __init__(self, draft: Draft, weights: ViTWeights, filled: FilledWeights) -> None:
        self.draft = draft
        self.weights = weights
        self.filled = filled
        self.tensors: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}
        """By product without a bias, what its only reader adds elsewhere instead."""
        self.bias_of: dict[str, str] = {}
        """By product with a bias, the name of that tensor."""

    def fold(self) -> dict[str, Tensor]:
        draft, weights = self.draft, self.weights
        if draft.plan.embeds:
            self.tensors["patch_embed.weight"] = weights.patch_weight
            if weights.patch_norm is not None:
                self.tensors["positions"] = weights.positions + weights.patch_bias
                self.tensors["embed_norm.weight"] = weights.patch_norm.weight
        # In the order of computing: a stream's table takes the biases that earlier products lack.
        for layer, block in enumerate(draft.plan.blocks):
            if block.attention is not None:
                self._attention(layer, block.attention)
            for number, mlp in enumerate(block.mlps):
                self._mlp(f"blocks.{layer}.mlps.{number}", layer, mlp)
        self._classifier()
        # A bias that stands in for a whole table also takes the biases of its stream's other
        # products. These may come after it, so it is completed last.
        for product, name in draft.biases.items():
            stream, bias = draft.streams[name], self.bias_of[product]
            moved = [self.moved.get(item.name, 0.0) for item in stream.products]
            self.tensors[bias] = self.tensors[bias] + self.filled.table(stream)[0] + sum(moved)
        return self.tensors

    def _classifier(self) -> None:
        """The product behind all that is read; what of that is constant goes into its bias."""
        weights, streams = self.weights, self.draft.plan.readout
        live = {self._kind_of(stream.rows) for stream in streams}
        # [classes, width] per prefix token that is read, then one for the mean of the patches.
        prefix = weights.num_read * weights.width
        by_kind = [weights.head_weight[:, :prefix], weights.head_weight[:, prefix:]]
        by_kind = [weight for weight in by_kind if weight.numel()]
        products: list[Tensor] = []
        bias = weights.head_bias
        for kind, own in zip(self.draft.reads.readout, by_kind, strict=True):
            if kind not in live:
                bias = bias + own @ self.filled.read_out(kind)
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
            # Per head weight [head_dim, width] and bias [head_dim], one below the other.
            weight, bias = (torch.cat(parts) for parts in zip(*columns, strict=True))
            self._linear(f"{prefix}.projections.{number}", weight, bias)
        for number, head_set in enumerate(plan.head_sets):
            self._head_set(f"{prefix}.head_sets.{number}", layer, head_set)
        for number, output in enumerate(plan.outputs):
            head_set = plan.head_sets[output.head_set]
            # All kinds of a run write alike: the first one stands for it.
            kind = self._kind_of(head_set.rows)
            parts = [self.filled.head(layer, head, kind) for head in output.heads]
            bias = self.weights.blocks[layer].attn.out_bias
            if head_set.values:
                # Absorbed values: W_O W_V of the mixture. A mixture's shares add up to 1, so that
                # the value bias passes through unchanged and goes to W_O b_V.
                letters = [self._letter(layer, "v", head) for head in output.heads]
                for part, (_, own) in zip(parts, letters, strict=True):
                    bias = bias + part @ own
                if head_set.merged_values:
                    # [width, head_dim] x [head_dim, width]
                    parts = [part @ own for part, (own, _) in zip(parts, letters, strict=True)]
            weight = torch.cat(parts, dim=1)
            self._product(f"{prefix}.outputs.{number}.product", output.name, weight, bias)

    def _letter(
        self, layer: int, letter: Letter, head: int
    ) -> tuple[Float[Tensor, "head_dim width"], Float[Tensor, "head_dim"]]:
        """Weight and bias of a head's q, k or v behind a LayerNorm; q is scaled."""
        block = self.weights.blocks[layer]
        # A norm behind the product would undo a scale before it: then the norm is scaled.
        scale = block.attn.scale if letter == "q" and block.attn.q_norm is None else 1.0
        weight = getattr(block.attn, f"{letter}_weight")[head]
        bias = getattr(block.attn, f"{letter}_bias")[head]
        return _after_norm(block.attn_norm, weight * scale, bias * scale)

    def _head_set(self, prefix: str, layer: int, plan: HeadSetPlan) -> None:
        attn, constant = self.weights.blocks[layer].attn, plan.constant
        all_rows = self.draft.plan.shape.all_rows
        rows = {"q": plan.rows, "k": all_rows, "v": all_rows}
        # Norms and rotary positions of queries and keys that are computed.
        for letter, norm in (("q", attn.q_norm), ("k", attn.k_norm)):
            if letter in constant:
                continue
            if norm is not None:
                scale = attn.scale if letter == "q" else 1.0
                self._linear(f"{prefix}.norms.{letter}", norm.weight * scale, norm.bias * scale)
            if attn.rotation is not None:
                # [sin and cos, 1 or all heads, tokens, head_dim]
                heads = list(plan.heads) if attn.rotation.shape[1] > 1 else [0]
                own = attn.rotation[:, heads, rows[letter].first : rows[letter].end]
                each = own.expand(-1, len(plan.heads), -1, -1)
                self.tensors[f"{prefix}.{letter}_rotation"] = each
        # Constant letters are tables [1 heads tokens head_dim]; q and k together are one pattern
        # [1 heads queries keys].
        tables: dict[str, Tensor] = {}
        for letter in constant:
            tables[letter] = torch.stack(
                [self.filled.projected(layer, letter, head, rows[letter]) for head in plan.heads]
            )
        if "q" in constant:
            tables["q"] = tables["q"] * attn.scale
        if plan.fixed_pattern:
            scores = tables.pop("q") @ tables.pop("k").mT
            tables["pattern"] = torch.softmax(scores, -1)
        keys = [self._letter(layer, "k", head)[0] for head in plan.heads]
        if plan.keys and "q" in constant:
            # Constant queries meet the tokens directly: q W_K, [heads * queries, width].
            products = [q @ key for q, key in zip(tables.pop("q"), keys, strict=True)]
            self.tensors[f"{prefix}.tables.q"] = torch.cat(products)
        elif plan.queries:
            # W_K' W_Q, [width width] per head. The key bias is left out: it shifts all scores of a
            # query alike, which softmax does not see.
            queries = [self._letter(layer, "q", head) for head in plan.heads]
            merged = [
                (key.T @ weight, key.T @ bias)
                for key, (weight, bias) in zip(keys, queries, strict=True)
            ]
            weight, bias = (torch.cat(parts) for parts in zip(*merged, strict=True))
            self._linear(f"{prefix}.queries", weight, bias)
        elif plan.keys:
            self.tensors[f"{prefix}.key_weight"] = torch.stack(keys)
        if plan.values and not plan.merged_values:
            values = [self._letter(layer, "v", head)[0] for head in plan.heads]
            self.tensors[f"{prefix}.value_weight"] = torch.stack(values).mT
        self.tensors |= {f"{prefix}.tables.{name}": table[None] for name, table in tables.items()}

    def _mlp(self, prefix: str, layer: int, plan: MlpPlan) -> None:
        block, mlp = self.weights.blocks[layer], self.weights.blocks[layer].mlp
        kind = self._kind_of(plan.stream.rows)
        kept = self.filled.kept_neurons(layer, kind)
        computed = kept.nonzero()[:, 0]
        if mlp.norm is not None:
            # The norm takes all neurons, what follows only the first: the kept ones go there.
            computed = torch.cat([computed, (~kept).nonzero()[:, 0]])
        self._stream(f"{prefix}.stream", plan.stream)
        weight, bias = _after_norm(block.mlp_norm, mlp.in_weight[computed], mlp.in_bias[computed])
        if mlp.gate is not None:
            # One product of 2 * neurons rows, with the gates first.
            gate_weight, gate_bias = (part[computed] for part in mlp.gate)
            gate_weight, gate_bias = _after_norm(block.mlp_norm, gate_weight, gate_bias)
            weight, bias = torch.cat([gate_weight, weight]), torch.cat([gate_bias, bias])
        self._linear(f"{prefix}.fc1", weight, bias)
        weight, bias = self.filled.mlp(layer, kind), mlp.out_bias
        if mlp.norm is not None:
            weight, bias = weight * mlp.norm.weight[kept], bias + weight @ mlp.norm.bias[kept]
        self._product(f"{prefix}.fc2", plan.name, weight, bias)

    def _product(self, prefix: str, name: str, weight: Tensor, bias: Tensor) -> None:
        """A product to the stream."""
        self.tensors[f"{prefix}.weight"] = weight
        if name in self.draft.unbiased:
            self.moved[name] = bias
        else:
            self.tensors[f"{prefix}.bias"] = bias
            self.bias_of[name] = f"{prefix}.bias"

    def _kind_of(self, rows: Rows) -> int:
        """The first token kind of a range of tokens."""
        return [own.start for own in self.filled.rows].index(rows.first)

    def _stream(self, prefix: str, plan: StreamPlan) -> None:
        if plan.table_rows:
            table = self.filled.table(self.draft.streams[plan.name])
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
