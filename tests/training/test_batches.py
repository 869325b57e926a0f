from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import SETTINGS, tiny_images

from vitcut.errors import ConfigError
from vitcut.images.load import ImageSet
from vitcut.training.batches import (
    TrainingBatches,
    cutmix,
    draw_cutmix_box,
    normalize,
    shift_and_flip,
    soft_targets,
)
from vitcut.training.settings import TrainSettings

SIZE = 8


def _batches(
    settings: TrainSettings = SETTINGS, *, images: ImageSet | None = None, **share: int
) -> TrainingBatches:
    return TrainingBatches(
        images or tiny_images().train,
        settings,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_classes=4,
        device=torch.device("cpu"),
        **share,
    )


@pytest.mark.parametrize("augmentation", ["light", "reference", "none"])
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(augmentation):
    settings = replace(SETTINGS, augmentation=augmentation)
    first, again, other = (
        [batch.inputs for batch in _batches(settings).epoch(epoch)] for epoch in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("augmentation", ["light", "reference", "none"])
def test_targets_of_every_batch_sum_to_one(augmentation):
    settings = replace(SETTINGS, augmentation=augmentation, cutmix_fraction=1.0)
    for batch in _batches(settings).epoch(0):
        assert batch.inputs.shape == (8, 3, 8, 8)
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))


@pytest.mark.parametrize("augmentation", ["light", "reference"])
def test_equal_images_are_varied_differently(augmentation):
    images = tiny_images().train
    same = ImageSet(array=images.array, rows=np.zeros_like(images.rows), labels=images.labels)
    settings = replace(SETTINGS, augmentation=augmentation)
    inputs = next(_batches(settings, images=same).epoch(0)).inputs
    assert not any(torch.equal(inputs[0], other) for other in inputs[1:])


def test_generators_after_a_batch_do_not_depend_on_what_came_before():
    draws = []
    for past in (1, 2):
        torch.manual_seed(past)
        next(_batches().epoch(0))
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[1]


def test_shift_and_flip_keep_the_labels():
    settings = replace(SETTINGS, cutmix_fraction=0.0, label_smoothing=0.0)
    images = tiny_images().train
    order = np.random.default_rng([settings.seed, 0]).permutation(len(images))
    labels = torch.cat([batch.targets.argmax(1) for batch in _batches(settings).epoch(0)])
    assert labels.tolist() == images.labels[order[: len(labels)]].tolist()


def test_cutmix_falls_on_its_fraction_of_the_batches():
    settings = replace(SETTINGS, batch_size=2, cutmix_fraction=0.4, label_smoothing=0.0)
    batches = _batches(settings, images=tiny_images(train=600).train).epoch(0)
    # Batches of two of the same class, and boxes without area, do not show.
    mixed = [bool((batch.targets.max(1).values < 1).any()) for batch in batches]
    assert 0.2 < np.mean(mixed) < 0.4


def test_shares_of_a_batch_are_the_batch():
    settings = replace(SETTINGS, augmentation="none")
    whole = next(_batches(settings).epoch(0)).inputs
    parts = [next(_batches(settings, rank=i, num_processes=2).epoch(0)).inputs for i in range(2)]
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])


def test_fewer_images_than_a_batch_are_refused():
    message = "at most the 4 training images, got 8: give a smaller batch size"
    with pytest.raises(ConfigError, match=message):
        _batches(images=tiny_images(train=4).train)


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ConfigError, match="multiple of the 3 processes, got 8"):
        _batches(num_processes=3)


def _images(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=draw, dtype=torch.uint8)


def _moved(images, down, right, flipped):
    return shift_and_flip(
        images,
        down=torch.tensor([down]),
        right=torch.tensor([right]),
        flipped=torch.tensor([flipped]),
    )


def test_no_shift_and_no_flip_change_nothing():
    images = _images(1)
    assert torch.equal(_moved(images, 0, 0, False), images)


def test_a_flip_mirrors_left_and_right():
    images = _images(1)
    assert torch.equal(_moved(images, 0, 0, True), images.flip(2))


@given(down=st.integers(-6, 6), right=st.integers(-6, 6))
def test_a_shift_moves_the_image_and_mirrors_its_border_into_the_gap(down, right):
    images = _images(1)
    moved = _moved(images, down, right, False)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (6, 6, 6, 6), "reflect")
    expected = padded[:, :, 6 - down : 14 - down, 6 - right : 14 - right]
    assert torch.equal(moved.permute(0, 3, 1, 2).float(), expected)


def test_each_image_moves_by_its_own_amount():
    images = _images(3)
    down, right = torch.tensor([0, 2, -3]), torch.tensor([1, 0, 5])
    flipped = torch.tensor([True, False, True])
    together = shift_and_flip(images, down=down, right=right, flipped=flipped)
    alone = [
        _moved(images[i : i + 1], down[i].item(), right[i].item(), flipped[i].item())
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


@given(st.integers(0, 2**32 - 1))
def test_cutmix_targets_sum_to_one_and_match_the_pasted_area(seed):
    torch.manual_seed(seed)
    # Image i is all of shade i, so a pixel says whose it is.
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, SIZE, SIZE, 3)
    targets = soft_targets(torch.arange(4), 4, 0.0)
    mixed, mixed_targets = cutmix(images, targets, box=draw_cutmix_box(SIZE, SIZE))
    for i in range(4):
        shares = torch.bincount(mixed[i, :, :, 0].flatten().long(), minlength=4) / SIZE**2
        torch.testing.assert_close(mixed_targets[i], shares)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(4))


def test_cutmix_leaves_its_arguments_alone():
    images, targets = _images(4), soft_targets(torch.arange(4), 4, 0.1)
    before = images.clone(), targets.clone()
    cutmix(images, targets, box=(0, 4, 0, 4))
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


@given(st.integers(0, 2**32 - 1))
def test_a_drawn_box_lies_inside_the_image(seed):
    torch.manual_seed(seed)
    top, bottom, left, right = draw_cutmix_box(SIZE, 2 * SIZE)
    assert 0 <= top <= bottom <= SIZE
    assert 0 <= left <= right <= 2 * SIZE


def test_smoothed_targets_sum_to_one_and_keep_their_label():
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    assert targets[0].tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])


def test_normalize_scales_bytes_per_channel():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    scaled = normalize(images, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0))
    assert scaled.shape == (1, 3, 1, 1)
    assert scaled.flatten().tolist() == pytest.approx([-1, 2, 0.2])
