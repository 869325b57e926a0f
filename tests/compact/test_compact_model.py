import json
import subprocess
import sys

import pytest
import torch
from test_plan import PLAN

from vitcut.compact.model import CompactViT
from vitcut.errors import ModelError


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 4, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ModelError, match=r"\[images, 3, 4, 4\], got \["):
        CompactViT(PLAN)(torch.zeros(shape))


def test_a_fresh_model_is_initialised_by_the_seed_alone():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(CompactViT(PLAN).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(tensor.isfinite().all() for tensor in states[0].values())


HEAVY = {"timm", "torchvision", "transformers", "pyarrow", "onnx", "accelerate", "matplotlib"}


def test_a_model_is_loaded_and_run_without_the_packages_of_the_extras(tmp_path):
    model = CompactViT(PLAN)
    model.save_pretrained(tmp_path / "model")
    pixels = torch.zeros(1, 3, 4, 4)
    code = (
        "import sys, torch; from vitcut import CompactViT; "
        f"logits = CompactViT.from_pretrained({str(tmp_path / 'model')!r})"
        "(torch.zeros(1, 3, 4, 4)); "
        f"assert not {HEAVY} & set(sys.modules); print(logits.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert torch.tensor(json.loads(done.stdout)).allclose(model(pixels), atol=1e-6)
