import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import CONFIG, tiny_model

from vitcut.training.optimizer import create_optimizer, create_schedule


@given(epochs=st.integers(2, 30), warmup=st.integers(0, 5), steps=st.integers(1, 10))
def test_learning_rates_warm_up_linearly_then_follow_a_cosine_to_zero(epochs, warmup, steps):
    warmup = min(warmup, epochs - 1)
    config = replace(CONFIG, epochs=epochs, warmup_epochs=warmup)
    optimizer = create_optimizer(tiny_model(), config)
    schedule = create_schedule(optimizer, config, steps)
    peak, low, switch = config.learning_rate, config.learning_rate / 100, warmup * steps
    for step in range(epochs * steps):
        schedule.step_update(step)
        if step < switch:
            expected = low + (peak - low) * step / switch
        else:
            part = (step - switch) / (epochs * steps - switch)
            expected = peak * (1 + math.cos(math.pi * part)) / 2
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-9)


def test_biases_have_no_weight_decay():
    optimizer = create_optimizer(tiny_model(), CONFIG)
    decays = {
        tuple(part.shape): group["weight_decay"]
        for group in optimizer.param_groups
        for part in group["params"]
    }
    assert decays == {(16, 192): 0.05, (16,): 0.0, (4, 16): 0.05, (4,): 0.0}
