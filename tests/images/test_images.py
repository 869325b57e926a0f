"""The images of a task and their splits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import CAT, DOG, OWL, encoded, task_of, tiny_imagenet, write_folder, write_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vitcut
from vitcut.errors import ConfigError, DataError, TaskError
from vitcut.images.load import Images, ImageSet, normalise, split
from vitcut.images.prepare import prepare
from vitcut.images.settings import DataSettings
from vitcut.preprocessing import Preprocessing
from vitcut.task import Task, TaskClass, parse_task

TASK = task_of(cats=[CAT], dogs=[DOG])


def _load(path: Path, task: Task = TASK, **changes: object) -> Images:
    return vitcut.load_images(path, task=task, **{"image_size": 8, **changes})


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "a.zip", tiny_imagenet(train=20, test=5))


def _rows(images: ImageSet) -> set[int]:
    return set(images.rows.tolist())


def test_splits_are_disjoint_and_hold_all_images_of_the_task(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _load(archive)
    assert "left out 1 of 3 classes" in capsys.readouterr().err
    assert [len(s) for s in (data.train, data.val, data.test)] == [36, 4, 10]
    assert len(_rows(data.train) | _rows(data.val) | _rows(data.test)) == 50


def test_labels_are_the_task_s_fine_classes(archive: Path) -> None:
    data = _load(archive)
    for images in (data.train, data.val, data.test):
        # The writer gave cats the shades 1 to 25 and dogs 26 to 50.
        is_dog = images.all()[:, 0, 0, 0] > 25
        assert (images.labels == is_dog).all()


def test_the_same_settings_give_the_same_splits(archive: Path) -> None:
    first, second, other = _load(archive), _load(archive), _load(archive, seed=1)
    assert first.train.rows.tolist() == second.train.rows.tolist()
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert first.train.rows.tolist() != other.train.rows.tolist()
    assert first.test.rows.tolist() == other.test.rows.tolist()


def test_an_image_that_one_task_tunes_on_trains_no_other(archive: Path) -> None:
    other = _load(archive, task_of(dogs=[DOG], owls=[OWL]))
    assert not _rows(_load(archive).val) & _rows(other.train)


@pytest.mark.parametrize("change", [{"seed": 1}, {"val_fraction": 0.3}, {"image_size": 9}], ids=str)
def test_what_changes_the_images_changes_the_fingerprint(archive: Path, change: dict) -> None:
    assert _load(archive).fingerprint != _load(archive, **change).fingerprint


def test_data_in_one_part_is_split_by_class(tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": encoded(i) for c in (CAT, DOG) for i in range(20)}
    data = _load(write_folder(tmp_path / "folder", files))
    for images, count in ((data.train, 16), (data.val, 2), (data.test, 2)):
        assert np.bincount(images.labels).tolist() == [count, count]


def test_a_class_that_the_data_lacks_is_named(archive: Path) -> None:
    task = task_of(cats=[CAT], others=[f"n1{i:07}" for i in range(7)])
    with pytest.raises(TaskError, match=r"names 7 classes that the data lacks: n10000000, .*\.\."):
        _load(archive, task)


def test_a_class_with_too_few_images_is_named(tmp_path: Path) -> None:
    files = {f"{CAT}/{i}.png": encoded() for i in range(9)} | {f"{DOG}/0.png": encoded()}
    # There may be no label file to take it out of.
    told = f"class {DOG} has no train images.*add images, or leave the class out by a label file"
    with pytest.raises(DataError, match=told):
        _load(write_folder(tmp_path / "folder", files))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(count=st.integers(1, 36), seed=st.integers(0, 9))
def test_calibration_images_are_training_images_of_all_classes(
    archive: Path, count: int, seed: int
) -> None:
    data = _load(archive)
    chosen = data.calibration(count, seed=seed)
    assert len(chosen) == count
    assert _rows(chosen) <= _rows(data.train)
    counts = np.bincount(chosen.labels, minlength=2)
    assert abs(counts[0] - counts[1]) <= 1


def test_the_rest_counts_as_one_class_among_calibration_images(archive: Path) -> None:
    text = f"groups: {{cats: [{CAT}]}}\nrest: other"
    data = _load(archive, parse_task(text, origin="x.yaml"))
    assert np.bincount(data.train.labels).tolist() == [18, 18, 18]
    chosen = data.calibration(20, seed=0)
    groups = data.task.group_of_class[chosen.labels]
    assert np.bincount(groups).tolist() == [10, 10]
    assert set(chosen.labels) == {0, 1, 2}


def test_a_rest_without_images_is_refused(archive: Path) -> None:
    classes = [TaskClass(id=name, name=name, group="all") for name in (CAT, DOG, OWL)]
    unseen = TaskClass(id="unseen", name="unseen", group="rest")
    task = Task(name="x", classes=(*classes, unseen), groups=("all", "rest"), rest="rest")
    config = DataSettings(source=str(archive), image_size=8)
    with pytest.raises(DataError, match="has no train images of the rest, group 'rest'"):
        split(prepare(config), config, task, Preprocessing(image_size=8))


def test_names_of_the_data_and_of_imagenet_name_classes(tmp_path: Path, archive: Path) -> None:
    text = "groups: {cats: [House Cat], dogs: [dog]}"
    data = _load(archive, parse_task(text, origin="x.yaml"))
    assert data.task.class_ids == (CAT, DOG)
    assert data.labels.ids == (CAT, DOG, OWL)
    files = {f"{c}/{i}.png": encoded(i) for c in ("n02123045", "n02099601") for i in range(9)}
    source = write_folder(tmp_path / "folder", files)
    task = parse_task("classes: [tabby, golden retriever]", origin="x.yaml")
    named = _load(source, task).task
    assert named.class_names == ("golden retriever", "tabby, tabby cat")
    assert named.groups == ("tabby", "golden retriever")


@pytest.mark.parametrize("count", [0, 37])
def test_calibration_cannot_ask_for_more_than_there_is(archive: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=f"between 1 and 36, .* got {count}"):
        _load(archive).calibration(count, seed=0)


def test_taking_from_a_set_keeps_images_and_labels_together(archive: Path) -> None:
    images = _load(archive).train
    taken = images.take([5, 3]).take([1])
    np.testing.assert_array_equal(taken.all(), images.read([3]))
    assert taken.labels.tolist() == [images.labels[3]]


def test_the_drawn_set_fits_its_label_file() -> None:
    data = vitcut.load_images("drawn", task="drawn", image_size=16)
    assert [len(s) for s in (data.train, data.val, data.test)] == [1620, 180, 600]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_are_normalised_per_channel(dtype: torch.dtype) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    taken = Preprocessing(image_size=4, mean=mean, std=std)
    result = normalise(pixels, taken, dtype=dtype)
    assert result.dtype == dtype
    assert result.is_contiguous()
    np.testing.assert_allclose(result.double().numpy(), expected, atol=4 * torch.finfo(dtype).eps)
