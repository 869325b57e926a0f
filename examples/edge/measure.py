"""Start-up time and peak memory of classify.py, each run in a process of its own.

python measure.py runs/dense/onnx runs/compact/onnx --picture picture.jpg
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

CLASSIFY = Path(__file__).with_name("classify.py")


def run(command: list[str]) -> tuple[float, float]:
    """Seconds until a command has ended, and the MB that it had in memory at most."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - begin, used.ru_maxrss / 1024


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folders", nargs="+", help="exported folders of target onnx")
parser.add_argument("--picture", required=True)
parser.add_argument("--repeats", type=int, default=15)
asked = parser.parse_args()
commands = {"imports alone": [sys.executable, "-c", "import numpy, onnxruntime, PIL.Image"]}
for folder in asked.folders:
    commands[folder] = [sys.executable, str(CLASSIFY), folder, asked.picture]
found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
for _ in range(asked.repeats + 1):  # in turn, and the first round is left out
    for name, command in commands.items():
        found[name].append(run(command))
print(f"{'':40} seconds  peak MB")
for name, pairs in found.items():
    seconds, memory = (median(values) for values in zip(*pairs[1:], strict=True))
    print(f"{name:40} {seconds:7.3f} {memory:8.1f}")
