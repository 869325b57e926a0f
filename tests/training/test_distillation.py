from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import PREPROCESSING, SETTINGS, TASK, tiny_images, tiny_model

from vitcut.errors import ArtefactError, ConfigError
from vitcut.model.model import weight_hash
from vitcut.settings import as_plain
from vitcut.training.batches import Batch
from vitcut.training.distillation import Distillation, repair
from vitcut.training.loop import Loss, SoftCrossEntropy, train
from vitcut.training.settings import FinetuneSettings

FINE = FinetuneSettings(**as_plain(SETTINGS))


def _batch(images: int = 6) -> Batch:
    draw = torch.Generator().manual_seed(1)
    targets = torch.rand(images, 4, generator=draw)
    return Batch(
        inputs=torch.randn(images, 3, 8, 8, generator=draw),
        targets=targets / targets.sum(1, keepdim=True),
    )


def _loss(teacher, **weights) -> Distillation:
    return Distillation(teacher, TASK, replace(FINE, **weights))


def _kl(p, q):
    return float((p * np.log(p / q)).sum(1).mean())


def _by_group(p):
    return np.stack([p[:, TASK.group_of_class == group].sum(1) for group in (0, 1)], axis=1)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.5, 0.25, 3.0)])
def test_the_loss_is_the_weighted_sum_of_its_terms(weights):
    teacher, batch = tiny_model().eval(), _batch()
    logits = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    p, q = (x.detach().double().softmax(1).numpy() for x in (teacher(batch.inputs), logits))
    labels = float(-(batch.targets.numpy() * np.log(q)).sum(1).mean())
    terms = (_kl(_by_group(p), _by_group(q)), _kl(p, q), labels)
    names = ("coarse_weight", "fine_weight", "label_weight")
    found = _loss(teacher, **dict(zip(names, weights, strict=True)))(batch, logits)
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_student_that_equals_its_teacher_learns_nothing():
    teacher = tiny_model().eval()
    student, batch = deepcopy(teacher), _batch()
    loss = _loss(teacher, label_weight=0.0)(batch, student(batch.inputs))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    for parameter in student.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), atol=1e-6, rtol=0)


def test_labels_alone_need_no_teacher():
    class Silent(torch.nn.Linear):
        def forward(self, inputs):
            raise AssertionError

    batch, logits = _batch(), torch.randn(6, 4)
    loss = _loss(Silent(1, 1), coarse_weight=0.0, fine_weight=0.0, label_weight=1.0)
    assert loss(batch, logits) == SoftCrossEntropy()(batch, logits)


def test_the_teacher_is_left_as_it_was():
    teacher, batch = tiny_model().train(), _batch()
    loss = _loss(teacher)
    logits = torch.zeros(6, 4, requires_grad=True)
    first, second = loss(batch, logits), loss(batch, logits)
    assert first == second, "the teacher answers in eval mode, without dropout"
    first.backward()
    assert teacher.training
    assert all(item.requires_grad and item.grad is None for item in teacher.parameters())


def test_the_identity_holds_the_teacher_and_every_weight():
    teacher, other = tiny_model(), tiny_model()
    other[1].weight.data[0, 0] += 1
    changes = [{"coarse_weight": 7.0}, {"fine_weight": 7.0}, {"label_weight": 7.0}]
    losses = [_loss(teacher), _loss(other), *(_loss(teacher, **change) for change in changes)]
    assert len({loss.identity for loss in losses}) == len(losses)
    assert _loss(teacher).identity == _loss(tiny_model()).identity
    assert isinstance(losses[0], Loss)


def test_bfloat16_is_close_to_float32():
    teacher, batch, logits = tiny_model(), _batch(), torch.zeros(6, 4)
    exact, low = (_loss(teacher, precision=name)(batch, logits) for name in ("float32", "bfloat16"))
    assert exact != low
    assert low.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.graph
def test_a_compiled_teacher_answers_the_same(monkeypatch):
    # The default backend would spend its time in a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    teacher, batch, logits = tiny_model(), _batch(), torch.zeros(6, 4)
    plain, compiled = (_loss(teacher, compile=on)(batch, logits) for on in (False, True))
    torch.testing.assert_close(compiled, plain)


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


class Dying(Distillation):
    steps_left = 0

    def __call__(self, batch, logits):
        if self.steps_left == 0:
            raise Killed
        self.steps_left -= 1
        return super().__call__(batch, logits)


def _repair(out: Path, *, steps: int = 1000) -> str:
    model, teacher = tiny_model(), tiny_model()
    teacher[1].weight.data.mul_(3)
    loss = Dying(teacher, TASK, FINE)
    loss.steps_left = steps
    train(model, tiny_images(), FINE, out, preprocessing=PREPROCESSING, loss=loss)
    return weight_hash(model)


@settings(max_examples=6)
@given(step=st.integers(0, 11), second_step=st.integers(0, 11))
def test_a_killed_repair_ends_with_the_same_bits(step, second_step):
    with TemporaryDirectory() as name:
        undisturbed = _repair(Path(name) / "undisturbed")
        for steps in (step, second_step):
            torch.manual_seed(99)
            try:
                _repair(Path(name) / "killed", steps=steps)
            except Killed:
                continue
        assert _repair(Path(name) / "killed") == undisturbed


def test_a_repair_is_a_training_under_the_loss_of_distillation(tmp_path):
    expected = _repair(tmp_path / "trained")
    model, teacher = tiny_model(), tiny_model()
    teacher[1].weight.data.mul_(3)
    before = weight_hash(teacher)
    repair(model, teacher, tiny_images(), FINE, tmp_path / "repaired", preprocessing=PREPROCESSING)
    assert weight_hash(model) == expected
    assert weight_hash(teacher) == before


def test_a_repair_by_another_teacher_is_refused(tmp_path):
    _repair(tmp_path)
    with pytest.raises(ArtefactError, match="other settings"):
        repair(
            tiny_model(), tiny_model(), tiny_images(), FINE, tmp_path, preprocessing=PREPROCESSING
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coarse_weight": -1.0}, "coarse_weight must be a finite number >= 0, got -1"),
        ({"fine_weight": float("inf")}, "fine_weight must be a finite number >= 0, got inf"),
        ({"label_weight": float("nan")}, "label_weight must be a finite number >= 0, got nan"),
        (
            {"coarse_weight": 0.0, "fine_weight": 0.0, "label_weight": 0.0},
            "one of coarse_weight, fine_weight, label_weight must be > 0",
        ),
        ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs must be below epochs"),
    ],
)
def test_weights_of_the_loss_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneSettings(**change)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.2), (3, 0.6), (6, 1.0), (20, 1.0)])
def test_a_repair_warms_up_for_one_epoch_or_a_fifth_of_a_short_training(epochs, warmup):
    assert FinetuneSettings(epochs=epochs).warmup == warmup


@pytest.mark.parametrize(("width", "rate"), [(64, 2e-3), (192, 2e-3 / 9), (768, 2e-3 / 144)])
def test_the_learning_rate_of_a_repair_falls_with_the_square_of_the_width(width, rate):
    assert FinetuneSettings().for_width(width).learning_rate == pytest.approx(rate)
    assert FinetuneSettings(learning_rate=0.5).for_width(width).learning_rate == 0.5
