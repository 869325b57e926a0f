import pytest
import torch
from adapter_laws import check_reading, expect_refusal, shaken
from timm.models.eva import Eva

from vitcut.model.tracing import read_model

SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "mlp_ratio": 1.5,
}
ROTARY = {"use_rot_pos_emb": True}


def _eva(**given) -> Eva:
    torch.manual_seed(0)
    return shaken(Eva(**{**SIZES, **given}))


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
def test_a_read_model_computes_the_same_and_compiles(variant):
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
def test_what_is_not_understood_is_refused_by_name(variant, feature):
    expect_refusal(
        _eva(**variant), f"^not supported: .*{feature}.*; expected a pre-norm ViT of timm"
    )
