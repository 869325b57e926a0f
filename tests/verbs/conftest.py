"""One finished run for all tests of verbs; who wants to change it takes a copy."""

from pathlib import Path

import pytest
import yaml

from vitcut.cli import main

TASK = """
name: shapes
groups:
  plain: {disc: disc, square: square}
  striped: {grid: grid of dots, stripes: stripes}
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a few seconds: 540 pictures of 16 pixels, two blocks of two heads."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "shapes.yaml").write_text(TASK)
    settings = {
        "task": str(folder / "shapes.yaml"),
        "data": {"source": "drawn", "image_size": 16},
        "vit": {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
        "train": {
            "epochs": 6,
            "batch_size": 16,
            "warmup_epochs": 1,
            "learning_rate": 0.005,
            "augmentation": "none",
            "compile": False,
            "precision": "float32",
            "device": "cpu",
        },
        "discover": {"images": 8},
        "taus": [0.03, 0.001],
        "ablations": ["resample"],
        "cut": {"images": 32, "verify_images": 8},
        "bench": {
            "runtimes": ["torch"],
            "batches": [1],
            "seconds": 0.05,
            "min_rounds": 3,
            "min_sample_ms": 0.1,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["run", str(recipe), "--out", str(out)]) == 0
    return out
