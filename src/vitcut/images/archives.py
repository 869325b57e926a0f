"""One view of the files in a folder or a .zip: names, bytes and a fingerprint of the content."""

import os
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath

from vitcut.errors import DataError
from vitcut.progress import track
from vitcut.store import sha256_json

MAX_FILE_BYTES = 1 << 28
"""No real image or list of images is larger; an archive that claims more is a zip bomb."""

_JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")

# zipfile raises RuntimeError for encrypted members, NotImplementedError for unknown compression.
_READ_ERRORS = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError,
)  # fmt: skip


class FileTree:
    """The files of a folder, or of a .zip that is never unpacked; threads may share it.

    Files that macOS and Windows leave behind are hidden.
    """

    location: str
    """Path of the folder or archive, for messages."""
    names: tuple[str, ...]
    """Sorted names with "/" between folders, without a top folder that holds all files."""

    def __init__(self, path: Path, archive: zipfile.ZipFile | None = None) -> None:
        self.location = str(path)
        self._archive = archive
        if archive is not None:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                _refuse_hostile(member, self.location)
            found = [member.filename for member in members]
        else:
            found = [
                (Path(folder) / file).relative_to(path).as_posix()
                for folder, _, files in os.walk(path, followlinks=True)
                for file in files
            ]
        kept = [name for name in found if not _is_junk(name)]
        tops = {name.partition("/")[0] if "/" in name else "" for name in kept}
        self._top = f"{tops.pop()}/" if len(tops) == 1 and "" not in tops else ""
        self.names = tuple(sorted(name.removeprefix(self._top) for name in kept))

    @cached_property
    def fingerprint(self) -> str:
        """Hex hash of all names, sizes and CRC-32s: equal for a .zip and its unpacked folder.

        A folder is read in full for it. Sizes alone would miss edits, and modification times
        differ between machines that hold the same files.
        """
        files: list[tuple[str, int, int]] = []
        if self._archive is not None:
            for name in self.names:
                member = self._archive.getinfo(self._top + name)
                files.append((name, member.file_size, member.CRC))
        else:
            for name in track(self.names, "Fingerprint", len(self.names), unit="files"):
                content = self.read(name)
                files.append((name, len(content), zlib.crc32(content)))
        return sha256_json(files)

    def read(self, name: str) -> bytes:
        """Read one file.

        Raises:
            DataError: The file is damaged, encrypted or too large.
        """
        try:
            if self._archive is not None:
                return self._archive.read(self._top + name)
            path = Path(self.location, self._top + name)
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(f"{path} has {size} bytes, expected at most {MAX_FILE_BYTES}")
            return path.read_bytes()
        except _READ_ERRORS as error:
            raise DataError(f"cannot read {name} in {self.location}: {error}") from None

    def read_text(self, name: str) -> str:
        """Read one UTF-8 text file."""
        try:
            return self.read(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} in {self.location} is not UTF-8 text: {error}") from None


@contextmanager
def open_tree(path: Path) -> Generator[FileTree]:
    """Open a folder or a .zip archive.

    Raises:
        DataError: It does not exist, is not an archive, is truncated, or is unsafe to read.
    """
    if path.is_dir():
        yield FileTree(path)
        return
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"no file or folder at {path}: expected a .zip or a folder") from None
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        message = f"{path} is not a complete .zip archive ({error}): get the file again"
        raise DataError(message) from None
    with archive:
        yield FileTree(path, archive)


def _is_junk(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or parts[-1] in _JUNK or parts[-1].startswith("._")


def _refuse_hostile(member: zipfile.ZipInfo, location: str) -> None:
    name = member.filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
        raise DataError(
            f"{location} has a member that points outside the archive, {name!r}: expected "
            "relative names, do not use this file"
        )
    if member.file_size > MAX_FILE_BYTES:
        raise DataError(
            f"{location}: member {name!r} claims {member.file_size} bytes, expected at most "
            f"{MAX_FILE_BYTES}: this looks like a decompression bomb"
        )
