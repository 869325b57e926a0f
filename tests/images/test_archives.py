"""Folders and .zip archives seen alike, and hostile archives refused."""

import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
from data_samples import write_folder, write_zip
from hypothesis import given
from hypothesis import strategies as st

from vitcut.errors import DataError
from vitcut.images.archives import MAX_FILE_BYTES, FileTree, open_tree

NAMES = st.from_regex(r"[a-c]{1,2}/[a-c]{1,2}\.png", fullmatch=True)


def _read(tree: FileTree, name: str) -> bytes:
    with tree.open(name) as stream:
        return stream.read()


@given(files=st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=6))
def test_a_zip_and_its_unpacked_folder_are_the_same_tree(files: dict[str, bytes]) -> None:
    files = files | {"words.txt": b""}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        backwards = dict(reversed(files.items()))
        packed = write_zip(root / "a.zip", backwards)
        folder = write_folder(root / "folder", files)
        with open_tree(packed) as first, open_tree(folder) as second:
            assert first.names == second.names
            assert first.fingerprint(first.names) == second.fingerprint(second.names)
            assert all(_read(first, file) == _read(second, file) for file in first.names)


def test_an_edit_that_keeps_the_size_changes_the_fingerprint(tmp_path: Path) -> None:
    with open_tree(write_folder(tmp_path / "a", {"x/y.png": b"one", "z.txt": b""})) as tree:
        before = tree.fingerprint(tree.names)
    with open_tree(write_folder(tmp_path / "a", {"x/y.png": b"two"})) as tree:
        assert tree.fingerprint(tree.names) != before


def test_what_finder_and_explorer_leave_is_not_seen(tmp_path: Path) -> None:
    junk = {
        "__MACOSX/list.txt": b"",
        "top/a/._b.png": b"",
        "top/.DS_Store": b"",
        "top/a/Thumbs.db": b"",
    }
    with open_tree(write_zip(tmp_path / "a.zip", {"top/a/b.png": b"1", **junk})) as tree:
        assert tree.names == ("top/a/b.png",)


@pytest.mark.parametrize(
    "name", ["../evil.png", "/etc/evil", "a/../../evil", "C:/evil", "..\\evil"]
)
def test_members_that_point_out_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "a.zip", {name: b"1"})
    with pytest.raises(DataError, match="points outside the archive"), open_tree(path):
        pass


def test_a_member_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a/b.png": b"1"})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", MAX_FILE_BYTES + 1)
    path.write_bytes(content)
    with pytest.raises(DataError, match="decompression bomb"), open_tree(path):
        pass


def test_a_missing_or_broken_archive_is_one_clear_error(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "whole.zip", {"a/b.png": b"1" * 100})
    truncated = tmp_path / "truncated.zip"
    truncated.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(DataError, match=r"not a complete \.zip"), open_tree(truncated):
        pass
    with pytest.raises(DataError, match="no file or folder"), open_tree(tmp_path / "none.zip"):
        pass


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.png", b"healthy content")
    path.write_bytes(path.read_bytes().replace(b"healthy", b"damaged"))
    with (
        open_tree(path) as tree,
        pytest.raises(DataError, match=r"cannot read a/b\.png .*CRC"),
    ):
        _read(tree, "a/b.png")
