"""The memory of a whole cut, in a process of its own, against what it was allowed."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys
import timm, torch
import vitcut
from vitcut import Budget, CutSettings

def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

torch.set_num_threads(1)
torch.manual_seed(0)
images = vitcut.load_images("drawn", image_size=96)
module = timm.models.VisionTransformer(
    img_size=96, patch_size=8, embed_dim=192, depth=2, num_heads=3,
    num_classes=len(images.task.classes),
)
model = vitcut.load_model(module, mean=0.5, std=0.5)
images = vitcut.load_images("drawn", model=model)
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


def cut_within(memory_gib: float) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(memory_gib)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_a_cut_stays_within_the_memory_that_is_allowed_or_is_refused_first():
    allowed = 3.0
    whole = cut_within(allowed)
    taken = whole["peak"] - whole["before"]
    assert taken > 0.4, "too little to tell"
    assert whole["peak"] <= allowed
    assert whole["refused"] is None
    tight = cut_within(whole["before"] + 0.3)
    assert "needs about" in tight["refused"]
    assert tight["peak"] < whole["before"] + 0.25 * taken, "refused before any work"
