"""Files of a folder or a .zip seen alike: names, bytes and a fingerprint of the content.

What the files mean is left to `tiny_imagenet` and `folders`. A .zip is never unpacked.
"""

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath

from vitcut.errors import DataError
from vitcut.progress import track
from vitcut.store import sha256_json

MAX_FILE_BYTES = 1 << 28
"""No encoded image or list is larger; an archive that claims more is a decompression bomb."""

# zipfile says RuntimeError of encrypted members, NotImplementedError of unknown compression.
_READ_ERRORS = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError,
)  # fmt: skip
_JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")


class FileTree(ABC):
    """Files by relative name, with "/" between folders; one top folder that holds all is dropped.

    Threads may read at once.
    """

    def __init__(self, location: str, names: list[str]) -> None:
        self.location = location
        """For messages."""
        kept = [name for name in names if not _is_junk(name)]
        self._top = _common_top(kept)
        self.names = tuple(sorted(name.removeprefix(self._top) for name in kept))

    @cached_property
    def fingerprint(self) -> str:
        """Hex; of names, sizes and CRC-32s, so a .zip and the folder unpacked from it agree.

        Reading a folder's bytes is the price: sizes alone miss edits, and times of modification
        differ between machines that hold the same files.
        """
        return sha256_json([[name, *self._size_and_crc(name)] for name in self._tracked()])

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            DataError: The file is damaged, encrypted or too large.
        """
        try:
            return self._read(self._top + name)
        except _READ_ERRORS as error:
            raise DataError(f"cannot read {name} in {self.location}: {error}") from None

    def read_text(self, name: str) -> str:
        """The text of one UTF-8 file."""
        try:
            return self.read(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} in {self.location} is not UTF-8 text: {error}") from None

    @abstractmethod
    def _read(self, name: str) -> bytes: ...

    @abstractmethod
    def _size_and_crc(self, name: str) -> tuple[int, int]: ...

    def _tracked(self) -> "tuple[str, ...]":
        return self.names


class ZipTree(FileTree):
    """The files of an open .zip archive."""

    def __init__(self, location: str, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            _refuse_hostile(member, location)
        super().__init__(location, [member.filename for member in members])

    def _read(self, name: str) -> bytes:
        return self._archive.read(name)

    def _size_and_crc(self, name: str) -> tuple[int, int]:
        member = self._archive.getinfo(self._top + name)
        return member.file_size, member.CRC


class FolderTree(FileTree):
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        found = [
            (Path(folder) / file).relative_to(root).as_posix()
            for folder, _, files in os.walk(root, followlinks=True)
            for file in files
        ]
        super().__init__(str(root), found)

    def _read(self, name: str) -> bytes:
        path = self._root / name
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path} has {size} bytes: expected at most {MAX_FILE_BYTES}")
        return path.read_bytes()

    def _size_and_crc(self, name: str) -> tuple[int, int]:
        content = self.read(name)
        return len(content), zlib.crc32(content)

    def _tracked(self) -> "tuple[str, ...]":
        names = track(self.names, "Fingerprint of the folder", len(self.names), unit="files")
        return tuple(names)


@contextmanager
def open_tree(path: Path) -> Generator[FileTree]:
    """Open a folder or a .zip archive.

    Raises:
        DataError: It does not exist, is no archive, is truncated, or holds hostile members.
    """
    if path.is_dir():
        yield FolderTree(path)
        return
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"no file or folder at {path}: expected a .zip or a folder") from None
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise DataError(
            f"{path} is not a whole .zip archive ({error}): expected one, get the file again"
        ) from None
    with archive:
        yield ZipTree(str(path), archive)


def _is_junk(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or parts[-1] in _JUNK or parts[-1].startswith("._")


def _common_top(names: list[str]) -> str:
    tops = {name.partition("/")[0] if "/" in name else "" for name in names}
    return f"{tops.pop()}/" if len(tops) == 1 and "" not in tops else ""


def _refuse_hostile(member: zipfile.ZipInfo, location: str) -> None:
    name = member.filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
        raise DataError(
            f"{location} holds a member that points out of the archive, {name!r}: "
            "expected relative names, do not use this file"
        )
    if member.file_size > MAX_FILE_BYTES:
        raise DataError(
            f"{location}: member {name!r} claims {member.file_size} bytes, expected at most "
            f"{MAX_FILE_BYTES}: this looks like a decompression bomb"
        )
