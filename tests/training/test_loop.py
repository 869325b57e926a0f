import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_training import PREPROCESSING, SETTINGS, tiny_images, tiny_model

from vitcut import tensors as tensor_files
from vitcut.errors import ArtefactError, ConfigError, ModelError
from vitcut.model.model import weight_hash
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.training import loop
from vitcut.training.checkpoint import TrainResult
from vitcut.training.loop import SoftCrossEntropy, create_optimizer, training_precision
from vitcut.training.settings import TrainSettings


def train(*arguments, **options) -> TrainResult:
    return loop.train(*arguments, **{"preprocessing": PREPROCESSING, **options})


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


class DyingLoss(SoftCrossEntropy):
    """The usual loss until its last step."""

    def __init__(self, steps: int) -> None:
        self.steps_left = steps

    def __call__(self, batch, logits):
        if self.steps_left == 0:
            raise Killed
        self.steps_left -= 1
        return super().__call__(batch, logits)


def _train(out: Path, settings: TrainSettings = SETTINGS, **options) -> tuple[str, TrainResult]:
    model = tiny_model()
    result = train(model, tiny_images(), settings, out, **options)
    return weight_hash(model), result


def _rows(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds", "train_seconds"}
    return [{key: row[key] for key in row if key not in times} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights and metrics of trainings that nobody killed, by their EMA."""
    found = {}
    for decay in (None, 0.5):
        out = tmp_path_factory.mktemp("undisturbed")
        found[decay] = (_train(out, replace(SETTINGS, ema_decay=decay))[0], _rows(out))
    return found


@settings(max_examples=12, deadline=None)
@given(step=st.integers(0, 11), second_step=st.integers(0, 11), decay=st.sampled_from([None, 0.5]))
def test_a_killed_training_ends_with_the_same_bits(undisturbed, step, second_step, decay):
    changed = replace(SETTINGS, ema_decay=decay)
    with TemporaryDirectory() as name:
        out = Path(name)
        with pytest.raises(Killed):
            _train(out, changed, loss=DyingLoss(step))
        torch.manual_seed(99)
        try:
            _train(out, changed, loss=DyingLoss(second_step))
        except Killed:
            torch.manual_seed(98)
        assert _train(out, changed)[0] == undisturbed[decay][0]
        assert _rows(out) == undisturbed[decay][1]


@pytest.mark.parametrize("write", range(5))
def test_a_kill_between_the_files_of_a_checkpoint_repeats_the_epoch(
    tmp_path, monkeypatch, undisturbed, write
):
    """Also leaves what a kill in the middle of a file leaves."""
    writes = iter(range(100))
    save_file = tensor_files.save_file

    def dying(tensors, path, **options):
        if next(writes) == write:
            (path.parent / f"{path.name}.abc.part").write_bytes(b"half a file")
            raise Killed
        save_file(tensors, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(tensor_files, "save_file", dying)
        with pytest.raises(Killed):
            _train(tmp_path)
    assert _train(tmp_path)[0] == undisturbed[None][0]
    assert _rows(tmp_path) == undisturbed[None][1]


def test_a_finished_training_is_not_redone(tmp_path):
    weights, result = _train(tmp_path)
    assert _train(tmp_path, loss=DyingLoss(0)) == (weights, result)


def test_training_lowers_the_loss_and_leaves_the_model_ready(tmp_path):
    model = tiny_model()
    changed = replace(SETTINGS, epochs=15, learning_rate=1e-2, augmentation="none")
    result = train(model, tiny_images(), changed, tmp_path)
    rows = _rows(tmp_path)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert result.accuracy_fine > 0.5
    assert result.epochs_run == 15
    assert not model.training


def _script_accuracies(monkeypatch, fine_and_coarse) -> list[str]:
    """Make the val split say these accuracies; the weights seen are appended to the list."""
    seen = []

    def accuracies(model, *_, **__):
        seen.append(weight_hash(model))
        return fine_and_coarse[len(seen) - 1]

    monkeypatch.setattr(loop, "val_accuracies", accuracies)
    return seen


def test_early_stopping_keeps_the_best_epoch(tmp_path, monkeypatch):
    coarse = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9]
    seen = _script_accuracies(monkeypatch, [(0.2, value) for value in coarse])
    weights, result = _train(tmp_path, replace(SETTINGS, epochs=6, patience=3))
    assert (result.best_epoch, result.accuracy_coarse, result.epochs_run) == (2, 0.5, 5)
    assert weights == seen[1]


def test_fine_accuracy_decides_between_equal_coarse_ones(tmp_path, monkeypatch):
    seen = _script_accuracies(monkeypatch, [(0.1, 0.5), (0.3, 0.5), (0.2, 0.5)])
    weights, result = _train(tmp_path)
    assert (result.best_epoch, weights) == (2, seen[1])


def test_averaged_weights_are_evaluated_and_kept(tmp_path, undisturbed):
    assert undisturbed[0.5][0] != undisturbed[None][0]


class Leaning(torch.nn.Module):
    """Gives 0.4 to the first class, of group a, and 0.3 to each class of group b."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.4, 1e-9, 0.3, 0.3]).log())

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_the_val_split_is_measured_by_summed_probabilities(tmp_path):
    images = tiny_images()
    labels = images.val.labels
    unbalanced = images.val.take(np.flatnonzero(labels != 1))
    changed = replace(SETTINGS, epochs=1, warmup_epochs=0, learning_rate=1e-12)
    result = train(Leaning(), replace(images, val=unbalanced), changed, tmp_path)
    assert result.accuracy_fine == pytest.approx(1 / 3)
    assert result.accuracy_coarse == pytest.approx(2 / 3)


OPEN = replace(SETTINGS, precision="auto", compile=None)


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_what_is_left_open_is_chosen_printed_and_recorded(tmp_path, monkeypatch, capsys, chosen):
    monkeypatch.setattr(loop, "choose_precision", lambda device: (chosen, f"on {device}"))
    weights, result = _train(tmp_path, OPEN)
    assert f"precision: {chosen} (on cpu)\n" in capsys.readouterr().err
    assert (result.precision, result.threads) == (chosen, torch.get_num_threads())
    explicit = replace(SETTINGS, precision=chosen, compile=False)
    assert _train(tmp_path / "again", explicit)[0] == weights
    assert "precision" not in capsys.readouterr().err


def test_a_training_goes_on_in_the_precision_that_it_began_in(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "choose_precision", lambda _: ("bfloat16", "here"))
    with pytest.raises(Killed):
        _train(tmp_path, OPEN, loss=DyingLoss(6))
    monkeypatch.setattr(loop, "choose_precision", lambda _: ("float32", "on another machine"))
    capsys.readouterr()
    assert _train(tmp_path, OPEN)[1].precision == "bfloat16"
    assert "precision: bfloat16 (as this training began)" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 1.0}])
def test_a_folder_of_another_recipe_is_refused(tmp_path, change):
    _train(tmp_path)
    with pytest.raises(ArtefactError, match="other settings"):
        _train(tmp_path, replace(SETTINGS, **change))


@pytest.mark.parametrize("change", [{"mean": (0.5, 0.5, 0.5)}, {"std": (1.0, 1.0, 1.0)}])
def test_a_folder_of_another_preprocessing_is_refused(tmp_path, change):
    _train(tmp_path)
    with pytest.raises(ArtefactError, match="other settings"):
        _train(tmp_path, preprocessing=replace(PREPROCESSING, **change))


def test_a_std_of_zero_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"std must be a finite number > 0, got 0\.0"):
        _train(tmp_path, preprocessing=replace(PREPROCESSING, std=(1.0, 0.0, 1.0)))


def test_a_folder_of_another_starting_model_is_refused(tmp_path):
    model = tiny_model()
    train(model, tiny_images(), SETTINGS, tmp_path)
    with pytest.raises(ArtefactError, match="starting weights"):
        train(model, tiny_images(), SETTINGS, tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    class Broken(SoftCrossEntropy):
        identity = "broken"

        def __call__(self, batch, logits):
            return logits.sum() * float("nan")

    with pytest.raises(ModelError, match=r"nan at epoch 1, step 4.*lower learning_rate"):
        _train(tmp_path, loss=Broken())


def test_a_model_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ModelError, match="gives 7 classes, task 'tiny' has 4"):
        train(tiny_model(7), tiny_images(), SETTINGS, tmp_path)


def test_a_model_of_another_image_size_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not take images of 4 x 4 pixels and 3 channels"):
        train(tiny_model(), tiny_images(side=4), SETTINGS, tmp_path)


@pytest.mark.graph
def test_compiling_leaves_no_trace_in_the_model(tmp_path, monkeypatch):
    # The default backend would spend its time in a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    vit = VitSettings(patch_size=4, width=8, depth=1, num_heads=2)
    model = build_reference(vit, num_classes=4, image_size=8)
    names = list(model.state_dict())
    changed = replace(SETTINGS, epochs=1, warmup_epochs=0, compile=True, precision="bfloat16")
    train(model, tiny_images(), changed, tmp_path)
    saved = load_file(tmp_path / "checkpoints" / "best.safetensors")
    assert list(model.state_dict()) == names
    assert sorted(saved) == sorted(names)
    assert model.blocks[0].attn.fused_attn


def test_colours_are_not_varied_where_there_are_none(tmp_path):
    images = tiny_images()
    grey = replace(images.train, array=images.train.array[..., :1])
    changed = replace(SETTINGS, augmentation="reference", batch_size=2)
    with pytest.raises(ConfigError, match="'reference' varies colours, the images have 1 channel"):
        train(tiny_model(), replace(images, train=grey), changed, tmp_path)


@given(
    epochs=st.integers(2, 30),
    warmup=st.sampled_from([0, 0.2, 0.5, 1, 2, 5]),
    steps=st.integers(1, 10),
)
def test_learning_rates_warm_up_linearly_then_follow_a_cosine_to_zero(epochs, warmup, steps):
    warmup = min(warmup, epochs - 1)
    changed = replace(SETTINGS, epochs=epochs, warmup_epochs=warmup)
    optimizer, schedule = create_optimizer(tiny_model(), changed, steps)
    peak, low, switch = changed.learning_rate, changed.learning_rate / 100, round(warmup * steps)
    for step in range(epochs * steps):
        schedule.step_update(step)
        if step < switch:
            expected = low + (peak - low) * step / switch
        else:
            part = (step - switch) / (epochs * steps - switch)
            expected = peak * (1 + math.cos(math.pi * part)) / 2
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-9)


def test_biases_have_no_weight_decay():
    optimizer, _ = create_optimizer(tiny_model(), SETTINGS, 1)
    decays = {
        tuple(part.shape): group["weight_decay"]
        for group in optimizer.param_groups
        for part in group["params"]
    }
    assert decays == {(16, 192): 0.05, (16,): 0.0, (4, 16): 0.05, (4,): 0.0}


CPU = torch.device("cpu")
LOW = replace(SETTINGS, precision="bfloat16")


def _heads(*, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, 4, generator=draw, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("given", [{}, {"scale": 1.0}, {"attn_mask": None, "dropout_p": 0.0}])
def test_plain_products_give_the_same_values_and_gradients(given):
    inputs = [_heads(seed=i) for i in range(3)]
    found = []
    for active in (LOW, SETTINGS):
        with training_precision(active, CPU):
            out = F.scaled_dot_product_attention(*inputs, **given)
        found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    assert "Softmax" not in str(found[1][0].grad_fn)
    assert found[0][0].grad_fn.name() != found[1][0].grad_fn.name()
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-12, rtol=1e-12)


def test_what_has_a_mask_is_left_to_torch():
    inputs = [_heads(seed=i) for i in range(3)]
    with training_precision(LOW, CPU):
        found = F.scaled_dot_product_attention(*inputs, is_causal=True)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "device"),
    [(SETTINGS, "cpu"), (LOW, "cuda"), (replace(LOW, compile=True), "cpu")],
)
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_elsewhere_nothing_is_replaced(settings, device):
    inputs = [_heads(seed=i) for i in range(3)]
    expected = F.scaled_dot_product_attention(*inputs).grad_fn.name()
    with training_precision(settings, torch.device(device)):
        assert F.scaled_dot_product_attention(*inputs).grad_fn.name() == expected


def test_only_a_repair_chooses_its_own_learning_rate(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate is None, expected a number"):
        train(tiny_model(), tiny_images(), replace(SETTINGS, learning_rate=None), tmp_path)
