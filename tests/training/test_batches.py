from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, tiny_images

from vitcut.errors import ConfigError
from vitcut.images.images import ImageSet
from vitcut.training.batches import Share, TrainingBatches
from vitcut.training.settings import TrainSettings


def _batches(
    config: TrainSettings = CONFIG, *, share: Share | None = None, images: ImageSet | None = None
):
    return TrainingBatches(
        images or tiny_images().train,
        config,
        num_classes=4,
        device=torch.device("cpu"),
        share=share or Share(),
    )


@pytest.mark.parametrize("augmentation", ["light", "reference", "none"])
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(augmentation):
    config = replace(CONFIG, augmentation=augmentation)
    first, again, other = (
        [batch.inputs for batch in _batches(config).epoch(epoch)] for epoch in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("augmentation", ["light", "reference", "none"])
def test_targets_of_every_batch_sum_to_one(augmentation):
    config = replace(CONFIG, augmentation=augmentation, cutmix_fraction=1.0)
    for batch in _batches(config).epoch(0):
        assert batch.inputs.shape == (8, 3, 8, 8)
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))


@pytest.mark.parametrize("augmentation", ["light", "reference"])
def test_equal_images_are_varied_differently(augmentation):
    images = tiny_images().train
    same = ImageSet(array=images.array, rows=np.zeros_like(images.rows), labels=images.labels)
    config = replace(CONFIG, augmentation=augmentation)
    inputs = next(_batches(config, images=same).epoch(0)).inputs
    assert not any(torch.equal(inputs[0], other) for other in inputs[1:])


def test_generators_after_a_batch_do_not_depend_on_what_came_before():
    draws = []
    for past in (1, 2):
        torch.manual_seed(past)
        next(_batches().epoch(0))
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[1]


def test_shift_and_flip_keep_the_labels():
    config = replace(CONFIG, cutmix_fraction=0.0, label_smoothing=0.0)
    images = tiny_images().train
    order = np.random.default_rng([config.seed, 0]).permutation(len(images))
    labels = torch.cat([batch.targets.argmax(1) for batch in _batches(config).epoch(0)])
    assert labels.tolist() == images.labels[order[: len(labels)]].tolist()


def test_cutmix_falls_on_its_fraction_of_the_batches():
    config = replace(CONFIG, batch_size=2, cutmix_fraction=0.4, label_smoothing=0.0)
    batches = _batches(config, images=tiny_images(train=600).train).epoch(0)
    # Batches of two of the same class, and boxes without area, do not show.
    mixed = [bool((batch.targets.max(1).values < 1).any()) for batch in batches]
    assert 0.2 < np.mean(mixed) < 0.4


def test_shares_of_a_batch_are_the_batch():
    config = replace(CONFIG, augmentation="none")
    whole = next(_batches(config).epoch(0)).inputs
    parts = [next(_batches(config, share=Share(rank=i, count=2)).epoch(0)).inputs for i in range(2)]
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])


def test_fewer_images_than_a_batch_are_refused():
    message = "at most the 4 training images, got 8: give a smaller batch size"
    with pytest.raises(ConfigError, match=message):
        _batches(images=tiny_images(train=4).train)


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ConfigError, match="multiple of the 3 processes, got 8"):
        _batches(share=Share(count=3))
