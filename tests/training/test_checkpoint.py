import pytest
import torch
from safetensors import SafetensorError

from vitcut.errors import ArtefactError
from vitcut.training.checkpoint import TrainingFolder, read_tensors, write_tensors


def _folder(root, settings_hash="a"):
    return TrainingFolder(root, settings_hash=settings_hash, settings={})


def test_tensors_and_facts_come_back_bit_by_bit(tmp_path):
    tensors = {"a/b.c": torch.randn(3, 4), "step": torch.tensor(7.0), "n": torch.tensor([1, 2])}
    write_tensors(tmp_path / "x" / "last.safetensors", tensors, {"epochs": 3})
    again, facts = read_tensors(tmp_path / "x" / "last.safetensors")
    assert facts == {"epochs": 3}
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("content", [None, b"", b"text instead of tensors", b"\xff" * 100])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "last.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match="not a readable checkpoint") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_in_one_line_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    write_tensors(path, {}, {"epochs": 1})

    def full_disk(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("vitcut.training.checkpoint.save_file", full_disk)
    with pytest.raises(ArtefactError, match=r"cannot write .*No space left"):
        write_tensors(path, {}, {"epochs": 2})
    assert read_tensors(path) == ({}, {"epochs": 1})
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    folder = _folder(tmp_path)
    assert folder.open() is None
    write_tensors(folder.last, {}, {})
    with pytest.raises(ArtefactError, match="other settings"):
        _folder(tmp_path, settings_hash="b").open()


def test_a_training_that_never_came_to_a_checkpoint_blocks_nobody(tmp_path):
    _folder(tmp_path).open()
    assert _folder(tmp_path, settings_hash="b").open() is None


def test_a_finished_training_says_its_result(tmp_path):
    folder = _folder(tmp_path)
    folder.open()
    folder.finish({"best_epoch": 2})
    assert _folder(tmp_path).open() == {"best_epoch": 2}


def test_metrics_after_the_checkpoint_are_cut_off_half_lines_too(tmp_path):
    folder = _folder(tmp_path)
    for epoch in (1, 2, 3):
        folder.append_metrics({"epoch": epoch})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"epo')
    assert [row["epoch"] for row in folder.read_metrics(2)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


@pytest.mark.parametrize("text", ["", '{"epoch": 1}\n', "no json\n\n", '{"epoch": 2}\n' * 2])
def test_metrics_that_do_not_fit_their_checkpoint_are_refused(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ArtefactError, match="does not hold the 2 epochs"):
        _folder(tmp_path).read_metrics(2)
