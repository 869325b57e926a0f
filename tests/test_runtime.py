import json
import random
from importlib.metadata import version

import numpy as np
import pytest
import torch

from vitcut.errors import ConfigError
from vitcut.runtime import choose_device, describe_machine, seed_everything, set_threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _with_cuda(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "devices", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cpu", 1, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_a_device_that_is_there_is_chosen(monkeypatch, name, devices, expected):
    _with_cuda(monkeypatch, devices)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(("name", "devices"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_missing_is_refused(monkeypatch, name, devices):
    _with_cuda(monkeypatch, devices)
    seen = "".join(f", cuda:{number}" for number in range(devices))
    with pytest.raises(ConfigError, match=f"'{name}' is not here: torch .* sees cpu{seen}$"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "cuda:-1", "", "cpu:0", "CPU"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N, got"):
        choose_device(name)


def test_a_seed_repeats_python_numpy_and_torch():
    def draw():
        seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()


@pytest.mark.usefixtures("threads")
def test_threads_are_limited_and_none_leaves_them():
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(None)
    assert torch.get_num_threads() == 1


def test_zero_threads_are_refused():
    with pytest.raises(ConfigError, match="threads must be >= 1, got 0"):
        set_threads(0)


def test_the_machine_is_described_in_json_values():
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert set(machine) == {
        *("cpu", "cpu_flags", "cores", "load_1min", "gpu", "system", "python", "versions"),
    }
    for name in ("torch", "onnxruntime", "openvino"):
        assert machine["versions"][name] == version(name)
