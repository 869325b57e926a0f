"""The wheel in fresh environments outside the clone: alone, and the demo with its extra."""

import subprocess
from pathlib import Path

import fresh
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    fresh.uv("build", "-q", "--wheel", "-o", folder, Path(__file__).parents[1])
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (90, 70), "red").save(path)
    return path


def test_the_wheel_alone_runs_a_compact_model_and_names_the_extras(wheel, picture, tmp_path):
    from tiny import random_vit

    from vitcut.circuit import Circuit
    from vitcut.compact.info import ModelInfo
    from vitcut.compiler.emit import compile_circuit
    from vitcut.masked.fill import zero_fill
    from vitcut.preprocessing import Preprocessing

    weights = random_vit()
    model = compile_circuit(weights, Circuit.full(weights.graph), zero_fill(weights))
    model.info = ModelInfo(preprocessing=Preprocessing(image_size=4))
    model.save_pretrained(tmp_path / "model")
    python = fresh.environment(tmp_path / "environment", wheel)
    code = """
import sys, time, torch
started = time.process_time()
from vitcut import CompactViT
seconds = time.process_time() - started
CompactViT.from_pretrained("model")(torch.zeros(1, 3, 4, 4))
print(seconds)"""
    seconds = float(fresh.run(python, "-c", code, folder=tmp_path))
    assert seconds < 0.5
    vitcut = python.with_name("vitcut")
    assert "picture.png" in fresh.run(vitcut, "predict", "model", picture, folder=tmp_path)
    assert "cut by vitcut" in fresh.run(vitcut, "info", "model", folder=tmp_path)
    assert "vitcut[cut]" in fresh.run(vitcut, "checks", folder=tmp_path)
    for words, extra in [
        (["info", "animals"], "cut"),
        (["demo", "--out", "demo"], "cut,train"),
        (["export", "model", "--to", "onnx"], "onnx"),
        (["export", "model", "--to", "openvino"], "openvino"),
    ]:
        ended = subprocess.run(
            [vitcut, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1
        assert f"vitcut[{extra}]" in ended.stderr
    kept = {"model", "environment", "picture.png"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_the_demo_runs_from_the_wheel_to_its_end(wheel, picture, version, tmp_path):
    needed = f"vitcut[train] @ {wheel.as_uri()}"
    python = fresh.environment(tmp_path / "environment", needed, python=version)
    vitcut, cache = python.with_name("vitcut"), str(tmp_path / "cache")
    fresh.run(vitcut, "demo", "--out", "demo", folder=tmp_path, timeout=1800, VITCUT_CACHE=cache)
    (cut,) = (tmp_path / "demo" / "points").glob("*-repaired")
    told = fresh.run(vitcut, "predict", cut / "model", picture, folder=tmp_path)
    assert told.startswith(str(picture))
    fresh.run(vitcut, "report", "demo", "--out", "again.html", folder=tmp_path)
    assert (tmp_path / "again.html").stat().st_size > 100_000
