import pytest
import torch
from torch import nn

from vitcut.errors import ExactnessError
from vitcut.runtimes import torch_compile
from vitcut.runtimes.session import prepare_sessions

pytestmark = pytest.mark.graph

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 5), nn.GELU())


def test_a_compiled_session_gives_torch_logits():
    model = tiny_model()
    (session,) = prepare_sessions("torch-compile", model, [IMAGES], threads=1)
    assert torch.allclose(session.run(IMAGES), model(IMAGES), atol=1e-6)
    assert (session.runtime, session.batch) == ("torch-compile", 2)


def test_a_compiled_model_that_computes_something_else_is_refused(monkeypatch):
    def compile_wrongly(model, **_):
        return lambda images: model(images) + 0.01

    monkeypatch.setattr(torch_compile.torch, "compile", compile_wrongly)
    with pytest.raises(ExactnessError, match="torch-compile differs"):
        prepare_sessions("torch-compile", tiny_model(), [IMAGES], threads=1)
