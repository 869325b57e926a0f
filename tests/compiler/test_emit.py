from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import cost_models, parts_per_kind, skipping_a_head, split_circuits, vits
from tiny import random_fill, random_pixels, random_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitcut.circuit import Circuit
from vitcut.compact.layers import Stream
from vitcut.compact.model import centred
from vitcut.compact.operations import count_macs
from vitcut.compiler.emit import compile_circuit, verify
from vitcut.errors import CircuitError, ExactnessError
from vitcut.masked.masking import full_run


@st.composite
def cases(draw):
    weights = draw(vits())
    return weights, draw(split_circuits(weights)), draw(cost_models())


def check(case):
    weights, circuit, costs = case
    fill, pixels = random_fill(weights, circuit), random_pixels(weights)
    compact = compile_circuit(weights, circuit, fill, dtype=torch.float64, costs=costs)
    verify(compact, weights, circuit, fill, pixels)
    # Training takes another way through the sums; a runtime gets streams without their means.
    verify(compact.train(), weights, circuit, fill, pixels)
    verify(centred(compact), weights, circuit, fill, pixels)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_compact_equals_masked(case):
    check(case)


@pytest.mark.slow
@given(cases())
@settings(max_examples=10_000, deadline=None)
def test_compact_equals_masked_over_many_more_cases(case):
    check(case)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_what_is_added_up_in_a_centred_model_has_mean_0(case):
    weights, circuit, costs = case
    assume(weights.norm is not None)
    compact = compile_circuit(
        weights, circuit, random_fill(weights, circuit), dtype=torch.float64, costs=costs
    )
    compact, means = centred(compact), []
    with patch.object(
        Stream, "_normalise", lambda self, total: means.append(total.mean(-1)) or total
    ):
        compact(random_pixels(weights))
    for mean in means:
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)


@given(vits())
@settings(max_examples=15, deadline=None)
def test_the_full_circuit_is_the_original(weights):
    circuit = Circuit.full(weights.graph)
    compact = compile_circuit(weights, circuit, random_fill(weights), dtype=torch.float64)
    pixels = random_pixels(weights)
    torch.testing.assert_close(
        compact(pixels), full_run(weights, pixels).logits, rtol=1e-9, atol=1e-9
    )


def test_heads_that_are_no_neighbours_share_a_product():
    weights = random_vit(num_heads=3)
    circuit, fill = skipping_a_head(weights.graph), random_fill(weights)
    compact = compile_circuit(weights, circuit, fill, dtype=torch.float64)
    assert compact.plan.blocks[1].attention.outputs[0].heads == (0, 2)
    verify(compact, weights, circuit, fill, random_pixels(weights))


def test_one_single_patch_is_a_row_too():
    weights = random_vit(patches_per_side=1, num_heads=3)
    for circuit in (Circuit.full(weights.graph), parts_per_kind(weights)):
        fill = random_fill(weights, circuit)
        compact = compile_circuit(weights, circuit, fill, dtype=torch.float64)
        verify(compact, weights, circuit, fill, random_pixels(weights))


def test_bfloat16_autocast_gives_the_logits_roughly_and_trains():
    weights = random_vit(num_heads=3).to(torch.float32)
    for circuit in (Circuit.full(weights.graph), parts_per_kind(weights)):
        compact = compile_circuit(weights, circuit, random_fill(weights, circuit))
        pixels = random_pixels(weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = compact(pixels)
        torch.testing.assert_close(logits.float(), compact(pixels), rtol=0.1, atol=0.3)
        logits.float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in compact.parameters())


def test_float32_weights_are_folded_in_float64():
    weights = random_vit().to(torch.float32)
    circuit = Circuit.full(weights.graph)
    fill, precise = random_fill(weights), weights.to(torch.float64)
    single = compile_circuit(weights, circuit, fill)
    double = compile_circuit(precise, circuit, fill.like(precise.patch_weight))
    for name, tensor in single.state_dict().items():
        assert torch.equal(tensor, double.state_dict()[name])


def test_compiling_draws_no_random_numbers():
    weights = random_vit()
    fill, before = random_fill(weights), torch.get_rng_state()
    compile_circuit(weights, Circuit.full(weights.graph), fill)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_a_compact_model_leaves_the_original_alone():
    weights = random_vit()
    circuit, fill, pixels = (
        Circuit.full(weights.graph), random_fill(weights), random_pixels(weights)
    )  # fmt: skip
    before = full_run(weights, pixels).logits
    compact = compile_circuit(weights, circuit, fill, dtype=torch.float64)
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.zero_()
    assert torch.equal(full_run(weights, pixels).logits, before)
    assert fill.fingerprint == random_fill(weights).fingerprint
    assert all(parameter.requires_grad for parameter in compact.parameters())


@given(cases())
@settings(max_examples=40, deadline=None)
def test_the_plan_counts_the_products_that_torch_runs(case):
    weights, circuit, costs = case
    compact = compile_circuit(
        weights, circuit, random_fill(weights, circuit), dtype=torch.float64, costs=costs
    )
    # Fused attention is one operation, which the counter does not know on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compact(random_pixels(weights, 3))
    assert counter.get_total_flops() == 2 * 3 * count_macs(compact.plan)


def test_an_empty_circuit_has_constant_logits():
    weights = random_vit()
    circuit = Circuit(graph=weights.graph, kept=np.zeros_like(weights.graph.edges), ablation="mean")
    compact = compile_circuit(weights, circuit, random_fill(weights), dtype=torch.float64)
    assert [name for name, _ in compact.named_parameters()] == ["logits"]
    assert len(compact(random_pixels(weights, 5))) == 5


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {
            "num_prefix": 2,
            "num_read": 1,
            "patch_readout": "normed_mean",
            "head_dim": 4,
            "embed_norm": True,
            "head_norm": True,
            "rotary": True,
            "gated": True,
            "neuron_norm": True,
        },
    ],
)
def test_every_parameter_of_a_cut_model_is_trained(kind):
    weights = random_vit(num_layers=3, num_heads=3, **kind)
    random = np.random.default_rng(0)
    kept = weights.graph.edges & (random.random(weights.graph.edges.shape) < 0.4)
    circuit = Circuit(graph=weights.graph, kept=kept, ablation="mean")
    compact = compile_circuit(weights, circuit, random_fill(weights), dtype=torch.float64)
    compact(random_pixels(weights)).square().sum().backward()
    untouched = [name for name, p in compact.named_parameters() if p.grad is None]
    assert untouched == []
    learnt = dict(compact.named_parameters())
    fixed = {name for name in compact.state_dict() if name not in learnt}
    assert all(name.endswith("_rotation") for name in fixed)
    assert bool(fixed) == bool(kind)


def test_resample_circuits_are_refused_with_the_remedy():
    weights = random_vit()
    circuit = Circuit.full(weights.graph, ablation="resample")
    with pytest.raises(CircuitError, match=r"circuit\.with_ablation\('mean'\)"):
        compile_circuit(weights, circuit, random_fill(weights))


def test_a_circuit_of_another_model_is_refused():
    circuit = Circuit.full(random_vit(num_heads=3).graph)
    weights = random_vit(num_heads=2)
    with pytest.raises(CircuitError, match="2 blocks of 3 heads, this one has 2 of 2"):
        compile_circuit(weights, circuit, random_fill(weights))


def test_zero_ablation_takes_no_means():
    weights = random_vit()
    circuit = Circuit.full(weights.graph, ablation="zero")
    with pytest.raises(CircuitError, match="not all zero"):
        compile_circuit(weights, circuit, random_fill(weights))


def test_a_fill_of_another_shape_is_refused():
    weights = random_vit()
    fill = random_fill(random_vit(num_heads=3))
    with pytest.raises(CircuitError, match="must have shape"):
        compile_circuit(weights, Circuit.full(weights.graph), fill)


def test_a_product_that_is_replaced_or_watched_is_called():
    weights = random_vit(num_layers=3, num_heads=4, width=32, head_dim=8, hidden=20)
    circuit = parts_per_kind(weights)
    compact = compile_circuit(weights, circuit, random_fill(weights, circuit), dtype=torch.float64)
    pixels = random_pixels(weights)
    before = compact(pixels)
    unbiased = {
        name: module
        for name, module in compact.named_modules()
        if isinstance(module, torch.nn.Linear) and module.bias is None
    }
    calls = []
    for name, module in unbiased.items():
        parent, _, own = name.rpartition(".")
        setattr(compact.get_submodule(parent), own, torch.nn.Sequential(module))
        module.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(compact(pixels), before)
    assert len(calls) == len(unbiased) > 0


@pytest.fixture
def compiled():
    weights = random_vit()
    circuit = Circuit.full(weights.graph)
    fill = random_fill(weights)
    return compile_circuit(weights, circuit, fill, dtype=torch.float64), weights, circuit, fill


def test_exactness_names_difference_tolerance_and_images(compiled):
    exactness = verify(*compiled, random_pixels(compiled[1], 20))
    assert 0 <= exactness.max_abs_diff <= exactness.tolerance
    assert exactness.images == 20


def test_single_precision_gets_its_own_tolerance(compiled):
    compact, weights, circuit, fill = compiled
    exactness = verify(compact.float(), weights, circuit, fill, random_pixels(weights))
    assert 1e-9 < exactness.max_abs_diff < 1e-4 <= exactness.tolerance


@pytest.mark.parametrize("damage", [1e-6, float("nan")])
def test_a_damaged_weight_is_noticed(compiled, damage):
    compact, weights, *_ = compiled
    with torch.no_grad():
        compact.classifier.bias[0] += damage
    with pytest.raises(ExactnessError, match="differ from the masked model's by"):
        verify(*compiled, random_pixels(weights))


def test_verifying_on_nothing_is_refused(compiled):
    with pytest.raises(ExactnessError, match="at least 1 image"):
        verify(*compiled, random_pixels(compiled[1], 0))
