"""The compiler's front door: a circuit and a model's weights in, a compact model out.

That it computes the same as the masked model is checked by ``verify.py``.
"""

import torch

from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compiler.cost import CostModel
from vitcut.compiler.folding import fold
from vitcut.compiler.planning import draft_circuit, split_circuit
from vitcut.masked.fill import Fill
from vitcut.model.weights import ViTWeights
from vitcut.shapes import Tensor


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
        CircuitError: The circuit does not fit the model or the fill, or its cut edges carry no
            constants.
    """
    fill.require_fit(circuit)
    shape = weights.shape
    draft = draft_circuit(shape, circuit, costs)
    with torch.device("meta"):
        model = CompactViT(draft.plan)
    tensors = fold(draft, weights, split_circuit(shape, circuit), fill)
    model.load_state_dict({name: _own(t, dtype) for name, t in tensors.items()}, assign=True)
    return model.eval()


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, which training the compact model may change."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
