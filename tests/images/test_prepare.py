"""The cache of decoded images."""

import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from data_samples import encoded, shades, tiny_imagenet, write_folder, write_parquet, write_zip
from forging import forge

from vitcut.errors import DataError
from vitcut.images import prepare as prepare_module
from vitcut.images.prepare import FORMAT_VERSION, PreparedData, prepare
from vitcut.images.settings import DataSettings
from vitcut.preprocessing import Framing
from vitcut.settings import config_hash


def _config(source: Path, **changes: object) -> DataSettings:
    return DataSettings(**{"source": str(source), "image_size": 8, **changes})


def _bad_zip(path: Path) -> Path:
    return write_zip(path, tiny_imagenet() | {"train/n00000001/images/n00000001_3.JPEG": b"no"})


def _shade_of(prepared: PreparedData) -> dict[str, int]:
    return dict(zip(prepared.paths.tolist(), shades(prepared.images), strict=True))


def test_every_image_keeps_its_own_row(tmp_path: Path) -> None:
    files = tiny_imagenet()
    prepared = prepare(_config(write_zip(tmp_path / "a.zip", files)))
    images = [name for name in files if name.endswith(".JPEG")]
    assert _shade_of(prepared) == {name: shade for shade, name in enumerate(images, start=1)}
    assert prepared.images.dtype == np.uint8
    assert isinstance(prepared.images, np.memmap)
    assert not prepared.images.flags.writeable


def test_zip_folder_and_second_call_share_one_cache(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(_config(write_zip(tmp_path / "a.zip", tiny_imagenet(), top="tiny/")))
    assert "prepared in" in capsys.readouterr().err
    second = prepare(_config(write_folder(tmp_path / "folder", tiny_imagenet()), seed=5))
    assert "found in" in capsys.readouterr().err
    assert len(list((cache / "data").iterdir())) == 1
    np.testing.assert_array_equal(first.images, second.images)


def test_another_image_size_is_another_cache(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 0])
    assert prepare(_config(path)).images.shape == (3, 8, 8, 3)
    assert prepare(_config(path, image_size=12)).images.shape == (3, 12, 12, 3)


def test_another_framing_is_another_cache_and_the_default_is_the_one_of_before(
    tmp_path: Path, cache: Path
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 0])
    fingerprint = prepare(_config(path)).fingerprint
    key = config_hash(FORMAT_VERSION, fingerprint, 8)
    assert [item.name for item in (cache / "data").iterdir()] == [key]
    grey = prepare(_config(path), Framing(channels=1))
    assert grey.images.shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(prepare(_config(path), Framing(channels=1)).images, grey.images)
    prepare(_config(path), Framing(crop_fraction=0.9))
    assert len(list((cache / "data").iterdir())) == 3


def test_drawn_pictures_come_in_grey_too() -> None:
    config = DataSettings(source="drawn", image_size=8)
    colours, grey = prepare(config), prepare(config, Framing(channels=1))
    assert grey.images.shape == (*colours.images.shape[:3], 1)
    expected = colours.images.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(grey.images[..., 0] - expected).max() <= 0.51


def test_bad_images_are_counted_and_listed(tmp_path: Path, cache: Path) -> None:
    path = _bad_zip(tmp_path / "a.zip")
    with pytest.raises(DataError, match=r"1 of 24 images do not decode: train.*_3\.JPEG"):
        prepare(_config(path))
    assert list((cache / "data").iterdir()) == []


def test_bad_images_are_left_out_on_demand_and_never_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _bad_zip(tmp_path / "a.zip")
    for _ in range(2):
        prepared = prepare(_config(path, skip_bad_images=True))
        assert capsys.readouterr().err.count("left out: 1 of 24 images do not decode") == 1
        assert len(prepared.images) == len(prepared.paths) == 23
        assert prepared.skipped == {
            "train/n00000001/images/n00000001_3.JPEG": "not an image of a known format"
        }
        assert _shade_of(prepared)["train/n00000001/images/n00000001_4.JPEG"] == 5
    with pytest.raises(DataError, match="--skip-bad-images"):
        prepare(_config(path))


def test_a_killed_run_leaves_nothing_that_counts(tmp_path: Path, cache: Path) -> None:
    path = write_zip(tmp_path / "a.zip", tiny_imagenet())
    code = f"""
import os, signal
from vitcut.images import prepare
from vitcut.images.settings import DataSettings
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
prepare.save = kill
prepare.prepare(DataSettings(source={str(path)!r}, image_size=8))
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((cache / "data").glob(".*.part"))) == 1
    again = prepare(_config(path))
    assert len(list((cache / "data").iterdir())) == 1
    shutil.rmtree(cache)
    np.testing.assert_array_equal(again.images, prepare(_config(path)).images)


def test_what_a_killed_run_left_of_other_data_goes_too(tmp_path: Path, cache: Path) -> None:
    for part in (cache / ".a.zip.0123456789ab.part", cache / "data" / ".key.0123456789ab.part"):
        part.mkdir(parents=True)
        (part / "images.npy").write_bytes(b"half")
    prepare(_config(write_zip(tmp_path / "a.zip", tiny_imagenet())))
    assert [item.name for item in cache.iterdir()] == ["data"]
    assert len(list((cache / "data").iterdir())) == 1


def test_a_faster_process_wins_and_both_have_the_data(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "a.zip", tiny_imagenet())
    save = prepare_module.save

    def overtaken(*meta: object, **version: int) -> None:
        monkeypatch.setattr(prepare_module, "save", save)
        prepare(_config(path))
        save(*meta, **version)

    monkeypatch.setattr(prepare_module, "save", overtaken)
    assert len(prepare(_config(path)).images) == 24
    assert len(list((cache / "data").iterdir())) == 1


def test_a_full_disk_is_found_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="GiB left, expected"):
        prepare(_config(write_zip(tmp_path / "a.zip", tiny_imagenet())))


def test_a_cache_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set VITCUT_CACHE"):
        prepare(_config(write_zip(tmp_path / "a.zip", tiny_imagenet())))


@pytest.mark.parametrize("name", ["images.npy", "index.parquet", "meta.json"])
@pytest.mark.parametrize("size", [0, 70])
def test_a_damaged_cache_says_what_to_delete(
    tmp_path: Path, cache: Path, name: str, size: int
) -> None:
    path = write_zip(tmp_path / "a.zip", tiny_imagenet())
    prepare(_config(path))
    damaged = next((cache / "data").iterdir()) / name
    damaged.write_bytes(damaged.read_bytes()[:size])
    with pytest.raises(DataError, match=r"damaged .*: delete"):
        prepare(_config(path))


@pytest.mark.parametrize("name", ["images.npy", "index.parquet", "meta.json"])
def test_no_bit_of_the_cache_can_be_flipped_in_silence(
    tmp_path: Path, cache: Path, name: str
) -> None:
    path = write_zip(tmp_path / "a.zip", tiny_imagenet())
    whole = prepare(_config(path))
    images = np.array(whole.images)
    damaged = next((cache / "data").iterdir()) / name
    content = damaged.read_bytes()
    for place in np.random.default_rng(0).integers(0, 8 * len(content), 12):
        altered = bytearray(content)
        altered[place // 8] ^= 1 << place % 8
        damaged.write_bytes(altered)
        with suppress(DataError):
            again = prepare(_config(path))
            assert (again.images == images).all(), f"bit {place}"
            assert again.paths.tolist() == whole.paths.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"images": 23},
        {"image_size": 9},
        {"source_fingerprint": "of other pictures"},
        {"class_names": {}},
        {"files": {}},
        {"skipped": [1]},
        {"more": 1},
    ],
)
def test_a_forged_cache_is_refused(tmp_path: Path, cache: Path, change: dict[str, object]) -> None:
    path = write_zip(tmp_path / "a.zip", tiny_imagenet())
    prepare(_config(path))
    forge(next((cache / "data").iterdir()) / "meta.json", lambda content: content.update(change))
    with pytest.raises(DataError, match=r"prepared data is .*delete"):
        prepare(_config(path))


def test_drawn_pictures_do_not_touch_the_disk(cache: Path) -> None:
    assert prepare(DataSettings(source="drawn", image_size=8)).images.shape == (2400, 8, 8, 3)
    assert not cache.exists()


def test_a_source_whose_images_are_all_bad_is_refused(tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": b"bad" for c in ("cat", "dog") for i in range(2)}
    with pytest.raises(DataError, match="4 of 4 images do not decode"):
        prepare(_config(write_folder(tmp_path / "a", files), skip_bad_images=True))


def test_a_grey_image_is_prepared_as_rgb(tmp_path: Path) -> None:
    files = {"cat/1.png": encoded(7, mode="L"), "dog/1.png": encoded(9)}
    assert shades(prepare(_config(write_folder(tmp_path / "a", files))).images) == [7, 9]
