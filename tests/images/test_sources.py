"""What a user may give as the source; downloads come from addresses on this machine."""

import hashlib
from pathlib import Path

import huggingface_hub
import pytest

from vitcut.errors import DataError
from vitcut.images import sources
from vitcut.images.sources import fetch, fetch_tiny_imagenet, open_source


def test_a_download_of_the_known_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"archive")
    known = hashlib.md5(b"archive", usedforsecurity=False).hexdigest()
    fetch((tmp_path / "there").as_uri(), tmp_path / "here", md5=known)
    assert (tmp_path / "here").read_bytes() == b"archive"


def test_a_download_of_another_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"error page")
    with pytest.raises(DataError, match="MD5"):
        fetch((tmp_path / "there").as_uri(), tmp_path / "here", md5="0" * 32)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_address_that_does_not_answer_says_what_to_give_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "TINY_IMAGENET_URL", (tmp_path / "gone").as_uri())
    with pytest.raises(DataError, match="--source"):
        fetch_tiny_imagenet()


def test_an_archive_in_the_cache_is_not_downloaded_again(cache: Path) -> None:
    path = cache / "downloads" / "tiny-imagenet-200.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert fetch_tiny_imagenet() == path


def test_no_network_says_that_the_source_is_neither_here_nor_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with (
        pytest.raises(DataError, match=r"'org/name' is not a file or folder here.*no network"),
        open_source("org/name"),
    ):
        pass


@pytest.mark.parametrize("source", ["gone.zip", "data/gone.parquet", "/gone/folder", "word"])
def test_a_source_that_does_not_exist_is_refused_without_network(source: str) -> None:
    with pytest.raises(DataError, match="does not exist: expected"), open_source(source):
        pass
