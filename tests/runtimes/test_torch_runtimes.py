from functools import partial

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from vitcut.errors import ExactnessError
from vitcut.runtimes.session import prepare_sessions, torch_threads

pytestmark = pytest.mark.graph

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 5), nn.GELU())


class TinyModel(nn.Module):
    """All of them share the code of `forward`."""

    def __init__(self, width: int):
        super().__init__()
        self.product = nn.Linear(48, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.product(images.flatten(1))


def test_a_compiled_session_gives_torch_logits():
    model = tiny_model()
    (session,) = prepare_sessions("torch-compile", model, [IMAGES], threads=1)
    assert torch.allclose(session.run(IMAGES), model(IMAGES), atol=1e-6)
    assert (session.runtime, session.batch) == ("torch-compile", 2)


def test_the_sixth_model_is_compiled_as_the_first(monkeypatch):
    compiled: list[GraphModule] = []
    called: list[GraphModule] = []

    def counting_backend(graph: GraphModule, _: list[torch.Tensor]):
        compiled.append(graph)

        def run(*inputs: torch.Tensor):
            called.append(graph)
            return graph(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting_backend))
    examples = [IMAGES, IMAGES[:1]]
    sessions = [
        prepare_sessions("torch-compile", TinyModel(width), examples, threads=1)
        for width in range(5, 11)
    ]
    assert len(compiled) == 12
    called.clear()
    with torch_threads(1):
        for first, second in sessions:
            first.run(examples[0])
            second.run(examples[1])
    assert called == compiled


def test_a_compiled_model_that_computes_something_else_is_refused(monkeypatch):
    def compile_wrongly(model, **_):
        return lambda images: model(images) + 0.01

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(ExactnessError, match="torch-compile differs"):
        prepare_sessions("torch-compile", tiny_model(), [IMAGES], threads=1)
