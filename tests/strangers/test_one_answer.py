"""Before a model is cut: does it beat always answering the largest group?"""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_class_order import folders, nameless

import vitcut


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))


def test_an_untrained_model_is_told_to_be_no_better_than_one_answer(tmp_path, capsys):
    source = folders(tmp_path / "photos", ["ant", "bee"])
    model = nameless(2)
    images = vitcut.load_images(source, model=model)
    circuit = vitcut.Circuit.full(model.weights.graph, ablation="zero")
    vitcut.cut(model, images, circuit, settings=vitcut.CutSettings(images=8), bench=None)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "val images right, always answering 'ant' 50.0% (difference" in said[0]
    assert "95 % interval" in said[0]


def test_a_model_that_knows_its_task_is_told_nothing(tmp_path, capsys):
    for name, low in (("bright", 200), ("dark", 0)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for at in range(60):
            pixels = np.full((8, 8), low + at % 50, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{at}.png")
    model = nameless(2)
    images = vitcut.load_images(tmp_path / "photos", model=model)
    settings = vitcut.TransferSettings(freeze="backbone")
    new = vitcut.load_images(tmp_path / "photos", model=model, new_head=True)
    trained = vitcut.train(new, model=model, transfer=settings)
    capsys.readouterr()
    search = vitcut.DiscoverSettings(images=8, tau=10.0)
    vitcut.discover(trained, images, settings=search)
    assert "warning: " not in capsys.readouterr().err
    # The same weights, with the two classes the other way round.
    swapped = replace(trained, kept_classes=None).with_labels(["dark", "bright"])
    vitcut.discover(swapped, images, settings=search)
    assert "warning: the model answers 0.0%" in capsys.readouterr().err
    vitcut.evaluate(swapped, images)
    assert "warning: the model answers 0.0% of 12 test images" in capsys.readouterr().err
    vitcut.evaluate(trained, images)
    assert "warning: " not in capsys.readouterr().err
