"""One view of the files in a folder or a .zip: names, bytes and a fingerprint of the content."""

import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from vitcut.errors import DataError, one_line
from vitcut.progress import say, track
from vitcut.runs import CONFIG_FILE, is_run
from vitcut.store import cache_dir, sha256_json

MAX_FILE_BYTES = 1 << 28
"""No real image or list of images is larger; an archive that claims more is a zip bomb."""
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 200
"""An archive that claims more than this in all, and that many times its own size, is one too."""
_CHUNK_BYTES = 1 << 20

_LEFTOVERS = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@recycle",
    "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__",
}  # fmt: skip
"""What systems and programs leave among files, beside names that begin with "."; in any case."""

_OTHER_KINDS = {
    stat.S_IFLNK: "a link", stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip

_ESCAPED = re.compile(r"\\x[89a-f][0-9a-f]")

# zipfile raises RuntimeError for encrypted members, NotImplementedError for unknown compression.
_READ_ERRORS = (
    OSError, EOFError, ValueError, OverflowError, RuntimeError, NotImplementedError, struct.error,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


class FileTree:
    r"""The files of a folder, or of a .zip that is never unpacked; threads may share it.

    What systems and programs leave behind is hidden, and so are vitcut's own run directories and
    cache inside a folder. The bytes of names that are not UTF-8 are written as ``\xNN``.
    """

    location: str
    """Path of the folder or archive, for messages."""
    names: tuple[str, ...]
    """Sorted names, with "/" between folders."""

    def __init__(
        self, location: str, files: dict[str, str], archive: zipfile.ZipFile | None = None
    ) -> None:
        self.location = location
        self.names = tuple(sorted(files))
        self._files, self._archive = files, archive

    def below(self, folder: str) -> "FileTree":
        """The files whose names begin with ``folder``, which ends in "/"; named without it."""
        chosen = {
            name.removeprefix(folder): place
            for name, place in self._files.items()
            if name.startswith(folder)
        }
        return FileTree(self.location, chosen, self._archive)

    def fingerprint(self, names: Iterable[str]) -> str:
        """Hex hash of names, sizes and CRC-32s of files: equal for a .zip and its unpacked folder.

        A folder is read in full for it. Sizes alone would miss edits, and modification times
        differ between machines that hold the same files.
        """
        chosen = sorted(names)
        found: list[tuple[str, int, int]] = []
        if self._archive is not None:
            for name in chosen:
                member = self._archive.getinfo(self._files[name])
                found.append((name, member.file_size, member.CRC))
        else:
            for name in track(chosen, "Fingerprint", len(chosen), unit="files"):
                size, checksum = 0, 0
                with self.open(name) as stream:
                    while chunk := stream.read(_CHUNK_BYTES):
                        size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
                found.append((name, size, checksum))
        return sha256_json(found)

    @contextmanager
    def open(self, name: str) -> Generator[IO[bytes]]:
        """Open one file for reading.

        Raises:
            DataError: The file is damaged, encrypted or too large; also while it is being read.
        """
        place = self._files[name]
        try:
            if self._archive is not None:
                with self._archive.open(place) as member:
                    yield member
                return
            with Path(place).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise DataError(f"{name} has {size} bytes, expected at most {MAX_FILE_BYTES}")
                yield stream
        except _READ_ERRORS as error:
            problem = f"cannot read {name} in {self.location}: {one_line(error)}"
            raise DataError(problem) from None

    def read_text(self, name: str) -> str:
        """Read one UTF-8 text file."""
        try:
            with self.open(name) as stream:
                content = stream.read()
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} in {self.location} is not UTF-8 text: {error}") from None


@contextmanager
def open_tree(path: Path) -> Generator[FileTree]:
    """Open a folder or a .zip archive.

    Raises:
        DataError: It does not exist, is not an archive, is truncated, or is unsafe to read.
    """
    if path.is_dir():
        try:
            found = list(_walk(path))
        except OSError as error:
            raise DataError(f"cannot list {path}: {error}") from None
        yield FileTree(str(path), _by_name(found, str(path)))
        return
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"no file or folder at {path}: expected a .zip or a folder") from None
    except _READ_ERRORS as error:
        message = f"{path} is not a complete .zip archive ({error}): get the file again"
        raise DataError(message) from None
    with archive:
        total, own = sum(item.file_size for item in archive.infolist()), path.stat().st_size
        if total > max(_BOMB_BYTES, _BOMB_RATIO * own):
            raise DataError(
                f"{path} claims {total / 2**30:.1f} GiB of files in an archive of {own:,} bytes: "
                "this looks like a decompression bomb"
            )
        members = [(_member_name(item, str(path)), item) for item in archive.infolist()]
        found = [
            (name, item.filename)
            for name, item in members
            if not any(is_leftover(part) for part in name.split("/"))
            # Windows marks folders by a backslash, which zipfile does not take for one.
            and not item.filename.endswith(("/", "\\"))
        ]
        yield FileTree(str(path), _by_name(found, str(path)), archive)


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Name and path of each file below a folder; links are followed."""
    own_cache = cache_dir().resolve()
    waiting: list[tuple[Path, str, frozenset[tuple[int, int]]]] = [(root, "", frozenset())]
    while waiting:
        folder, prefix, above = waiting.pop()
        status = folder.stat()
        place = status.st_dev, status.st_ino
        if place in above:
            raise DataError(f"{folder} is a link to a folder that holds it: remove the link")
        with os.scandir(folder) as entries:
            kept = [entry for entry in entries if not is_leftover(entry.name)]
        for entry in kept:
            name = prefix + _shown(os.fsencode(entry.name))
            inner = Path(entry.path)
            if entry.is_dir():
                own = (inner / CONFIG_FILE).is_file() and is_run(inner)
                if not own and inner.resolve() != own_cache:
                    waiting.append((inner, f"{name}/", above | {place}))
            elif entry.is_file():
                yield name, entry.path
            else:
                kind = "a link to nothing"
                if inner.exists():
                    kind = _OTHER_KINDS.get(stat.S_IFMT(inner.stat().st_mode), "no file")
                raise DataError(f"{name!r} in {root} is {kind}, expected files only: remove it")


def _member_name(member: zipfile.ZipInfo, location: str) -> str:
    """The name of an archive's member as shown; hostile members are refused.

    Some programs on Windows write backslashes between folders; some on macOS write UTF-8 without
    saying so.
    """
    name = member.filename.replace("\\", "/")
    if not member.flag_bits & 0x800:
        with suppress(UnicodeEncodeError):  # of a name that zipfile found in another field
            name = _shown(name.encode("cp437"))
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
        raise DataError(
            f"{location} has a member that points outside the archive, {member.filename!r}: "
            "expected relative names, do not use this file"
        )
    if member.file_size > MAX_FILE_BYTES:
        raise DataError(
            f"{location}: member {name!r} claims {member.file_size} bytes, expected at most "
            f"{MAX_FILE_BYTES}: this looks like a decompression bomb"
        )
    kind = _OTHER_KINDS.get(stat.S_IFMT(member.external_attr >> 16))
    if kind is not None:
        raise DataError(f"{location}: member {name!r} is {kind}, expected files only: zip it again")
    if member.flag_bits & 0x1:
        raise DataError(f"{location} is encrypted: unpack it, and give the folder")
    return path.as_posix()


def _by_name(files: list[tuple[str, str]], location: str) -> dict[str, str]:
    """Where each file is, by its name as shown."""
    found: dict[str, str] = {}
    for name, place in files:
        if name in found:
            raise DataError(
                f"{location} has the file {name!r} twice, and only one of them would be read: "
                "remove one"
            )
        found[name] = place
    odd = [name for name in found if _ESCAPED.search(name)]
    if odd:
        say(
            f"data: {len(odd)} of {len(found)} file names are not UTF-8; their bytes are written "
            f"as \\xNN, first {odd[0]!r}"
        )
    return found


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def is_leftover(part: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system or program."""
    return part.startswith(".") or part.lower() in _LEFTOVERS
