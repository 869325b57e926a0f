from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitcut.benchmark import evaluation
from vitcut.benchmark.evaluation import evaluate
from vitcut.errors import ConfigError, DataError, ModelError, TaskError
from vitcut.images.load import ImageSet
from vitcut.preprocessing import Preprocessing
from vitcut.task import Task, TaskClass

TASK = Task(
    name="tiny",
    classes=tuple(TaskClass(id=f"n{i}", name=f"class {i}", group="aab"[i]) for i in range(3)),
    groups=("a", "b"),
)
PREPROCESSING = Preprocessing(image_size=4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def image_set(labels: list[int], seed: int = 0) -> ImageSet:
    array = np.random.default_rng(seed).integers(0, 256, (len(labels), 4, 4, 3), dtype=np.uint8)
    return ImageSet(
        array=array, rows=np.arange(len(labels)), labels=np.array(labels, dtype=np.int64)
    )


def answers(*rows: list[float]):
    """A model that gives these logits, image by image."""
    remaining = iter(torch.tensor(rows))
    return lambda images: torch.stack([next(remaining) for _ in images])


def linear_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))


def run(model, images: ImageSet, *, batch=256, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_MOST_IN_BATCH", batch)
        return evaluate(model, images, TASK, PREPROCESSING, **more)


def test_coarse_accuracy_sums_probabilities_and_not_the_best_class():
    model = answers([1.0, 1.0, 1.5], [0.0, 0.0, 5.0], [3.0, 0.0, 0.0])
    result = run(model, image_set([0, 2, 2]), batch=2)
    assert result.correct_fine.tolist() == [False, True, False]
    assert result.correct_coarse.tolist() == [True, True, False]
    assert (result.accuracy_fine, result.accuracy_coarse) == (1 / 3, 2 / 3)
    assert result.confusion == ((1, 0), (1, 1))
    assert result.images == 3


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 3))
def test_the_batch_size_changes_nothing(count, batch, seed):
    images = image_set([i % 3 for i in range(count)], seed)
    model = linear_model(seed)
    whole, parts = run(model, images, batch=count), run(model, images, batch=batch)
    assert torch.allclose(whole.log_probs, parts.log_probs, atol=1e-5)
    assert whole.confusion == parts.confusion
    assert np.array_equal(whole.correct_fine, parts.correct_fine)
    assert np.sum(whole.confusion) == count
    assert np.trace(whole.confusion) / count == pytest.approx(whole.accuracy_coarse)


def test_a_model_does_not_diverge_from_itself_and_does_from_another():
    images = image_set([0, 1, 2, 2])
    dense = run(linear_model(0), images)
    same = run(linear_model(0), images, reference=dense)
    other = run(linear_model(1), images, reference=dense)
    p, q = dense.log_probs, other.log_probs
    assert dense.kl is None
    assert same.kl == 0
    assert other.kl == pytest.approx((p.exp() * (p - q)).sum(dim=1).mean().item())
    assert other.kl > 1e-3


def test_the_task_distribution_sums_to_one_in_float64():
    log_probs = run(linear_model(), image_set([0, 1])).log_probs
    assert log_probs.dtype == torch.float64
    assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_every_part_of_a_model_gets_its_own_mode_back():
    model = linear_model().train()
    model[2].eval()
    first, second = run(model, image_set([0, 1])), run(model, image_set([0, 1]))
    assert torch.equal(first.log_probs, second.log_probs)
    assert [m.training for m in (model, model[1], model[2])] == [True, True, False]


def test_the_mode_comes_back_after_an_error():
    model = linear_model().train()
    with pytest.raises(TaskError):
        evaluate(model, image_set([0]), replace(TASK, classes=TASK.classes[1:]), PREPROCESSING)
    assert model.training
    assert model[1].training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_with_a_count(value):
    model = answers([0.0, 0.0, 1.0], [0.0, value, 1.0])
    with pytest.raises(ModelError, match="1 of 2 images"):
        run(model, image_set([0, 1]))


def test_another_number_of_classes_than_the_task_is_refused():
    with pytest.raises(TaskError, match="the model has 2 classes, the task 3"):
        run(answers([0.0, 1.0]), image_set([0]))


def test_no_images_are_refused():
    with pytest.raises(DataError, match="no images"):
        run(linear_model(), image_set([]))


def test_a_reference_of_other_images_is_refused():
    three = run(linear_model(), image_set([0, 1, 2]))
    with pytest.raises(ConfigError, match=r"shape \[2, 2\] .*, got \[3, 2\]"):
        run(linear_model(), image_set([0, 1]), reference=three)


@pytest.mark.parametrize(("side", "most"), [(32, 256), (224, 41), (4096, 1)])
def test_large_images_come_in_small_batches(side, most):
    batches = []

    def model(images):
        batches.append(len(images))
        return torch.zeros(len(images), 3)

    array = np.zeros((1, 1, 1, 3), np.uint8)
    array = np.broadcast_to(array, (300 if side < 4096 else 2, side, side, 3))
    rows = np.arange(len(array))
    images = ImageSet(array=array, rows=rows, labels=rows % 3)
    evaluate(model, images, TASK, replace(PREPROCESSING, image_size=side))
    assert max(batches) == most
    assert sum(batches) == len(array)
