"""The memory of a whole cut, in a process of its own, against what it was allowed."""

import json
import re
import subprocess
import sys

import pytest

CODE = """
import json, re, sys
import timm, torch
import vitcut
from vitcut import Budget, CutSettings

def peak_gib():
    # Not ru_maxrss: a child takes over its parent's.
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 2**20

torch.set_num_threads(1)
torch.manual_seed(0)
images = vitcut.load_images("drawn", image_size=96)
module = timm.models.VisionTransformer(
    img_size=96, patch_size=8, embed_dim=192, depth=2, num_heads=3,
    num_classes=len(images.task.classes),
)
model = vitcut.load_model(module, mean=0.5, std=0.5)
images = vitcut.load_images("drawn", model=model)
if sys.argv[1] == "draw":
    sys.exit()
before = peak_gib()
settings = CutSettings(images=400, verify_images=8, memory_gib=float(sys.argv[1]))
budget = Budget(target_macs=0.4, rounds=1, score_images=200, val_images=16)
try:
    vitcut.cut(model, images, budget=budget, settings=settings, bench=None)
    refused = None
except vitcut.errors.ConfigError as error:
    refused = str(error)
print(json.dumps({"before": before, "peak": peak_gib(), "refused": refused}))
"""


def run(word: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE, word], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cut_within(memory_gib: float) -> dict:
    return json.loads(run(str(memory_gib)).splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_cut_stays_within_the_memory_that_is_allowed_or_is_refused_first():
    run("draw")  # In another process: drawing takes memory too, and is done once.
    refused = cut_within(1.5)
    needed = float(re.search(r"needs about ([0-9.]+) GiB", refused["refused"])[1])
    done = cut_within(needed)
    assert done["refused"] is None, "what is said to be enough is enough"
    taken = done["peak"] - done["before"]
    assert taken > 0.4, "too little to tell"
    assert needed / 2 < done["peak"] <= needed
    assert refused["peak"] < refused["before"] + 0.25 * taken, "refused before any work"
