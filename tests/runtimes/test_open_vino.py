import logging
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitcut.errors import ExactnessError
from vitcut.runtimes import open_vino
from vitcut.runtimes.open_vino import openvino
from vitcut.runtimes.session import prepare_sessions

pytestmark = pytest.mark.graph


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


class ClassTokenMlp(nn.Module):
    """Rows of a residual stream without a token axis, as a compact model's class tokens."""

    def __init__(self):
        super().__init__()
        self.enter, self.out = nn.Linear(3 * 16 * 16, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.enter(images.flatten(1))
        rows = rows + self.out(rows)
        return rows + self.mlp(self.norm(rows))


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=7, drop_rate=0.5
    )


def test_one_conversion_runs_every_batch_size_and_gives_torch_logits(vit):
    examples = [images(batch) for batch in (1, 2, 5, 20)]
    sessions = prepare_sessions("openvino", vit, examples, threads=1)
    assert vit.training
    frozen = deepcopy(vit).eval()
    with torch.no_grad():
        for session, example in zip(sessions, examples, strict=True):
            assert torch.allclose(session.run(example), frozen(example), atol=1e-5)
    assert [(session.runtime, session.batch) for session in sessions] == [
        ("openvino", batch) for batch in (1, 2, 5, 20)
    ]


def test_logits_outlive_the_next_call(vit):
    (session,) = prepare_sessions("openvino", vit, [images(2)], threads=1)
    first = session.run(images(2))
    before = first.clone()
    session.run(-images(2))
    assert torch.equal(first, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_is_compiled_in_float32_for_its_threads_on_no_pinned_core(
    vit, threads, monkeypatch
):
    seen = []
    compile_model = openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core,
        "compile_model",
        lambda *given: seen.append(compile_model(*given)) or seen[-1],
    )
    prepare_sessions("openvino", vit, [images(3)], threads=threads)
    (compiled,) = seen
    names = ["INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS", "NUM_STREAMS"]
    precision, found, streams = (compiled.get_property(name) for name in names)
    assert (precision.get_type_name(), found, streams) == ("f32", threads, 1)
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert list(compiled.input(0).shape) == [3, 3, 16, 16]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_mlp_over_class_tokens_compiles_at_every_small_batch(threads):
    examples = [images(batch) for batch in (1, 2, 4, 8, 16, 17)]
    sessions = prepare_sessions("openvino", ClassTokenMlp(), examples, threads=threads)
    assert len(sessions) == len(examples)


def test_a_session_is_prepared_for_a_batch_of_one_without_a_word(vit, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        (session,) = prepare_sessions("openvino", vit, [images(1)], threads=1)
    assert session.run(images(1)).shape == (1, 7)
    assert "".join(capfd.readouterr()) == ""
    assert caplog.text == ""


def test_a_model_that_computes_something_else_is_refused(vit, monkeypatch):
    other = deepcopy(vit).eval()
    other.head.bias.data += 0.01
    decoder = open_vino.TorchScriptPythonDecoder
    monkeypatch.setattr(
        open_vino, "TorchScriptPythonDecoder", lambda _, **given: decoder(other, **given)
    )
    with pytest.raises(ExactnessError, match="openvino differs"):
        prepare_sessions("openvino", vit, [images(2)], threads=1)


def test_neither_importing_nor_converting_sends_usage_data():
    code = """
import sys, torch
from vitcut.runtimes.session import prepare_sessions
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
prepare_sessions("openvino", model, [torch.zeros(1, 3, 4, 4)], threads=1)
sys.exit("loaded" if "openvino_telemetry" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
