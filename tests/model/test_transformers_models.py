import sys

import pytest
import torch
from adapter_laws import check_reading, expect_refusal, shaken
from tiny_models import dinov2_of_the_class_token, hf_classifier
from torch import nn

import vitcut
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ConfigError
from vitcut.model.adapters import as_classifier
from vitcut.model.tracing import read_model

transformers = pytest.importorskip("transformers")


def _build(family: str, *ending: str, **given) -> nn.Module:
    return shaken(hf_classifier(family, *ending, **{"num_labels": 5, **given}))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="plain"),
        pytest.param({"qkv_bias": False, "hidden_act": "quick_gelu"}, id="no qkv bias"),
        pytest.param({"num_channels": 1, "hidden_act": "gelu_new"}, id="one channel"),
        pytest.param({"hidden_act": "gelu_pytorch_tanh", "patch_size": 16}, id="tanh GELU"),
        pytest.param({"hidden_dropout_prob": 0.5, "layer_norm_eps": 1e-3}, id="dropout"),
    ],
)
def test_a_read_vit_computes_the_same_and_compiles(variant):
    weights = check_reading(_build("ViT", **variant))
    assert (weights.image_size, weights.num_classes, weights.num_prefix) == (32, 5, 1)


def test_deits_distillation_token_is_a_register():
    weights = check_reading(_build("DeiT"))
    assert weights.split_graph.kinds == ("cls", "register", "patch")


@pytest.mark.parametrize("variant", [{}, {"drop_path_rate": 0.2, "use_mask_token": False}])
def test_dinov2_is_read_where_its_classifier_reads_the_class_token(variant):
    model = shaken(dinov2_of_the_class_token(num_labels=5, **variant))
    assert check_reading(model).num_classes == 5


@pytest.mark.parametrize("variant", [{}, {"use_swiglu_ffn": True}])
def test_dinov2_is_read_where_its_classifier_reads_the_patches_too(variant):
    weights = check_reading(_build("Dinov2", **variant))
    assert weights.split_graph.readout == ("cls", "patch")
    assert (weights.blocks[0].mlp.gate_weight is not None) == bool(variant)


def test_dinov2_is_read_with_registers():
    weights = check_reading(_build("Dinov2WithRegisters", num_register_tokens=3))
    assert weights.split_graph.kinds == ("cls", "register", "patch")
    assert weights.num_prefix == 4


def test_a_deit_with_a_teacher_answers_with_the_mean_of_two_classifiers():
    weights = check_reading(_build("DeiT", "ForImageClassificationWithTeacher"))
    assert weights.num_read == 2
    assert weights.split_graph.kinds == ("cls", "patch")


@pytest.mark.parametrize("variant", [{}, {"num_channels": 1, "hidden_act": "gelu"}])
def test_clips_classifier_reads_the_mean_of_patches_without_a_norm(variant):
    weights = check_reading(_build("CLIP", **variant))
    assert weights.norm is None
    assert weights.split_graph.kinds == ("register", "patch")
    assert weights.split_graph.readout == ("patch",)


def test_a_version_of_transformers_that_lacks_a_name_is_refused(monkeypatch):
    model = _build("ViT")
    monkeypatch.delattr("transformers.activations.GELUTanh")
    monkeypatch.delitem(sys.modules, "vitcut.model.transformers_models", raising=False)
    told = "transformers cannot be read, .*GELUTanh.*pip install --upgrade transformers"
    with pytest.raises(ConfigError, match=told):
        read_model(as_classifier(model))


def test_the_librarys_own_hooks_are_no_obstacle():
    model = _build("ViT")
    model(torch.zeros(1, 3, 32, 32).double(), output_attentions=True, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    check_reading(model)


def test_a_model_that_answers_with_logits_alone_is_read_too():
    model = _build("ViT")
    wrapped = as_classifier(model)
    pixels = torch.randn(2, 3, 32, 32).double()
    assert torch.equal(wrapped(pixels), model(pixels).logits)
    assert torch.equal(read_model(wrapped).prefix, read_model(model).prefix)
    assert as_classifier(wrapped) is wrapped


def test_an_image_classifier_is_cut_as_any_other():
    module = _build("ViT", num_labels=12)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model = vitcut.load_model(module, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = vitcut.load_images("drawn", task="drawn", image_size=32)
    circuit = vitcut.Circuit.full(model.weights.graph, ablation="zero")
    cut = vitcut.cut(model, images, circuit, settings=CutSettings(images=12), bench=None)
    dense, compact = vitcut.evaluate(model, images), vitcut.evaluate(cut.model, images)
    torch.testing.assert_close(compact.log_probs, dense.log_probs, atol=1e-3, rtol=0)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def _with_hook(model: nn.Module) -> None:
    model.vit.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output)


def _with_pooler(model: nn.Module) -> None:
    model.vit.pooler = nn.Linear(2, 2)


def _with_lora(model: nn.Module) -> None:
    model.vit.layers[0].attention.q_proj = nn.Sequential(nn.Linear(32, 32).double())


def _causal(model: nn.Module) -> None:
    model.vit.layers[1].attention.is_causal = True


def _with_unknown_attention(model: nn.Module) -> None:
    model.config._attn_implementation = "paged|sdpa"


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        (_with_hook, r"a hook on vit\.layers\.0\.mlp \(ViTMLP\)"),
        (_with_pooler, "a pooler before the classifier"),
        (_with_lora, "attention's q_proj Sequential"),
        (_causal, "causal attention"),
        (_with_unknown_attention, r"attention 'paged\|sdpa': model\.set_attn_implementation"),
    ],
)
def test_what_was_changed_in_a_model_is_refused_by_name(change, feature):
    model = _build("ViT")
    change(model)
    expect_refusal(model, f"^not supported: {feature}.*expected the ForImageClassification of ViT")


@pytest.mark.parametrize(
    ("family", "given", "feature"),
    [
        ("ViT", {"hidden_act": "gelu_fast"}, ": activation FastGELUActivation"),
        ("ViT", {"image_size": 36}, ": image size 36, which is not a multiple"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(family, given, feature):
    expect_refusal(_build(family, **given), f"^not supported ?{feature}")


@pytest.mark.parametrize(
    ("name", "config", "feature"),
    [
        ("CLIPVisionModel", "CLIPVisionConfig", ": CLIPVisionModel .no linear classifier"),
        ("SwinForImageClassification", "SwinConfig", ": SwinForImageClassification .*windows"),
        ("BeitForImageClassification", "BeitConfig", ": .*relative position bias"),
        ("ViTModel", "ViTConfig", ": ViTModel .no classifier"),
        ("ViTMAEModel", "ViTMAEConfig", ": ViTMAEModel; expected"),
    ],
)
def test_another_architecture_is_refused_by_name(name, config, feature):
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)())
    expect_refusal(model, f"^not supported ?{feature}")
