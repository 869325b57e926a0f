from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_training import CONFIG

from vitcut.training.attention import fast_attention

CPU = torch.device("cpu")
LOW = replace(CONFIG, precision="bfloat16")


def _heads(*, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, 4, generator=draw, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("given", [{}, {"scale": 1.0}, {"attn_mask": None, "dropout_p": 0.0}])
def test_plain_products_give_the_same_values_and_gradients(given):
    inputs = [_heads(seed=i) for i in range(3)]
    found = []
    for active in (LOW, CONFIG):
        with fast_attention(active, CPU):
            out = F.scaled_dot_product_attention(*inputs, **given)
        found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    assert "Softmax" not in str(found[1][0].grad_fn)
    assert found[0][0].grad_fn.name() != found[1][0].grad_fn.name()
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-12, rtol=1e-12)


def test_what_has_a_mask_is_left_to_torch():
    inputs = [_heads(seed=i) for i in range(3)]
    with fast_attention(LOW, CPU):
        found = F.scaled_dot_product_attention(*inputs, is_causal=True)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("config", "device"),
    [(CONFIG, "cpu"), (LOW, "cuda"), (replace(LOW, compile=True), "cpu")],
)
def test_elsewhere_nothing_is_replaced(config, device):
    inputs = [_heads(seed=i) for i in range(3)]
    expected = F.scaled_dot_product_attention(*inputs).grad_fn.name()
    with fast_attention(config, torch.device(device)):
        assert F.scaled_dot_product_attention(*inputs).grad_fn.name() == expected
