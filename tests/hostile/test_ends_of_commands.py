"""Commands that are stopped, run out of something, or are typed wrongly end with one line."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vitcut import cli, runtime
from vitcut.__main__ import entry
from vitcut.circuit import Circuit
from vitcut.errors import ModelError
from vitcut.graph import Graph
from vitcut.model.foreign import told_as
from vitcut.model.load import load


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))


def _error(words, capsys):
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("vitcut: error: ")
    return told.removeprefix("vitcut: error: ").rstrip("\n")


class _InterruptsImport:
    def find_spec(self, name, *_):
        if name == "vitcut.cli":
            raise KeyboardInterrupt


def _terminated(_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


@pytest.mark.parametrize(("where", "code"), [("at work", 143), ("while importing", 130)])
def test_a_signal_ends_a_command_in_one_line(monkeypatch, capsys, where, code):
    monkeypatch.setattr(sys, "argv", ["vitcut", "show", "x"])
    monkeypatch.setattr("vitcut.reports.show.show_path", _terminated)
    if where == "while importing":
        monkeypatch.delitem(sys.modules, "vitcut.cli")
        monkeypatch.setattr(sys, "meta_path", [_InterruptsImport(), *sys.meta_path])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            entry()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == code
    assert capsys.readouterr().err == "interrupted; run the same command to continue\n"


@pytest.mark.parametrize("words", [["--help"], ["show", "circuit.json"]])
def test_output_that_nobody_reads_ends_quietly(words):
    Circuit.full(Graph(num_layers=300, num_heads=2)).save("circuit.json")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vitcut", *words]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


SHORTAGES = {
    "memory": [
        MemoryError("Unable to allocate 9.9 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    "threads or processes": [
        RuntimeError("can't start new thread"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    ],
    "open files": [OSError(errno.EMFILE, "Too many open files")],
    "the call stack": [RecursionError("maximum recursion depth exceeded")],
}


@pytest.mark.parametrize(
    ("what", "error"), [(what, one) for what, errors in SHORTAGES.items() for one in errors]
)
def test_a_shortage_is_called_one_and_never_damage(monkeypatch, capsys, what, error):
    def fail(_):
        raise error

    monkeypatch.setattr("vitcut.reports.show.show_path", fail)
    assert _error(["show", "x"], capsys).startswith(f"the machine ran out of {what}: ")
    with pytest.raises(type(error)), told_as("cannot load the model 'x'"):
        raise error


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("vitcut.reports.show.show_path", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main(["show", "x"])


TYPED = {
    "cut --target-mac 0.3": "--target-mac: did you mean --target-macs?",
    "export --model animals": "model is typed without --model: vitcut export MODEL;",
    "predict --model animals a.jpg": "without --model: vitcut predict MODEL PICTURES;",
    "cut --thread 1": "unrecognized arguments: --thread",
    "train --threads x": "threads must be a whole number, got x;",
    "train --ema-decay x": "ema-decay must be a number, got x;",
    "train --epochs 1.5": "epochs must be a whole number, got 1.5;",
    "discover --ablation x": "ablation must be one of zero, mean, resample, got x;",
    "prune": "no command 'prune': did you mean cut?",
    "fine-tune": "did you mean finetune?",
    "Evaluate": "did you mean eval?",
    "train --threads 1000000": "threads must be between 1 and ",
    "checks --threads 0": "unrecognized arguments: --threads",
    "bench x --threads 1000000": "threads must be between 1 and ",
    "train --workers 1000000": "workers must be between 0 and ",
    "train --seed 4294967296": "seed must be between 0 and 4294967295 ",
    "cut --seed -1 --target-macs 0.5": "seed must be between 0 and ",
    "train --source drawn --mean 0.5,0.5": "mean must be one number, or three for ",
    "info x.pth --arch vit --std 0.5,0.5": "std must be one number, or three for ",
    "train --source drawn --image-size 100000000": "image_size must be between 8 and 8192 ",
    "info timm:test_vit --random-weights --image-size 100000": "image_size must be between 8 ",
    "train --width 100000000": "width must be between 1 and ",
    "train --width 16384 --depth 1000": "1000 blocks of width 16384 need ",
    "train --batch-size 100000000": "batch_size must be between 1 and ",
    "bench x --batches 1,100000000": "batch must be between 1 and ",
    "cut --target-macs 0.5 --batch 100000000": "batch must be between 1 and ",
    "train --source drawn --task drawn --image-size 64 --patch-size 7": "a multiple of patch_size",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_typed_wrongly_is_told_before_any_work(tmp_path, capsys, typed):
    assert TYPED[typed] in _error(typed.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_an_error_comes_after_the_start(tmp_path, capsys):
    words = "train --source drawn --task drawn --image-size 16 --patch-size 8 --max-shift-px 99"
    words += " --precision float32 --out new/run"
    told = _error(words.split(), capsys)
    assert "max_shift_px must be below the images' 16 pixels" in told
    assert not [item for item in tmp_path.iterdir() if item.name != "cache"]


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("64", 3), ("", 3), ("x", 3), ("2,1", 2)])
def test_decoding_takes_the_threads_that_it_may(monkeypatch, asked, threads):
    monkeypatch.setattr(runtime, "usable_cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert runtime.usable_threads() == threads


@pytest.mark.parametrize("name", ["timm:test_vit", "hf-hub:nobody/nothing"])
def test_without_a_network_the_hub_is_given_up_within_seconds(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path.cwd()))
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 does not answer .*check the network"):
        load(name)
    assert time.monotonic() - start < 10
