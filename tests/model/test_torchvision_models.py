from functools import partial

import pytest
import torch
from adapter_laws import check_reading, expect_refusal, shaken
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "mlp_dim": 48,
    "num_classes": 5,
}


def _vit(**given) -> VisionTransformer:
    torch.manual_seed(0)
    return shaken(VisionTransformer(**{**SIZES, **given}))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="plain"),
        pytest.param({"num_heads": 2, "patch_size": 16}, id="few heads and patches"),
        pytest.param({"dropout": 0.5, "attention_dropout": 0.5}, id="dropout"),
        pytest.param({"norm_layer": partial(nn.LayerNorm, eps=1e-3)}, id="another epsilon"),
    ],
)
def test_a_read_model_computes_the_same_and_compiles(variant):
    weights = check_reading(_vit(**variant))
    assert (weights.image_size, weights.width, weights.num_classes) == (32, 32, 5)


def test_attention_without_biases_is_read():
    model = _vit()
    for block in model.encoder.layers:
        old = block.self_attention
        block.self_attention = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
        block.self_attention.double().train(old.training)
    assert not check_reading(model).blocks[0].attn.q_bias.any()


def _with_zero_key(model: VisionTransformer) -> None:
    model.encoder.layers[0].self_attention.add_zero_attn = True


def _with_bias_key(model: VisionTransformer) -> None:
    attn = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True)
    model.encoder.layers[0].self_attention = attn.double()


def _with_tanh_gelu(model: VisionTransformer) -> None:
    model.encoder.layers[1].mlp[1].approximate = "tanh"


def _with_another_mlp(model: VisionTransformer) -> None:
    model.encoder.layers[1].mlp[1] = nn.ReLU()


def _with_bare_heads(model: VisionTransformer) -> None:
    model.heads = nn.Linear(32, 5).double()


def _with_hook(model: VisionTransformer) -> None:
    model.encoder.ln.register_forward_hook(lambda module, inputs, output: output)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        (_with_zero_key, "attention to a key that is no token"),
        (_with_bias_key, "attention to a key that is no token"),
        (_with_tanh_gelu, "activation GELU"),
        (_with_another_mlp, "MLP of Linear, ReLU, Dropout, Linear, Dropout"),
        (_with_bare_heads, r"heads that are a bare Linear: .*OrderedDict\(head=model\.heads\)"),
        (_with_hook, r"a hook on encoder\.ln"),
    ],
)
def test_what_was_changed_in_a_model_is_refused_by_name(change, feature):
    model = _vit()
    change(model)
    expect_refusal(model, f"^not supported: {feature}.*such as vit_b_16")


@pytest.mark.parametrize(
    ("variant", "feature"),
    [
        ({"representation_size": 6}, "representation_size"),
        ({"conv_stem_configs": [ConvStemConfig(8, 3, 8)]}, "Sequential: a convolutional stem"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(variant, feature):
    expect_refusal(_vit(**variant), f"^not supported: .*{feature}")


def test_another_architecture_is_refused_by_name():
    with torch.device("meta"):
        model = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4])
    expect_refusal(model, "^not supported: SwinTransformer .*windows")
