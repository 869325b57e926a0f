import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_samples import task_of
from PIL import Image

from vitcut.benchmark.evaluation import Evaluation
from vitcut.errors import ArtefactError, ConfigError
from vitcut.images.load import Images, ImageSet
from vitcut.labels import Labels
from vitcut.model.model import Model
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.preprocessing import Preprocessing
from vitcut.reports.pictures import Pictures, class_attention

TASK = task_of(round=["disc", "ring"], angular=["star"])
LABELS = Labels(owner="data", ids=TASK.class_ids, names=TASK.class_names)
PREPROCESSING = Preprocessing(image_size=16)


@pytest.fixture(scope="module")
def model():
    vit = VitSettings(patch_size=4, width=16, depth=2, num_heads=2)
    return Model.of(
        build_reference(vit, num_classes=3, image_size=16), "tiny", PREPROCESSING, LABELS
    )


def test_the_attention_is_that_of_timm(model):
    seen = []
    for block in model.module.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pixels = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        model.module(pixels)
        found = class_attention(model.weights, pixels)
    expected = torch.stack([pattern[:, :, 0, 1:] for pattern in seen], dim=1).flatten(1, 2)
    torch.testing.assert_close(found, expected)


def answers(*groups):
    """What a model answers that is 90 % sure of these groups."""
    shares = np.where(np.eye(2)[list(groups)], 0.9, 0.1)
    nothing = np.zeros(8, dtype=bool)
    return Evaluation(
        images=8,
        accuracy_fine=None,
        accuracy_coarse=0.0,
        kl=None,
        confusion=(),
        correct_fine=None,
        correct_coarse=nothing,
        log_probs=torch.from_numpy(np.log(shares)),
        groups=TASK.groups,
    )


@pytest.fixture(scope="module")
def pictures(model):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    test = ImageSet(array=array, rows=np.arange(8), labels=np.array([0, 1, 2, 2, 0, 1, 2, 2]))
    images = Images(
        task=TASK,
        train=test,
        val=test,
        test=test,
        preprocessing=PREPROCESSING,
        labels=LABELS,
        fingerprint="",
        origin={},
    )
    found = {
        "dense": answers(0, 0, 1, 1, 0, 0, 0, 0),  # the last two are wrong
        "class-only": answers(0, 0, 1, 1, 0, 0, 0, 0),
        "cut": answers(0, 0, 1, 0, 0, 1, 1, 0),  # two lost, one gained
    }
    return Pictures.of(model, images, found)


def test_changed_answers_are_counted_and_shown(pictures):
    assert pictures.points == ("dense", "cut")
    assert (pictures.changed, pictures.gained, pictures.lost) == ((0, 3), (0, 1), (0, 2))
    changed = [one for one in pictures.pictures if len(set(one.answers)) > 1]
    assert len(changed) == 3
    assert {(one.group, *one.answers) for one in changed} == {(1, 1, 0), (0, 0, 1), (1, 0, 1)}
    assert pictures.pictures[0].probabilities == (0.9, 0.9)


def test_a_picture_is_a_small_webp_and_attention_has_a_byte_per_cell(pictures):
    shown = Image.open(io.BytesIO(base64.b64decode(pictures.pictures[0].image)))
    assert (shown.format, shown.size) == ("WEBP", (16, 16))
    attention = pictures.attention
    assert (attention.asks, attention.layers, attention.heads, attention.grid) == (
        "class token", 2, 2, 4,
    )  # fmt: skip
    levels = np.frombuffer(base64.b64decode(attention.values), np.uint8).reshape(6, 2, 2, 16)
    assert (levels.max(axis=-1) == 255).all()


def test_what_is_kept_is_read_again_and_checked(pictures, tmp_path):
    pictures.save(tmp_path / "pictures.json")
    assert Pictures.load(tmp_path / "pictures.json") == pictures
    first = pictures.pictures[0]
    outside, markup = replace(first, group=2), replace(first, image='"><b>')
    for broken in (outside, markup, replace(first, answers=(0,))):
        with pytest.raises(ConfigError):
            replace(pictures, pictures=(broken,))
    (tmp_path / "pictures.json").write_text("{}")
    with pytest.raises(ArtefactError, match="pictures file"):
        Pictures.load(tmp_path / "pictures.json")
    with pytest.raises(ConfigError, match="attention"):
        replace(pictures.attention, grid=5)
