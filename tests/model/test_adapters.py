import inspect
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from adapter_laws import check_reading, expect_own_memory, expect_refusal, shaken
from timm.models.vision_transformer import VisionTransformer
from tiny_models import OWN_VIT, own_vit
from torch import nn

import vitcut
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ConfigError
from vitcut.model import adapters
from vitcut.model.timm_models import read_timm
from vitcut.model.tracing import read_model
from vitcut.model.weights import NormWeights
from vitcut.selection.settings import Budget


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(adapters, "_registered", {})


@pytest.fixture
def own():
    torch.manual_seed(0)
    return own_vit()


def test_the_example_reads_a_vit_of_its_own(own):
    assert len(OWN_VIT.read_text().splitlines()) < 60
    expect_refusal(own.OwnViT(), r"^not supported: OwnViT; .*vitcut\.register_adapter")
    vitcut.register_adapter(own.OwnViT, own.read)
    check_reading(shaken(own.OwnViT()))


def test_an_adapter_is_not_for_subclasses(own):
    class Other(own.OwnViT):
        pass

    vitcut.register_adapter(own.OwnViT, own.read)
    expect_refusal(Other(), "^not supported: Other;")


def test_what_an_adapter_gives_is_copied(own):
    vitcut.register_adapter(own.OwnViT, own.read)
    model = own.OwnViT()
    expect_own_memory(model, read_model(model))


def test_an_own_vit_is_cut_as_any_other(own):
    vitcut.register_adapter(own.OwnViT, own.read)
    model = vitcut.load_model(own.OwnViT(), mean=(0.5,) * 3, std=(0.5,) * 3)
    images = vitcut.load_images("drawn", task="drawn", image_size=16)
    budget = Budget(target_macs=0.5, rounds=1, score_images=12)
    few = CutSettings(images=24)
    cut = vitcut.cut(model, images, budget=budget, settings=few, bench=None)
    assert cut.exactness.max_abs_diff <= cut.exactness.tolerance


def test_an_adapter_that_is_wrong_is_noticed(own):
    def wrong(model):
        weights = own.read(model)
        return replace(weights, positions=weights.positions.flip(0))

    vitcut.register_adapter(own.OwnViT, wrong)
    expect_refusal(own.OwnViT(), r"the adapter for OwnViT is wrong: .*: mend the adapter")


def test_the_last_adapter_registered_counts_and_goes_before_the_librarys():
    called = []
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    for name in ("first", "last"):
        vitcut.register_adapter(
            VisionTransformer, lambda model, name=name: called.append(name) or read_timm(model)
        )
    check_reading(shaken(model))
    assert called == ["last"]


@pytest.mark.parametrize(
    ("kind", "read", "message"),
    [
        (nn.Linear(2, 2), read_timm, r"a subclass of torch\.nn\.Module, got Linear"),
        (int, read_timm, r"a subclass of torch\.nn\.Module, got <class 'int'>"),
        (nn.Linear, None, "must be a function from a module to ViTWeights, got None"),
    ],
)
def test_what_is_no_adapter_is_refused(kind, read, message):
    with pytest.raises(ConfigError, match=message):
        # Tests check types before the function itself does: this is what users meet.
        inspect.unwrap(vitcut.register_adapter)(kind, read)


def test_what_is_no_answer_of_an_adapter_is_refused(own):
    vitcut.register_adapter(own.OwnViT, lambda model: model.state_dict())
    expect_refusal(own.OwnViT(), "gave a OrderedDict, expected")


def test_a_model_without_logits_is_refused(own):
    class Talkative(own.OwnViT):
        def forward(self, pixels):
            return {"logits": super().forward(pixels)}

    vitcut.register_adapter(Talkative, own.read)
    expect_refusal(Talkative(), "Talkative answers with dict; expected a tensor of logits")


def test_weights_with_other_classes_than_the_model_are_refused(own):
    class Half(own.OwnViT):
        def forward(self, pixels):
            return super().forward(pixels)[:, :6]

    vitcut.register_adapter(Half, own.read)
    expect_refusal(Half(), "gives 6 logits, what was read of it 12: mend the adapter")


def test_a_model_that_lacks_what_is_read_is_refused():
    model = timm.create_model("test_vit", num_classes=3)
    del model.patch_drop
    expect_refusal(model, r"^not supported: VisionTransformer of timm, .*'patch_drop'; expected")


def test_a_subclass_of_a_librarys_vit_may_differ_and_is_refused():
    class Mine(VisionTransformer):
        pass

    model = Mine(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    expect_refusal(model, "Mine, a subclass of timm's VisionTransformer that may differ")


def test_a_large_bias_of_the_classifier_hides_no_mistake(own):
    """Masked classes have such; without it the logits are small."""

    def wrong(model):
        weights = own.read(model)
        return replace(weights, positions=weights.positions.flip(0))

    model = own.OwnViT()
    with torch.no_grad():
        model.head.bias[0] = -1e4
    vitcut.register_adapter(own.OwnViT, wrong)
    expect_refusal(model, r"the adapter for OwnViT is wrong: .*: mend the adapter")


def _with_another_head_width(block):
    attn = block.attn
    narrow = {
        name: getattr(attn, name)[:, :1]
        for letter in "qkv"
        for name in (f"{letter}_weight", f"{letter}_bias")
    }
    return replace(block, attn=replace(attn, **narrow, out_weight=attn.out_weight[..., :1]))


def _with_one_block_of(kind, weights):
    """The first block is one of another kind of model."""
    block = weights.blocks[0]
    attn, mlp, eps = block.attn, block.mlp, block.attn_norm.eps

    def norm(width):
        return NormWeights(weight=torch.ones(width), bias=torch.zeros(width), eps=eps)

    of_heads = norm(weights.shape.head_dim)
    rotation = torch.ones(2, 1, weights.num_tokens, weights.shape.head_dim)
    other = {
        "head norm": lambda: replace(block, attn=replace(attn, q_norm=of_heads, k_norm=of_heads)),
        "rotary": lambda: replace(block, attn=replace(attn, rotation=rotation)),
        "gated": lambda: replace(block, mlp=replace(mlp, gate_weight=mlp.in_weight)),
        "neuron norm": lambda: replace(block, mlp=replace(mlp, norm=norm(weights.num_neurons))),
    }[kind]()
    return replace(weights, blocks=(other, *weights.blocks[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: replace(w, blocks=()), "hidden units no blocks in one model"),
        (
            lambda w: replace(w, blocks=(_with_another_head_width(w.blocks[0]), *w.blocks[1:])),
            "head width 1, ",
        ),
        (
            lambda w: replace(
                w,
                blocks=(
                    replace(w.blocks[0], mlp=replace(w.blocks[0].mlp, activation="relu")),
                    *w.blocks[1:],
                ),
            ),
            "activation gelu, relu in one model",
        ),
        *(
            (partial(_with_one_block_of, kind), f"{told} in some places and not in others")
            for kind, told in (
                ("head norm", "norms of queries and keys"),
                ("rotary", "rotary positions"),
                ("gated", "gated MLPs"),
                ("neuron norm", "norms over the neurons"),
            )
        ),
        (
            lambda w: replace(w, positions=w.positions[:-1]),
            "15 patches, which do not form a square",
        ),
        (
            lambda w: replace(w, norm=replace(w.norm, eps=1e-3)),
            "LayerNorm epsilon .*0.001 in one model",
        ),
        (
            lambda w: replace(w, patch_readout="mean"),
            "a classifier of .* reads 1 of 1 prefix tokens",
        ),
        (lambda w: replace(w, num_read=0), "a classifier of .* reads 0 of 1 prefix tokens"),
    ],
)
def test_what_cannot_be_cut_is_refused_when_it_is_read(own, change, message):
    vitcut.register_adapter(own.OwnViT, lambda model: change(own.read(model)))
    expect_refusal(own.OwnViT(), f"^not supported: {message}")
