"""The adapter for timm's ``VisionTransformer``: plain, pre-norm, class token.

Whatever it does not understand it refuses by name. Checking that the weights reproduce the model's
logits is left to ``intervention.tracing``.
"""

from typing import Any, NoReturn

from timm.layers import GELU, GELUTanh, LayerNorm, LayerScale, Mlp, PatchEmbed, QuickGELU
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vitcut.errors import UnsupportedModelError
from vitcut.shapes import Tensor
from vitcut.vits.weights import (
    Activation,
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    NormWeights,
    ViTWeights,
)

_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.GELU: "gelu",
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


def read_timm(model: nn.Module) -> ViTWeights:
    """Read a timm ``VisionTransformer``; the model is not changed.

    Raises:
        UnsupportedModelError: The model has a feature that is not understood.
    """
    if type(model) is not VisionTransformer:
        _refuse(f"{type(model).__name__} (only timm's plain VisionTransformer is)")
    _check_trunk(model)
    return _read_trunk(model)


def _read_trunk(model: Any) -> ViTWeights:
    position = _detached(model.pos_embed)[0]
    class_token = _detached(model.cls_token)[0]
    patches = position[-model.patch_embed.num_patches :]
    prefix = class_token if model.no_embed_class else class_token + position[:1]
    return ViTWeights(
        patch_weight=_detached(model.patch_embed.proj.weight),
        patch_bias=_bias(model.patch_embed.proj),
        prefix=prefix,
        positions=patches,
        blocks=tuple(_read_block(block) for block in model.blocks),
        norm=_read_norm(model.norm, like=class_token),
        head_weight=_detached(model.head.weight),
        head_bias=_bias(model.head),
    )


def _check_trunk(model: Any) -> None:
    if model.attn_pool is not None:
        _refuse("attention pooling")
    if model.global_pool != "token":
        _refuse(f"global_pool={model.global_pool!r} (only 'token' is)")
    _require_plain(model.patch_embed, PatchEmbed, "patch embedding")
    _require_plain(model.head, nn.Linear, "classifier")
    identities = {
        "norm_pre": model.norm_pre,
        "fc_norm": model.fc_norm,
        "patch_drop": model.patch_drop,
        "patch_embed.norm": model.patch_embed.norm,
    }
    for name, module in identities.items():
        if not isinstance(module, nn.Identity):
            _refuse(f"{name} ({type(module).__name__})")
    if model.cls_token is None:
        _refuse("a ViT without class token")
    if model.num_prefix_tokens != 1:
        _refuse(f"{model.num_prefix_tokens} prefix tokens: registers or distillation token")
    if model.pos_embed is None:
        _refuse("a ViT without position embedding")
    if model.dynamic_img_size:
        _refuse("dynamic_img_size")
    _check_grid(model)


def _check_grid(model: Any) -> None:
    height, width = model.patch_embed.img_size
    if height != width:
        _refuse(f"image size {height} x {width}, which is not square")
    patch_height, patch_width = model.patch_embed.patch_size
    if patch_height != patch_width:
        _refuse(f"patch size {patch_height} x {patch_width}, which is not square")
    if height % patch_height:
        _refuse(f"image size {height}, which is no multiple of the patch size {patch_height}")


def _read_block(block: Any) -> BlockWeights:
    _require_plain(block, Block, "block")
    _require_plain(block.attn, Attention, "attention")
    _require_plain(block.mlp, Mlp, "MLP")
    attn_scale = _layer_scale(block.ls1)
    mlp_scale = _layer_scale(block.ls2)
    return BlockWeights(
        attn_norm=_read_norm(block.norm1, like=block.attn.qkv.weight),
        attn=_read_attention(block.attn, attn_scale),
        mlp_norm=_read_norm(block.norm2, like=block.attn.qkv.weight),
        mlp=_read_mlp(block.mlp, mlp_scale),
    )


def _read_attention(attn: Any, layer_scale: Tensor | None) -> AttentionWeights:
    for name in ("q_norm", "k_norm", "norm"):
        module = getattr(attn, name, nn.Identity())
        if not isinstance(module, nn.Identity):
            _refuse(f"attention with {name} ({type(module).__name__})")
    if attn.gate is not None:
        _refuse("gated attention")
    heads, head_dim = attn.num_heads, attn.head_dim
    qkv_weight = _detached(attn.qkv.weight).reshape(3, heads, head_dim, -1)
    qkv_bias = _bias(attn.qkv).reshape(3, heads, head_dim)
    out_weight, out_bias = _scaled(attn.proj, layer_scale)
    return AttentionWeights(
        q_weight=qkv_weight[0],
        q_bias=qkv_bias[0],
        k_weight=qkv_weight[1],
        k_bias=qkv_bias[1],
        v_weight=qkv_weight[2],
        v_bias=qkv_bias[2],
        out_weight=out_weight.reshape(-1, heads, head_dim).permute(1, 0, 2).contiguous(),
        out_bias=out_bias,
        scale=attn.scale,
    )


def _read_mlp(mlp: Any, layer_scale: Tensor | None) -> MlpWeights:
    if not isinstance(mlp.norm, nn.Identity):
        _refuse(f"an MLP with an inner norm ({type(mlp.norm).__name__})")
    activation = _ACTIVATIONS.get(type(mlp.act))
    if activation is None or getattr(mlp.act, "approximate", "none") != "none":
        _refuse(f"activation {mlp.act}")
    out_weight, out_bias = _scaled(mlp.fc2, layer_scale)
    return MlpWeights(
        in_weight=_detached(mlp.fc1.weight),
        in_bias=_bias(mlp.fc1),
        out_weight=out_weight,
        out_bias=out_bias,
        activation=activation,
    )


def _read_norm(norm: Any, *, like: Tensor) -> NormWeights:
    """A norm without weights takes type and device of ``like``."""
    if type(norm) not in {nn.LayerNorm, LayerNorm}:
        _refuse(f"norm {type(norm).__name__} (only LayerNorm is)")
    width = norm.normalized_shape[0]
    return NormWeights(
        weight=like.new_ones(width) if norm.weight is None else _detached(norm.weight),
        bias=like.new_zeros(width) if norm.bias is None else _detached(norm.bias),
        eps=norm.eps,
    )


def _layer_scale(module: Any) -> Tensor | None:
    if isinstance(module, nn.Identity):
        return None
    _require_plain(module, LayerScale, "LayerScale")
    return _detached(module.gamma)


def _scaled(linear: Any, layer_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    weight, bias = _detached(linear.weight), _bias(linear)
    if layer_scale is None:
        return weight, bias
    return weight * layer_scale[:, None], bias * layer_scale


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _bias(linear: Any) -> Tensor:
    if linear.bias is None:
        return _detached(linear.weight).new_zeros(linear.weight.shape[0])
    return _detached(linear.bias)


def _require_plain(module: Any, expected: type[nn.Module], what: str) -> None:
    if type(module) is not expected:
        _refuse(f"{what} {type(module).__name__} (only {expected.__name__} is)")


def _refuse(feature: str) -> NoReturn:
    raise UnsupportedModelError(
        f"not supported: {feature}; expected a plain pre-norm timm VisionTransformer that "
        "classifies from its class token, such as deit_tiny_patch16_224"
    )
