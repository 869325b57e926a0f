"""Read a module's weights and check them: they must reproduce its logits."""

import torch
from torch import nn

from vitcut.errors import ModelError, UnsupportedModelError
from vitcut.model.adapters import blamed_on_adapter, has_adapter, logits_of, read_weights
from vitcut.model.forward import forward
from vitcut.model.weights import ViTWeights, map_tensors
from vitcut.shapes import Float, Tensor

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of logits, relative to max(1, largest logit)."""
_CHECK_IMAGES = 2


def read_model(model: nn.Module) -> ViTWeights:
    """Read a model's weights, in its own precision, and check them. The model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood, or weights that are
            not all float32 or all float64.
        ModelError: A weight is NaN or infinite.
    """
    with blamed_on_adapter(model):
        return _read_and_check(model)


def _read_and_check(model: nn.Module) -> ViTWeights:
    weights = read_weights(model)
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(weights, collect)
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= _TOLERANCE.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UnsupportedModelError(
            f"not supported: weights of type {names}; expected all float32 or all float64: "
            "convert the model with model.float()"
        )
    bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
    if bad:
        raise ModelError(f"the model has {bad} NaN or infinite weights: load a sound checkpoint")
    _require_alike_blocks(weights)
    patches = len(weights.positions)
    if round(patches**0.5) ** 2 != patches:
        raise UnsupportedModelError(
            f"not supported: {patches} patches, which do not form a square; expected as many "
            "across as down"
        )
    # Only a user's own adapter can get this wrong.
    num_parts = weights.num_read + (weights.patch_readout != "none")
    features = weights.head_weight.shape[1]
    if not 0 <= weights.num_read <= weights.num_prefix or features != num_parts * weights.width:
        raise UnsupportedModelError(
            f"not supported: a classifier of {features} features that reads {weights.num_read} of "
            f"{weights.num_prefix} prefix tokens and of the patches {weights.patch_readout!r}; "
            f"expected {weights.width} features for each token, and for the patches' mean"
        )
    _require_same_logits(model, weights)
    return weights


def tolerance(dtype: torch.dtype, logits: Float[Tensor, "..."]) -> float:
    """How far two computations of the same logits may be apart."""
    return _TOLERANCE[dtype] * max(1.0, float(logits.abs().max()))


def _require_alike_blocks(weights: ViTWeights) -> None:
    blocks = weights.blocks
    attns = [block.attn for block in blocks]
    norms = [norm for block in blocks for norm in (block.attn_norm, block.mlp_norm)]
    on_heads = [norm for attn in attns for norm in (attn.q_norm, attn.k_norm)]
    on_neurons = [block.mlp.norm for block in blocks]
    every = (*norms, *on_heads, *on_neurons, weights.patch_norm, weights.norm)
    found = {
        "hidden units": {block.mlp.in_weight.shape[0] for block in blocks},
        "heads": {block.attn.q_weight.shape[0] for block in blocks},
        "head width": {block.attn.q_weight.shape[1] for block in blocks},
        "activation": {block.mlp.activation for block in blocks},
        "LayerNorm epsilon": {norm.eps for norm in every if norm is not None},
    }
    for what, values in found.items():
        if len(values) != 1:
            listed = ", ".join(map(str, sorted(values))) or "no blocks"
            raise UnsupportedModelError(
                f"not supported: {what} {listed} in one model; expected the same in every block"
            )
    optional = {
        "norms of queries and keys": on_heads,
        "rotary positions": [attn.rotation for attn in attns],
        "gated MLPs": [block.mlp.gate_weight for block in blocks],
        "norms over the neurons": on_neurons,
    }
    for what, items in optional.items():
        missing = sum(item is None for item in items)
        if 0 < missing < len(items):
            raise UnsupportedModelError(
                f"not supported: {what} in some places and not in others; expected the same in "
                "every block"
            )


def _require_same_logits(model: nn.Module, weights: ViTWeights) -> None:
    generator = torch.Generator().manual_seed(0)
    side = weights.image_size
    pixels = torch.randn(_CHECK_IMAGES, weights.channels, side, side, generator=generator)
    pixels = pixels.to(weights.device, weights.dtype)
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            expected = logits_of(model.eval(), pixels)
            got = forward(weights, pixels)
    finally:
        for module, was_training in training.items():
            module.training = was_training
    if got.shape != expected.shape:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {expected.shape[1]} logits, what was read of it "
            f"{got.shape[1]}: mend the adapter"
        )
    difference = float((got - expected).abs().max())
    # Without the classifier's bias: where classes are masked, a huge one would loosen the bound.
    allowed = tolerance(weights.dtype, expected - weights.head_bias)
    if not difference <= allowed:
        name, far = type(model).__name__, f"differ by {difference:.2g}; expected at most"
        what = f"{name} does something that was not understood: its traced logits"
        remedy = "give a model of timm, torchvision or transformers that was not changed"
        if has_adapter(model):
            what = f"the adapter for {name} is wrong: the module's logits and those of what it read"
            remedy = "mend the adapter"
        raise UnsupportedModelError(f"{what} {far} {allowed:.2g}: {remedy}")
