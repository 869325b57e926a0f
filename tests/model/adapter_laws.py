"""What must hold for every model that an adapter reads, and how a refusal looks."""

from typing import TypeVar

import numpy as np
import pytest
import torch
from strategies import parts_per_kind
from tiny import random_fill, random_pixels
from torch import nn

from vitcut.circuit import Circuit
from vitcut.compiler.emit import compile_circuit, verify
from vitcut.errors import ModelError, UnsupportedModelError, VitcutError
from vitcut.masked.masking import full_run
from vitcut.model.load import load
from vitcut.model.tracing import read_model
from vitcut.model.weights import ViTWeights, map_tensors

M = TypeVar("M", bound=nn.Module)


def shaken(model: M) -> M:
    """In float64 and eval mode, every parameter moved: libraries start many at 0 or 1."""
    draw = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3)
    return model


def logits_of(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        answer = model(pixels)
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def check_reading(model: nn.Module) -> ViTWeights:
    """Traced == original, compact == masked on random circuits, and the model is untouched."""
    state, tensors = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    weights = read_model(model)
    pixels = random_pixels(weights)
    expected = logits_of(model, pixels)
    difference = (full_run(weights, pixels).logits - expected).abs().max().item()
    assert difference <= 1e-9 * max(1, expected.abs().max().item())
    for circuit in random_circuits(weights):
        fill = random_fill(weights, circuit)
        compact = compile_circuit(weights, circuit, fill, dtype=torch.float64)
        verify(compact, weights, circuit, fill, pixels)
    assert state_of(model) == state
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    return weights


def random_circuits(weights: ViTWeights) -> list[Circuit]:
    random = np.random.default_rng(0)
    found = [Circuit.full(weights.split_graph, ablation="zero"), parts_per_kind(weights)]
    for graph in (weights.graph, weights.split_graph):
        kept = graph.edges & (random.random(graph.edges.shape) < 0.7)
        found.append(Circuit(graph=graph, kept=kept, ablation="mean"))
    return found


def state_of(model: nn.Module) -> dict[str, object]:
    return {
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
    }


def expect_refusal(model: nn.Module, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        read_model(model)
    assert "\n" not in str(caught.value)


def expect_load_refusal(
    spec: object, match: str, kind: type[VitcutError] = ModelError, **given
) -> None:
    with pytest.raises(kind, match=match) as caught:
        load(spec, **given)
    assert "\n" not in str(caught.value)


def expect_own_memory(model: nn.Module, weights: ViTWeights) -> None:
    """Weights that were read stay as they are when the model changes."""
    before = [tensor.clone() for tensor in tensors_of(weights)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for tensor, copy in zip(tensors_of(weights), before, strict=True):
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad


def tensors_of(weights: ViTWeights) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(weights, lambda tensor: found.append(tensor) or tensor)
    return found
