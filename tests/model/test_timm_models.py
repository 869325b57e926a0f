from functools import partial

import pytest
import timm
import torch
from adapter_laws import (
    check_reading,
    expect_own_memory,
    expect_refusal,
    shaken,
    state_of,
    tensors_of,
)
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations

from vitcut.errors import ModelError
from vitcut.model.timm_models import read_timm
from vitcut.model.tracing import read_model

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
    torch.manual_seed(0)
    return shaken(VisionTransformer(**{**SIZES, **given}))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="plain"),
        pytest.param({"init_values": 0.1}, id="LayerScale"),
        pytest.param({"qkv_bias": False}, id="no qkv bias"),
        pytest.param({"proj_bias": False}, id="no projection bias"),
        pytest.param({"norm_layer": PLAIN_NORM}, id="norms without weights"),
        pytest.param({"no_embed_class": True}, id="class token without position"),
        pytest.param({"reg_tokens": 2}, id="registers"),
        pytest.param({"reg_tokens": 1, "no_embed_class": True}, id="register without position"),
        pytest.param({"fc_norm": True}, id="norm after the class token is picked"),
        pytest.param({"pos_embed": "none"}, id="no positions"),
        pytest.param({"global_pool": "avg"}, id="mean of patches, then norm"),
        pytest.param({"global_pool": "avg", "fc_norm": False}, id="norm, then mean of patches"),
        pytest.param(
            {"global_pool": "avg", "class_token": False, "reg_tokens": 1},
            id="mean beside a register",
        ),
        pytest.param({"global_pool": "avg", "class_token": False}, id="patches alone"),
        pytest.param({"pre_norm": True, "reg_tokens": 1}, id="norm before the blocks"),
        pytest.param({"qk_norm": True}, id="qk-norm"),
        pytest.param({"scale_mlp_norm": True}, id="norm over the neurons"),
        pytest.param({"final_norm": False}, id="no norm before the classifier"),
        pytest.param(
            {"final_norm": False, "global_pool": "avg", "fc_norm": False}, id="mean alone"
        ),
        pytest.param({"mlp_layer": timm.layers.SwiGLUPacked, "mlp_ratio": 1}, id="SwiGLU, packed"),
        pytest.param({"mlp_layer": timm.layers.GluMlp, "mlp_ratio": 1}, id="GLU, gate last"),
        pytest.param({"mlp_layer": timm.layers.SwiGLU, "init_values": 0.1}, id="SwiGLU"),
        pytest.param({"dynamic_img_size": True}, id="dynamic size, at its own"),
        pytest.param({"in_chans": 1}, id="one channel"),
        pytest.param({"patch_size": 4}, id="small patches"),
        pytest.param({"num_heads": 1}, id="one head"),
        pytest.param({"num_heads": 6}, id="heads of width 2"),
        pytest.param({"mlp_ratio": 0.5}, id="narrow MLP"),
        pytest.param({"depth": 1, "img_size": 24}, id="one block, more patches"),
        pytest.param({"drop_path_rate": 0.5, "proj_drop_rate": 0.5}, id="dropout"),
        pytest.param({"act_layer": partial(nn.GELU, approximate="tanh")}, id="torch's tanh GELU"),
        *(
            pytest.param({"act_layer": name}, id=name)
            for name in ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
        ),
    ],
)
def test_a_read_model_computes_the_same_and_compiles(variant):
    check_reading(_vit(**variant))


@pytest.mark.parametrize("variant", [{}, {"norm_layer": PLAIN_NORM, "qkv_bias": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_weight_has_the_models_type(variant, dtype):
    weights = read_model(_vit(**variant).to(dtype))
    assert {tensor.dtype for tensor in tensors_of(weights)} == {dtype}


def test_a_distilled_model_answers_with_the_mean_of_two_classifiers():
    torch.manual_seed(0)
    weights = check_reading(shaken(VisionTransformerDistilled(**SIZES)))
    assert (weights.num_read, weights.num_prefix, weights.patch_readout) == (2, 2, "none")
    assert weights.split_graph.kinds == ("cls", "patch")
    assert weights.split_graph.readout == ("cls",)


@pytest.mark.parametrize(
    ("variant", "readout", "groups"),
    [
        ({}, ("cls",), ("cls", "patch")),
        ({"global_pool": "avg"}, ("patch",), ("register", "patch")),
        ({"global_pool": "avg", "class_token": False}, ("patch",), ("patch",)),
    ],
)
def test_token_groups_follow_what_the_classifier_reads(variant, readout, groups):
    graph = read_model(_vit(**variant)).split_graph
    assert (graph.readout, graph.kinds) == (readout, groups)


def test_heads_wider_than_their_share_of_the_width_are_read():
    model = _vit(num_heads=2)
    for block in model.blocks:
        width, wide = 12, 2 * 9
        block.attn.head_dim, block.attn.attn_dim = 9, wide
        block.attn.scale = 9**-0.5
        block.attn.qkv = nn.Linear(width, 3 * wide).double()
        block.attn.proj = nn.Linear(wide, width).double()
    assert check_reading(model).blocks[0].attn.q_weight.shape == (2, 9, 12)


def test_sizes_are_those_of_the_model():
    weights = read_model(_vit(in_chans=1, img_size=24, reg_tokens=3))
    assert (weights.image_size, weights.patch_size, weights.channels) == (24, 8, 1)
    assert (weights.width, weights.num_heads, weights.num_classes) == (12, 2, 5)
    assert (weights.num_prefix, weights.num_tokens) == (4, 13)
    assert weights.split_graph.kinds == ("cls", "register", "patch")
    assert (weights.graph.num_layers, weights.graph.num_heads) == (2, 2)


@pytest.mark.parametrize(
    ("variant", "feature"),
    [
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"global_pool": "map"}, "attention pooling"),
        ({"img_size": (16, 24)}, "image size 16 x 24"),
        ({"patch_size": (8, 4)}, "patch size 8 x 4"),
        ({"img_size": 20}, "image size 20, which is not a multiple of the patch size 8"),
        ({"num_classes": 0}, "classifier Identity"),
        ({"act_layer": "tanh"}, "activation Tanh"),
        ({"norm_layer": "rmsnorm"}, "norm RmsNorm"),
        ({"scale_attn_norm": True}, "attention with a norm over all heads"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix"),
        ({"qk_norm": True, "norm_layer": "rmsnorm"}, "norm RmsNorm"),
        ({"mlp_layer": timm.layers.GatedMlp}, "MLP GatedMlp"),
        ({"patch_drop_rate": 0.5}, "patch_drop"),
        ({"embed_norm_layer": "layernorm"}, r"patch_embed\.norm"),
        ({"attn_layer": "diff", "num_heads": 1}, "attention DiffAttention"),
        ({"block_fn": ResPostBlock}, "block ResPostBlock: post-norm"),
        (
            {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
            "block ParallelScalingBlock",
        ),
        (
            {"embed_layer": partial(HybridEmbed, backbone=nn.Conv2d(3, 8, 2, 2))},
            "HybridEmbed: a convolutional stem",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(variant, feature):
    expect_refusal(_vit(**variant), f"^not supported.*{feature}.*; expected a pre-norm ViT of timm")


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
    expect_refusal(change(_vit()), rf"^not supported: weights of type {types}; .*model\.float\(\)")


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer .*windows"),
        ("cait_xxs24_224", "Cait .*talking heads"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos .*relative position bias"),
        ("beit_base_patch16_224", "Beit .*relative position bias"),
        ("resnet18", "ResNet "),
    ],
)
def test_another_architecture_is_refused_by_name(name, feature):
    with torch.device("meta"):
        model = timm.create_model(name)
    expect_refusal(model, f"^not supported.*: {feature}")


def _with_hook(model: VisionTransformer) -> None:
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: output * 2)


def _with_early_hook(model: VisionTransformer) -> None:
    model.blocks[0].attn.register_forward_pre_hook(lambda module, inputs: None)


def _with_parameter(model: VisionTransformer) -> None:
    model.blocks[1].gain = nn.Parameter(torch.ones(12).double())


def _with_buffer(model: VisionTransformer) -> None:
    model.register_buffer("seen", torch.zeros(1))


def _with_module(model: VisionTransformer) -> None:
    model.blocks[1].adapter = nn.Linear(12, 12).double()


def _with_method(model: VisionTransformer) -> None:
    model.blocks[0].forward = lambda x, **_: x


def _with_subclass(model: VisionTransformer) -> None:
    class LoraLinear(nn.Linear):
        pass

    model.blocks[0].attn.proj.__class__ = LoraLinear


def _with_parametrization(model: VisionTransformer) -> None:
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)


def _with_odd_dropout(model: VisionTransformer) -> None:
    model.blocks[0].drop_path1 = nn.Tanh()


def _with_overlapping_patches(model: VisionTransformer) -> None:
    model.patch_embed.proj.stride = (4, 4)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        (_with_hook, r"a hook on blocks\.0\.attn \(Attention\).*remove it"),
        (_with_early_hook, r"a hook on blocks\.0\.attn"),
        (_with_parameter, r"blocks\.1\.gain, a tensor"),
        (_with_buffer, "seen, a tensor"),
        (_with_module, r"blocks\.1\.adapter \(Linear\), a part of an unknown kind"),
        (_with_method, r"blocks\.0 \(Block\), whose method forward was replaced"),
        (_with_subclass, "attention's proj LoraLinear"),
        (_with_parametrization, "MLP's first layer ParametrizedLinear"),
        (_with_odd_dropout, r"drop_path1 \(Tanh\)"),
        (_with_overlapping_patches, "patch embedding .*whose patches do not lie side by side"),
    ],
)
def test_what_was_added_to_a_model_is_refused_by_name(change, feature):
    model = _vit()
    change(model)
    expect_refusal(model, f"^not supported: {feature}")


def _shift_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden from the adapter: the class itself computes something else."""
    pool = VisionTransformer.pool
    monkeypatch.setattr(VisionTransformer, "pool", lambda *args, **given: pool(*args, **given) + 1)


def test_what_is_hidden_from_the_adapter_is_found_by_its_logits(monkeypatch):
    _shift_logits(monkeypatch)
    expect_refusal(_vit(), "does something that was not understood: its traced logits differ by")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    model = _vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = value
    with pytest.raises(ModelError, match="the model has 1 NaN or infinite weights"):
        read_model(model)


@pytest.mark.parametrize("bad", [False, True], ids=["read", "refused"])
def test_reading_leaves_the_model_untouched(bad, monkeypatch):
    model = _vit(proj_drop_rate=0.5).train()
    model.blocks[1].eval()
    model.pos_embed.requires_grad_(requires_grad=False)
    if bad:
        _shift_logits(monkeypatch)
    state, tensors = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    if bad:
        expect_refusal(model, "was not understood")
    else:
        read_model(model)
    assert state_of(model) == state
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_weights_share_no_memory_with_the_model():
    model = _vit()
    expect_own_memory(model, read_timm(model))


EVA_SIZES = {**SIZES, "embed_dim": 16, "mlp_ratio": 1.5}
ROTARY = {"use_rot_pos_emb": True}


def _eva(**given) -> Eva:
    torch.manual_seed(0)
    return shaken(Eva(**{**EVA_SIZES, **given}))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="mean of patches"),
        pytest.param({"global_pool": "token"}, id="class token"),
        pytest.param({"use_fc_norm": False, "use_post_transformer_norm": True}, id="norm first"),
        pytest.param({"num_reg_tokens": 2, "no_embed_class": True}, id="registers"),
        pytest.param({"class_token": False}, id="patches alone"),
        pytest.param({"use_abs_pos_emb": False, **ROTARY}, id="rotary positions alone"),
        pytest.param({"rope_rotate_half": True, **ROTARY}, id="pairs in halves"),
        pytest.param({"rope_type": "mixed", **ROTARY}, id="frequencies of each head"),
        pytest.param(
            {"rope_type": "dinov3", "dynamic_img_size": True, **ROTARY}, id="DINOv3's positions"
        ),
        pytest.param({"attn_type": "rope", "qk_norm": True, **ROTARY}, id="rotary with qk-norm"),
        pytest.param({"attn_type": "rope", "qkv_fused": False, **ROTARY}, id="own q, k and v"),
        pytest.param({"qkv_fused": False}, id="no bias of keys"),
        pytest.param({"qkv_bias": False}, id="no qkv bias"),
        pytest.param({"swiglu_mlp": True}, id="SwiGLU, packed"),
        pytest.param({"swiglu_mlp": True, "swiglu_align_to": 8}, id="SwiGLU"),
        pytest.param({"scale_mlp": True}, id="sub-norm"),
        pytest.param({"scale_mlp": True, "swiglu_mlp": True}, id="SwiGLU with sub-norm"),
        pytest.param({"init_values": 0.1}, id="LayerScale"),
        pytest.param({"use_pre_transformer_norm": True}, id="norm before the blocks"),
    ],
)
def test_a_read_eva_computes_the_same_and_compiles(variant):
    check_reading(_eva(**variant))


def test_positions_are_those_of_evaluation_whatever_the_mode():
    model = _eva(rope_type="dinov3", rope_shift_coords=2.0, dynamic_img_size=True, **ROTARY)
    weights = read_model(model)
    again = read_model(model.train())
    assert model.rope.training
    for one, other in zip(weights.blocks, again.blocks, strict=True):
        assert torch.equal(one.attn.rotation, other.attn.rotation)


@pytest.mark.parametrize(
    ("variant", "feature"),
    [
        ({"scale_attn_inner": True}, "attention with a norm over all heads"),
        ({"use_post_norm": True}, "block EvaBlockPostNorm: post-norm"),
        ({"global_pool": "map"}, "attention pooling"),
        ({"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}, "grouped-query attention"),
        ({"patch_drop_rate": 0.5}, "patch_drop"),
    ],
)
def test_what_is_not_understood_of_eva_is_refused_by_name(variant, feature):
    expect_refusal(
        _eva(**variant), f"^not supported: .*{feature}.*; expected a pre-norm ViT of timm"
    )
