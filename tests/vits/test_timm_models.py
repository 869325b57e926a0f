from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitcut.errors import ModelError, UnsupportedModelError
from vitcut.intervention.masking import full_run
from vitcut.intervention.tracing import read_model
from vitcut.vits.timm_models import read_timm
from vitcut.vits.weights import ViTWeights, map_tensors

SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}

PLAIN_NORM = partial(nn.LayerNorm, eps=1e-3, elementwise_affine=False)


def _vit(**given) -> VisionTransformer:
    """A tiny ViT in float64 whose every parameter matters: timm starts many at 0 or 1."""
    torch.manual_seed(0)
    model = VisionTransformer(**{**SIZES, **given}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _expect_refusal(model: nn.Module, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        read_model(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="plain"),
        pytest.param({"init_values": 0.1}, id="LayerScale"),
        pytest.param({"qkv_bias": False}, id="no qkv bias"),
        pytest.param({"proj_bias": False}, id="no projection bias"),
        pytest.param({"norm_layer": PLAIN_NORM}, id="norms without weights"),
        pytest.param({"no_embed_class": True}, id="class token without position"),
        pytest.param({"in_chans": 1}, id="one channel"),
        pytest.param({"num_heads": 1}, id="one head"),
        pytest.param({"num_heads": 6}, id="heads of width 2"),
        pytest.param({"mlp_ratio": 0.5}, id="narrow MLP"),
        pytest.param({"depth": 1, "img_size": 24}, id="one block, more patches"),
        pytest.param({"drop_path_rate": 0.5, "proj_drop_rate": 0.5}, id="dropout"),
        *(
            pytest.param({"act_layer": name}, id=name)
            for name in ("gelu_tanh", "quick_gelu", "silu", "relu")
        ),
    ],
)
def test_a_read_model_gives_the_same_logits(variant):
    model = _vit(**variant)
    weights = read_model(model)
    pixels = torch.randn(3, weights.channels, weights.image_size, weights.image_size).double()
    with torch.no_grad():
        expected = model(pixels)
    difference = (full_run(weights, pixels).logits - expected).abs().max().item()
    assert difference <= 1e-9 * max(1, expected.abs().max().item())


@pytest.mark.parametrize("variant", [{}, {"norm_layer": PLAIN_NORM, "qkv_bias": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_weight_has_the_models_type(variant, dtype):
    weights = read_model(_vit(**variant).to(dtype))
    assert {tensor.dtype for tensor in _tensors(weights)} == {dtype}


def test_heads_wider_than_their_share_of_the_width_are_read():
    model = _vit(num_heads=2)
    for block in model.blocks:
        width, wide = 12, 2 * 9
        block.attn.head_dim, block.attn.attn_dim = 9, wide
        block.attn.scale = 9**-0.5
        block.attn.qkv = nn.Linear(width, 3 * wide).double()
        block.attn.proj = nn.Linear(wide, width).double()
    assert read_model(model).blocks[0].attn.q_weight.shape == (2, 9, 12)


def test_sizes_are_those_of_the_model():
    weights = read_model(_vit(in_chans=1, img_size=24))
    assert (weights.image_size, weights.patch_size, weights.channels) == (24, 8, 1)
    assert (weights.width, weights.num_heads, weights.num_classes) == (12, 2, 5)
    assert (weights.num_prefix, weights.num_tokens) == (1, 10)
    assert (weights.graph.num_layers, weights.graph.num_heads) == (2, 2)


@pytest.mark.parametrize(
    ("variant", "feature"),
    [
        ({"qk_norm": True}, "attention with q_norm"),
        ({"reg_tokens": 4}, "registers"),
        ({"global_pool": "avg"}, "global_pool='avg'"),
        ({"global_pool": "avg", "fc_norm": False}, "global_pool='avg'"),
        ({"global_pool": "map"}, "attention pooling"),
        ({"pre_norm": True}, "norm_pre"),
        ({"fc_norm": True}, "fc_norm"),
        ({"final_norm": False}, "norm Identity"),
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "global_pool='avg'"),
        ({"pos_embed": "none"}, "without position embedding"),
        ({"img_size": (16, 24)}, "image size 16 x 24"),
        ({"patch_size": (8, 4)}, "patch size 8 x 4"),
        ({"img_size": 20}, "image size 20, which is no multiple of the patch size 8"),
        ({"num_classes": 0}, "classifier Identity"),
        ({"act_layer": "tanh"}, "activation Tanh"),
        ({"norm_layer": "rmsnorm"}, "norm RmsNorm"),
        ({"mlp_layer": timm.layers.SwiGLUPacked}, "MLP GluMlp"),
        ({"mlp_layer": timm.layers.SwiGLU}, "MLP SwiGLU"),
        ({"scale_attn_norm": True}, "attention with norm"),
        ({"patch_drop_rate": 0.5}, "patch_drop"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "block ResPostBlock"),
        (
            {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
            "block ParallelScalingBlock",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(variant, feature):
    _expect_refusal(_vit(**variant), f"^not supported: .*({feature})")


def _half(model: nn.Module) -> nn.Module:
    return model.half()


def _bfloat16(model: nn.Module) -> nn.Module:
    return model.bfloat16()


def _float_head(model: nn.Module) -> nn.Module:
    model.head.float()
    return model


@pytest.mark.parametrize(
    ("change", "types"),
    [(_half, "float16"), (_bfloat16, "bfloat16"), (_float_head, "float32, float64")],
)
def test_other_and_mixed_types_are_refused_by_name(change, types):
    _expect_refusal(change(_vit()), rf"^not supported: weights of type {types}; .*model\.float\(\)")


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("resnet18", "ResNet"),
    ],
)
def test_another_architecture_is_refused_by_name(name, feature):
    with torch.device("meta"):
        model = timm.create_model(name)
    _expect_refusal(model, f"^not supported: {feature} ")


def test_a_module_of_its_own_is_refused_by_name():
    _expect_refusal(nn.Linear(2, 2), "^not supported: Linear ")


def test_what_is_hidden_from_the_adapter_is_found_by_its_logits():
    model = _vit()
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: output * 2)
    _expect_refusal(model, "does something that was not understood: its traced logits differ by")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    model = _vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = value
    with pytest.raises(ModelError, match="the model has 1 NaN or infinite weights"):
        read_model(model)


def _state(model: nn.Module) -> dict[str, object]:
    return {
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
    }


@pytest.mark.parametrize("bad", [False, True], ids=["read", "refused"])
def test_reading_leaves_the_model_untouched(bad):
    model = _vit(proj_drop_rate=0.5).train()
    model.blocks[1].eval()
    model.pos_embed.requires_grad_(requires_grad=False)
    if bad:
        model.head.register_forward_hook(lambda module, inputs, output: output + 1)
    state, tensors = _state(model), {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    if bad:
        _expect_refusal(model, "was not understood")
    else:
        read_model(model)
    assert _state(model) == state
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def _tensors(weights: ViTWeights) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(weights, lambda tensor: found.append(tensor) or tensor)
    return found


def test_weights_share_no_memory_with_the_model():
    model = _vit()
    weights = read_timm(model)
    before = [tensor.clone() for tensor in _tensors(weights)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for tensor, copy in zip(_tensors(weights), before, strict=True):
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad
