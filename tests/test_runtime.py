import json
import os
import random
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from vitcut import runtime
from vitcut.errors import ConfigError
from vitcut.runtime import (
    choose_device,
    choose_precision,
    describe_machine,
    seed_everything,
    set_threads,
)


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
    with pytest.raises(ConfigError, match="threads must be between 1 and"):
        set_threads(0)


def test_the_machine_is_described_in_json_values():
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert set(machine) == {
        *(
            "cpu",
            "cpu_flags",
            "cores",
            "usable_cores",
            "load_1min",
            "gpu",
            "system",
            "python",
            "versions",
            "date",
        ),
    }
    for name in ("torch", "onnxruntime", "openvino"):
        assert machine["versions"][name] == version(name)


@pytest.mark.parametrize(
    ("flags", "chosen", "why"),
    [
        ("avx2 avx512f avx512_bf16", "bfloat16", "this CPU has avx512_bf16"),
        ("avx2 amx_bf16 avx512_bf16", "bfloat16", "this CPU has amx_bf16"),
        ("avx2 avx512f", "float32", "this CPU has none of amx_bf16, avx512_bf16"),
        ("", "float32", "this CPU has none of"),
    ],
)
def test_a_cpu_trains_in_bfloat16_only_if_it_has_instructions_for_it(
    monkeypatch, flags, chosen, why
):
    monkeypatch.setattr(runtime, "_read_cpu", lambda: {"flags": flags})
    precision, reason = choose_precision(torch.device("cpu"))
    assert precision == chosen
    assert why in reason


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_trains_in_bfloat16_only_if_it_computes_in_it(monkeypatch, supported, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    precision, why = choose_precision(torch.device("cuda"))
    assert precision == chosen
    assert "a GPU" in why


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_one_allowed_core_is_one_core_and_one_thread():
    code = """
import os
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
import torch
from vitcut.runtime import usable_cores
print(usable_cores(), torch.get_num_threads())
"""
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, check=True)
    assert done.stdout.split() == [b"1", b"1"]
