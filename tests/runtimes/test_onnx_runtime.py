import logging
import shutil
from copy import deepcopy

import onnx
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vitcut.errors import ExactnessError
from vitcut.runtimes.onnx_runtime import export_onnx, load_session
from vitcut.runtimes.session import prepare_sessions

pytestmark = pytest.mark.graph


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=7, drop_rate=0.5
    )


@pytest.fixture(scope="module")
def exported(vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(vit, path, example=images(3))
    return path


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_one_file_runs_any_batch_and_gives_torch_logits(vit, exported, batch):
    logits = load_session(exported, batch=batch, threads=1).run(images(batch))
    with torch.no_grad():
        expected = deepcopy(vit).eval()(images(batch))
    assert torch.allclose(logits, expected, atol=1e-5)


def test_the_path_may_be_text(vit, tmp_path):
    export_onnx(vit, f"{tmp_path}/model.onnx", example=images(2))
    assert load_session(f"{tmp_path}/model.onnx", batch=1, threads=1).run(images(1)).shape == (1, 7)


def test_the_file_is_whole_valid_and_alone(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model)
    assert [item.name for item in exported.parent.iterdir()] == ["model.onnx"]
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits"]


def test_attention_is_one_operation_of_the_file(exported):
    operations = [node.op_type for node in onnx.load(exported).graph.node]
    assert operations.count("Attention") == 2


def test_exporting_leaves_the_model_as_it_was(vit, tmp_path):
    model = deepcopy(vit).train()
    export_onnx(model, tmp_path / "model.onnx", example=images(1))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_session_is_prepared_for_a_batch_of_one_without_a_word(capfd, caplog):
    shallow = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=7
    )
    with caplog.at_level(logging.WARNING):
        (session,) = prepare_sessions("onnxruntime", shallow, [images(1)], threads=1)
    assert session.run(images(1)).shape == (1, 7)
    assert (session.runtime, session.batch) == ("onnxruntime", 1)
    assert "".join(capfd.readouterr()) == ""
    assert caplog.text == ""


def test_a_file_that_computes_something_else_is_not_written(vit, tmp_path, monkeypatch):
    other = deepcopy(vit)
    other.head.bias.data += 0.01
    export_onnx(other, tmp_path / "other" / "model.onnx", example=images(2))
    monkeypatch.setattr(
        torch.onnx,
        "export",
        lambda _, __, path, **___: shutil.copy(tmp_path / "other" / "model.onnx", path),
    )
    with pytest.raises(ExactnessError, match="onnxruntime differs"):
        export_onnx(vit, tmp_path / "model.onnx", example=images(2))
    assert [item.name for item in tmp_path.iterdir()] == ["other"]
