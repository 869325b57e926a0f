import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.results import Results

NAMES = ["acdc-resample-0.03", "acdc-resample-0.001"]

KILLED = """
import os, signal, sys

name, left = sys.argv[1], int(sys.argv[2])

def count(event, details):
    global left
    if event == "open" and str(details[0]).endswith(name) and details[1] == "a":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
from vitcut.cli import main
main(sys.argv[3:])
"""
"""Runs a command and kills it, with the file that ends in ``name`` appended to ``left`` times."""


def _killed(name, appends, command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", KILLED, name, str(appends), *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


def _lines(path):
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def killed_twice(recipe, tmp_path_factory):
    """Killed in training, then in the second search, each time with a torn line, then finished."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    command = ["run", str(recipe), "--out", str(out)]
    _killed("metrics.jsonl", 2, command)
    assert len(_lines(out / "metrics.jsonl")) == 2
    assert not (out / "dense").exists()
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 3, "lo')
    _killed("acdc-resample-0.001/decisions.jsonl", 3, command)
    decisions = out / "points" / NAMES[1] / "decisions.jsonl"
    assert 0 < len(_lines(decisions)) < 46
    assert not (decisions.parent / "circuit.json").exists()
    with decisions.open("a") as stream:
        stream.write('{"source": "emb')
    assert main(command) == 0
    return out


def test_a_killed_run_ends_with_the_same_weights(finished, killed_twice):
    points = [f"points/{name}/model" for name in NAMES]
    for model in ["dense", *points]:
        one = load_file(finished / model / "model.safetensors")
        other = load_file(killed_twice / model / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_killed_run_ends_with_the_same_metrics(finished, killed_twice):
    def metrics(folder):
        rows = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]

    assert metrics(killed_twice) == metrics(finished)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_with_the_same_decisions_and_circuits(finished, killed_twice, name):
    one, other = finished / "points" / name, killed_twice / "points" / name
    assert _lines(other / "decisions.jsonl") == _lines(one / "decisions.jsonl")
    assert Circuit.load(other / "circuit.json") == Circuit.load(one / "circuit.json")


def test_a_killed_run_ends_with_the_same_results_but_for_times(finished, killed_twice):
    def results(folder):
        content = json.loads((folder / "results.json").read_text())
        for point in [content["dense"], *content["points"]]:
            del point["seconds"], point["latency"]
        return content["dense"], content["points"]

    assert results(killed_twice) == results(finished)
    assert len(Results.load(killed_twice / "results.json").comparisons) == 6
