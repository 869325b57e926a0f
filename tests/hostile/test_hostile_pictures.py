"""Pictures, folders, archives and parquet files that are broken, forged or too large."""

import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import encoded, write_folder, write_parquet, write_zip
from PIL import Image

from vitcut import cli
from vitcut.errors import DataError, VitcutError
from vitcut.images import decoding
from vitcut.images import prepare as prepare_module
from vitcut.images.archives import MAX_FILE_BYTES
from vitcut.images.prepare import prepare
from vitcut.images.settings import DataSettings
from vitcut.images.sources import open_source

PICTURES = {f"{own}/{i}.png": encoded(i) for own in ("cat", "dog") for i in range(3)}
NUM_FLIPS = 50
_STREAM = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
    _STREAM, "PNG"
)
NOISE = _STREAM.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _list(path: Path) -> None:
    with open_source(str(path)):
        pass


def _prepare(path: Path, **more: object) -> None:
    prepare(DataSettings(source=str(path), image_size=8, **more))


@pytest.mark.parametrize("begins", [b"", NOISE[:1000]], ids=["zeros", "a PNG's head"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_does_not_decode_is_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, begins: bytes
) -> None:
    """Twelve files of 20 MB at a time would take 240."""
    files = PICTURES | {f"cat/zeros-{i}.png": begins + bytes(20_000_000) for i in range(12)}
    write = write_zip if kind == "zip" else write_folder
    path = write(tmp_path / "a.zip", files)
    del files
    monkeypatch.setattr(prepare_module, "usable_threads", lambda: 1)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="12 of 18 images do not decode"):
            _prepare(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (90e6 if begins else 10e6), peak


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Lock:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(decoding, "_ONE_AT_A_TIME", Lock())
    decoding.decode(encoded(size=(64, 64)), 8)
    assert not entered
    monkeypatch.setattr(decoding, "_LARGE_PIXELS", 1000)
    decoding.decode(encoded(size=(64, 64)), 8)
    assert entered


def _link(path: Path, to: str) -> None:
    path.symlink_to(to)


SPECIAL = {
    "a device": lambda path: _link(path, "/dev/zero"),
    "a fifo": os.mkfifo,
    "a link to nothing": lambda path: _link(path, "nowhere"),
    "a link to a folder that holds it": lambda path: _link(path, ".."),
}


@pytest.mark.parametrize("name", ["1.png", "notes"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_links_and_files_that_are_none_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = write_folder(tmp_path / "a", {"cat/0.png": b"", "dog/0.png": b""})
    SPECIAL[kind](path / "cat" / name)
    with pytest.raises(DataError, match=f"{name}.* is {kind}.*: remove"):
        _list(path)


def test_links_to_pictures_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "store", PICTURES)
    (tmp_path / "a").mkdir()
    _link(tmp_path / "a" / "one", "../store/cat")
    _link(tmp_path / "a" / "two", "../store/dog")
    with open_source(str(tmp_path / "a")) as source:
        assert len(source.records) == 6


def test_very_deep_folders_are_one_line(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a/" * 5000 + "cat/1.png": b"", "dog/1.png": b""})
    with open_source(str(path)) as source:
        assert len(source.records) == 2


def _claim(path: Path, size: int) -> None:
    """Let every member of a .zip claim a size."""
    content = bytearray(path.read_bytes())
    for found in re.finditer(rb"PK\x01\x02", bytes(content)):
        content[found.start() + 24 : found.start() + 28] = struct.pack("<I", size)
    path.write_bytes(content)


def test_an_archive_that_claims_to_be_huge_in_all_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", PICTURES)
    _claim(path, MAX_FILE_BYTES)
    with pytest.raises(DataError, match=r"claims 1\.5 GiB of files .* decompression bomb"):
        _list(path)


@pytest.mark.parametrize(
    ("attributes", "flags", "told"),
    [
        (0o120777, 0, "is a link, expected files only"),
        (0o010644, 0, "is a fifo"),
        (0, 1, "is encrypted: unpack"),
    ],
)
def test_members_that_are_no_plain_files_are_refused(
    tmp_path: Path, attributes: int, flags: int, told: str
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("cat/1.png")
        member.external_attr = attributes << 16
        archive.writestr(member, b"/etc/passwd")
        archive.writestr("dog/1.png", encoded())
        member.flag_bits |= flags
    with pytest.raises(DataError, match=told):
        _list(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_flipped_bytes_of_an_archive_are_told_or_do_not_matter(tmp_path: Path, method: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in PICTURES.items():
            archive.writestr(name, content)
    told, read = _told_or_harmless(path)
    assert told
    assert told + read == min(NUM_FLIPS, path.stat().st_size)


def test_flipped_bytes_of_a_parquet_file_are_told_or_do_not_matter(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 0, 1], names=["cat", "dog"])
    told, read = _told_or_harmless(path)
    assert told
    assert told + read == min(NUM_FLIPS, path.stat().st_size)


def _told_or_harmless(path: Path) -> tuple[int, int]:
    """How many flipped bytes give one of our errors, and how many pictures; others raise."""
    whole, numbers = path.read_bytes(), np.random.default_rng(0)
    told = read = 0
    for at in numbers.choice(len(whole), min(NUM_FLIPS, len(whole)), replace=False):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(numbers.integers(8))
        path.write_bytes(flipped)
        try:
            with open_source(str(path)) as source:
                for position in range(len(source.records)):
                    decoding.decode(source.read(position), 8)
        except VitcutError:
            told += 1
        else:
            read += 1
    return told, read


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are only bytes")
def test_paths_that_are_not_utf8_are_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    """In a process whose output refuses what it cannot encode, as most terminals do."""
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_folder(source, {name: encoded(i) for i, name in enumerate(PICTURES)})
    out, environment = (
        os.fsencode(tmp_path) + b"/r\xe9n",
        {**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )

    def run(*words: bytes) -> subprocess.CompletedProcess:
        code = "from vitcut.__main__ import entry; entry()"
        words = (sys.executable.encode(), b"-c", code.encode(), *words)
        return subprocess.run(words, capture_output=True, env=environment, check=False)

    done = run(b"prepare", b"--source", os.fsencode(source), b"--image-size", b"8")
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9" in done.stdout
    for words in ([b"train", b"--source", b"drawn", b"--out", out], [b"info", out]):
        refused = run(*words)
        assert refused.returncode == 2
        assert re.search(
            rb"^vitcut: error: .* must be a path in UTF-8.*rename it\n$", refused.stderr
        )


def test_a_source_of_bad_pictures_leaves_nothing_and_says_so_in_one_line(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_folder(tmp_path / "a", PICTURES | {"cat/9.png": b"text"})
    assert cli.main(["prepare", "--source", str(path), "--image-size", "8"]) == 2
    assert capsys.readouterr().err.count("vitcut: error:") == 1
    assert list((cache / "data").iterdir()) == []
