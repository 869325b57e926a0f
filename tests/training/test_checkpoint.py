from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from forging import forge
from safetensors import SafetensorError
from torch import nn

from vitcut.errors import ArtefactError
from vitcut.settings import config_hash
from vitcut.tensors import read_tensors, write_tensors
from vitcut.training import checkpoint
from vitcut.training.checkpoint import EpochMetrics, TrainingFolder, TrainResult, read_training

RESULT = TrainResult(
    best_epoch=2,
    accuracy_fine=0.5,
    accuracy_coarse=0.75,
    epochs_run=3,
    seconds=1.5,
    images_per_s=96.0,
)


def _folder(root, **settings):
    return TrainingFolder(root, settings)


def _parts():
    """A model, its optimiser and the average of its weights, after one step."""
    model, average = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "average": average}


def _row(epoch):
    return EpochMetrics(
        epoch=epoch,
        loss=1 / 3,
        accuracy_fine=0.1,
        accuracy_coarse=0.2,
        learning_rate=0.0,
        seconds=2.0,
        train_seconds=1.0,
    )


@pytest.mark.parametrize("content", [None, b"", b"text instead of tensors", b"\xff" * 100])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, content):
    folder, parts = _folder(tmp_path), _parts()
    folder.save_epoch(_row(1), **parts, is_best=True)
    folder.best.unlink() if content is None else folder.best.write_bytes(content)
    with pytest.raises(ArtefactError, match="not a readable checkpoint") as caught:
        folder.load_best(parts["model"], RESULT)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_in_one_line_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    folder, parts = _folder(tmp_path), _parts()
    folder.save_epoch(_row(1), **parts, is_best=True)

    def full_disk(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("vitcut.tensors.save_file", full_disk)
    with pytest.raises(ArtefactError, match=r"cannot write .*No space left"):
        folder.save_epoch(_row(2), **parts, is_best=False)
    assert _folder(tmp_path).resume(**parts) == [_row(1)]
    names = sorted(path.name for path in folder.last.parent.iterdir())
    assert names == ["best.safetensors", "last.safetensors"]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    folder = _folder(tmp_path)
    assert folder.open() is None
    folder.save_epoch(_row(1), **_parts(), is_best=True)
    with pytest.raises(ArtefactError, match="other settings"):
        _folder(tmp_path, seed=1).open()


def test_a_training_that_never_came_to_a_checkpoint_blocks_nobody(tmp_path):
    _folder(tmp_path).open()
    assert _folder(tmp_path, seed=1).open() is None


def test_a_finished_training_says_its_settings_and_its_result(tmp_path):
    folder = _folder(tmp_path, seed=1)
    folder.open()
    with pytest.raises(ArtefactError, match="not finished: run its command again"):
        read_training(tmp_path)
    folder.finish(RESULT)
    assert _folder(tmp_path, seed=1).open() == RESULT
    assert read_training(tmp_path) == ({"seed": 1}, RESULT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": None}, "Expected `object`, got `null` - at `$.settings`"),
        ({"result": {"best_epoch": 1}}, "missing required field `accuracy_fine` - at `$.result`"),
        ({"settings": {"seed": 1}}, "its settings are not those that its hash is of"),
        ({"result": {**asdict(RESULT), "best_epoch": 4}}, "the best of 3 epochs is 4"),
        ({"result": {**asdict(RESULT), "accuracy_coarse": 1.5}}, "must be between 0 and 1"),
    ],
)
def test_a_damaged_marker_is_refused_by_key(tmp_path, change, message):
    _folder(tmp_path).open()
    forge(tmp_path / "training.json", lambda content: content.update(change))
    for read in (_folder(tmp_path).open, lambda: read_training(tmp_path)):
        with pytest.raises(ArtefactError, match="is not a training file") as caught:
            read()
        assert message in str(caught.value)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_state_of_an_epoch_comes_back_bit_by_bit(tmp_path, averaged):
    folder, saved, fresh = _folder(tmp_path), _parts(), _parts()
    if not averaged:
        saved["average"] = fresh["average"] = None
    folder.save_epoch(_row(1), **saved, is_best=True)
    assert folder.resume(**fresh) == [_row(1)]
    for part in ("model", "average") if averaged else ("model",):
        for one, other in zip(saved[part].parameters(), fresh[part].parameters(), strict=True):
            assert torch.equal(one, other)
    moments = (parts["optimizer"].state_dict()["state"] for parts in (saved, fresh))
    for one, other in zip(*(moment.values() for moment in moments), strict=True):
        assert one.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one[name], other[name]) for name in one)
    folder.load_best(fresh["model"], replace(RESULT, best_epoch=1))
    assert torch.equal(fresh["model"].weight, saved["average" if averaged else "model"].weight)


def test_metrics_after_the_checkpoint_are_cut_off_half_lines_too(tmp_path):
    folder, parts = _folder(tmp_path), _parts()
    for epoch in (1, 2):
        folder.save_epoch(_row(epoch), **parts, is_best=False)
    kept = (tmp_path / "metrics.jsonl").read_text()
    state = folder.last.read_bytes()
    folder.save_epoch(_row(3), **parts, is_best=False)
    folder.last.write_bytes(state)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"epo')
    assert folder.resume(**parts) == [_row(1), _row(2)]
    assert (tmp_path / "metrics.jsonl").read_text() == kept


def test_without_a_checkpoint_a_training_starts_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epo')
    assert _folder(tmp_path).resume(**_parts()) == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("lines", [[], ["no json"], ['{"epoch": 9}\n'] * 3])
def test_metrics_are_those_of_the_checkpoint_whatever_their_file_says(tmp_path, lines):
    folder, parts = _folder(tmp_path), _parts()
    for epoch in (1, 2):
        folder.save_epoch(_row(epoch), **parts, is_best=False)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert _folder(tmp_path).resume(**parts) == [_row(1), _row(2)]
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def _state(rows, **changes):
    return {"of": config_hash({}), "epochs": [asdict(row) for row in rows]} | changes


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        ({}, _state([_row(1)], of="0"), "is a checkpoint of another training"),
        ({}, _state([_row(2)]), "does not hold all epochs"),
        ({}, _state([_row(1), _row(1)]), "does not hold all epochs"),
        ({}, {"of": config_hash({})}, "is not a checkpoint: .*`epochs`"),
        ({"model/weight": torch.ones(9)}, _state([_row(1)]), "does not fit the model"),
        ({"model/more": torch.ones(9)}, _state([_row(1)]), "does not fit the model"),
        ({"optimizer/0.exp_avg": torch.ones(9)}, _state([_row(1)]), "does not fit the model"),
        ({"optimizer/7.exp_avg": torch.ones(9)}, _state([_row(1)]), "does not fit the model"),
        ({"optimizer/x": torch.ones(9)}, _state([_row(1)]), "does not fit the model"),
        ({"optimizer/0.more": torch.ones(1, 2)}, _state([_row(1)]), "does not fit the model"),
        ({"model/weight": torch.ones(1, 2) / 0}, _state([_row(1)]), "not finite"),
    ],
)
def test_a_forged_state_is_refused_in_one_line(tmp_path, change, facts, message):
    folder, parts = _folder(tmp_path), _parts()
    folder.save_epoch(_row(1), **parts, is_best=True)
    tensors, _ = read_tensors(folder.last, kind="checkpoint", version=2)
    write_tensors(folder.last, tensors | change, facts, version=2)
    with pytest.raises(ArtefactError, match=message) as caught:
        _folder(tmp_path).resume(**parts)
    assert "\n" not in str(caught.value)


def test_the_best_weights_are_those_of_the_epoch_that_was_best(tmp_path):
    folder, parts = _folder(tmp_path), _parts()
    folder.save_epoch(_row(1), **parts, is_best=True)
    with pytest.raises(ArtefactError, match="is not of epoch 2, the best one"):
        folder.load_best(parts["model"], RESULT)


def _killed_before(monkeypatch, done, folder, row, parts):
    """Save an epoch that is the best so far, but for what comes after this is done."""
    write, rename = checkpoint.write_tensors, Path.replace

    def write_or_end(path, *given, **more):
        if done == "best" and path == folder.last:
            raise KeyboardInterrupt
        write(path, *given, **more)

    def rename_or_end(path, to):
        if done == "state" and to == folder.best:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_tensors", write_or_end)
        patched.setattr(Path, "replace", rename_or_end)
        with pytest.raises(KeyboardInterrupt):
            folder.save_epoch(row, **parts, is_best=True)


@pytest.mark.parametrize(("done", "epochs"), [("best", 1), ("state", 2)])
def test_a_kill_between_best_and_last_leaves_the_best_weights_of_the_state(
    tmp_path, monkeypatch, done, epochs
):
    folder, first, better = _folder(tmp_path), _parts(), _parts()
    folder.open()
    folder.save_epoch(_row(1), **first, is_best=True)
    _killed_before(monkeypatch, done, folder, _row(2), better)
    again = _folder(tmp_path)
    again.open()
    assert len(again.resume(**_parts())) == epochs
    # An epoch that is repeated may come out worse, where computing is not deterministic.
    again.save_epoch(_row(epochs + 1), **_parts(), is_best=False)
    found = nn.Linear(2, 1)
    again.load_best(found, replace(RESULT, best_epoch=epochs))
    assert torch.equal(found.weight, (first, better)[epochs - 1]["average"].weight)
    names = {path.name for path in folder.last.parent.iterdir()}
    assert names == {"best.safetensors", "last.safetensors"}


def test_best_weights_without_a_state_are_no_obstacle(tmp_path, monkeypatch):
    folder = _folder(tmp_path, seed=0)
    folder.open()
    _killed_before(monkeypatch, "best", folder, _row(1), _parts())
    other = _folder(tmp_path, seed=1)
    other.open()
    assert other.resume(**_parts()) == []
    assert not any(folder.last.parent.iterdir())
