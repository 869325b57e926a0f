import pytest
import torch
from tiny import random_fill, random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.verify import verify
from vitcut.errors import ExactnessError


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
