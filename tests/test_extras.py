"""What runs without the packages of the extras, and how it is refused where it does not."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vitcut.extras import EXTRAS

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
HEAVY = ("timm", "torchvision", "pyarrow", "accelerate", "onnx", "onnxruntime")
NAMES = {"pillow-heif": "pillow_heif", "litert-torch": "litert_torch"}


def run(code, *missing):
    """Run code in a process where these modules cannot be imported."""
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{hidden}{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_compact_model_is_saved_loaded_and_run_without_the_extras(tmp_path):
    from tiny import random_vit

    from vitcut.circuit import Circuit
    from vitcut.compact.info import ModelInfo
    from vitcut.compiler.emit import compile_circuit
    from vitcut.masked.fill import zero_fill
    from vitcut.preprocessing import Preprocessing

    weights = random_vit()
    circuit = Circuit.full(weights.graph)
    model = compile_circuit(weights, circuit, zero_fill(weights))
    model.info = ModelInfo(preprocessing=Preprocessing(image_size=4))
    model.save_pretrained(tmp_path / "model")
    from PIL import Image

    Image.new("RGB", (9, 7), "red").save(tmp_path / "red.png")
    code = (
        "from vitcut import CompactViT\n"
        "import torch\n"
        f"print(CompactViT.from_pretrained({str(tmp_path / 'model')!r})(torch.zeros(1, 3, 4, 4)))\n"
        "from vitcut.cli import main\n"
        f"raise SystemExit(main(['predict', {str(tmp_path / 'model')!r}, "
        f"{str(tmp_path / 'red.png')!r}]))"
    )
    ended = run(code, *HEAVY)
    assert ended.returncode == 0, ended.stderr
    assert "red.png" in ended.stdout


@pytest.mark.parametrize(
    ("words", "missing", "install"),
    [
        (["info", "animals"], ["timm"], "cut"),
        (["prepare", "--source", "drawn"], ["pyarrow"], "cut"),
        (["cut", "--model", "animals", "--target-macs", "0.5"], ["onnxruntime"], "cut"),
        (["demo", "--out", "out"], ["accelerate"], "cut,train"),
        (["train", "--source", "drawn", "--out", "out"], ["accelerate"], "cut,train"),
        (["predict", "x.onnx", "x.jpg"], ["onnxruntime"], "onnx"),
        (["bench", "x.onnx", "--runtimes", "openvino"], ["openvino"], "openvino"),
        (["export", "animals"], ["onnxscript"], "onnx"),
    ],
)
def test_what_needs_an_extra_names_it_in_one_line(words, missing, install, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.onnx").write_bytes(b"")
    ended = run(f"from vitcut.cli import main\nraise SystemExit(main({words!r}))", *missing)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith(f'pip install "vitcut[{install}]"\n')
    assert missing[0] in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_every_extra_installs_the_modules_that_are_looked_for():
    listed = PROJECT["optional-dependencies"]

    def packages(extra):
        own = {line.partition(">")[0] for line in listed[extra]}
        inner = {name[7:-1] for name in own if name.startswith("vitcut[")}
        return {name for name in own if "[" not in name}.union(*map(packages, inner))

    for extra, modules in EXTRAS.items():
        assert set(modules) <= {NAMES.get(name, name) for name in packages(extra)}
    core = {line.partition(">")[0].partition("[")[0] for line in PROJECT["dependencies"]}
    assert not core & set(HEAVY)
