"""Open what the user gave as ``--source``, downloading it first where necessary."""

import hashlib
import http.client
import re
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vitcut.errors import DataError, one_line
from vitcut.hub import hub_access
from vitcut.images.archives import open_tree
from vitcut.images.readers import (
    ImageSource,
    holds_images,
    named_pictures,
    read_parquet,
    read_tree,
)
from vitcut.progress import Meter, say
from vitcut.store import atomic_path, cache_dir

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

_TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_PARQUET_BEGINS = b"PAR1"
_OTHER_ARCHIVES = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar",
    b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip


@contextmanager
def open_source(
    source: str | None, *, image_column: str | None = None, label_column: str | None = None
) -> Generator[ImageSource]:
    """Open an archive, a folder, parquet files or a dataset for reading.

    Args:
        source: As in `DataSettings`, except "drawn".
        image_column: The column of pictures in parquet files; None finds it.
        label_column: The column of classes in parquet files; None finds it.

    Raises:
        DataError: It does not exist, or cannot be read as one of these.
    """
    chosen = {"image_column": image_column, "label_column": label_column}
    path = fetch_tiny_imagenet() if source is None else Path(source).expanduser()
    if not path.exists():
        name = str(source)
        if not _DATASET_ID.fullmatch(name) or path.suffix in {".zip", ".parquet"}:
            raise DataError(
                f"source {name!r} does not exist: expected a .zip, a folder, a .parquet file, a "
                "Hugging Face dataset id (org/name) or 'drawn'"
            )
        root, files = fetch_parquet_files(name)
        yield read_parquet(files, root=root, location=name, **chosen)
        return
    head = b""
    if path.is_file():
        with path.open("rb") as stream:
            head = stream.read(512)
    if path.suffix.lower() == ".parquet" or head.startswith(_PARQUET_BEGINS):
        yield read_parquet([path], root=path.parent, location=str(path), **chosen)
        return
    others = [kind for begins, kind in _OTHER_ARCHIVES.items() if head.startswith(begins)]
    if others or head[257:262] == b"ustar":
        raise DataError(
            f"{path} is a {others[0] if others else 'tar'} archive, expected a .zip: unpack it, "
            "and give the folder"
        )
    with open_tree(path) as tree:
        tables = [name for name in tree.names if name.lower().endswith(".parquet")]
        tables = tables if path.is_dir() else []
        if tables and (pictures := named_pictures(tree)):
            # A table beside pictures may only describe them.
            tables = [name for name in tables if holds_images(path / name)]
            folders = sorted({name.rpartition("/")[0] for name in pictures})
            if tables and len(folders) > 1:
                raise DataError(
                    f"{path} has both class folders ({', '.join(folders[:3])}) and parquet files "
                    f"with images ({tables[0]}): give one of them as --source, or move one away"
                )
            if tables:
                say(
                    f"data: left out {len(pictures)} of {len(tree.names)} files, which are "
                    f"pictures beside parquet files, first {pictures[0]!r}"
                )
        if tables:
            files = [path / name for name in tables]
            yield read_parquet(files, root=path, location=str(path), **chosen)
        else:
            for column, name in chosen.items():
                if name is not None:
                    flag = column.replace("_", "-")
                    raise DataError(
                        f"{flag} is for parquet files, got it with {path}: leave it out"
                    )
            yield read_tree(tree)


def fetch_tiny_imagenet() -> Path:
    """Return the path of Tiny ImageNet's archive (237 MiB); download it if it is not in the cache.

    Raises:
        DataError: There is no network, or the file that came is not the expected one.
    """
    path = cache_dir() / "downloads" / "tiny-imagenet-200.zip"
    if not path.exists():
        say(f"downloading {TINY_IMAGENET_URL} (ImageNet's terms apply: non-commercial research)")
        fetch(TINY_IMAGENET_URL, path, md5=_TINY_IMAGENET_MD5)
    return path


def fetch(url: str, path: Path, *, md5: str) -> None:
    """Download a file with a known MD5; a failure leaves nothing at ``path``.

    Raises:
        DataError: There is no network, or the file that came is not the expected one.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply, atomic_path(path) as part:
            total = int(reply.headers.get("Content-Length", 0)) // _CHUNK_BYTES
            with part.open("wb") as stream, Meter("Download", total, unit="MiB") as meter:
                while chunk := reply.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    stream.write(chunk)
                    meter.advance()
            if digest.hexdigest() != md5:
                raise DataError(
                    f"{url} returned a file with MD5 {digest.hexdigest()}, expected {md5}: "
                    "download it again"
                )
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot download {url} ({error}): check the network and try again, or give --source a "
            ".zip, folder, .parquet file or 'drawn'"
        ) from None


def fetch_parquet_files(dataset: str) -> tuple[Path, list[Path]]:
    """Download the parquet files of a Hugging Face dataset, or find them in the Hub's cache.

    Args:
        dataset: An id, "org/name".

    Returns:
        The folder with the files, and the files, sorted.

    Raises:
        DataError: The Hub does not answer, does not know the dataset, or has no parquet files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # The Hub converts many datasets of other formats to parquet, on a branch of its own.
        for revision in ("main", "refs/convert/parquet"):
            with hub_access():
                folder = Path(
                    snapshot_download(
                        dataset, repo_type="dataset", revision=revision, allow_patterns="*.parquet"
                    )
                )
            if files := sorted(folder.rglob("*.parquet")):
                return folder, files
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise DataError(
            f"source {dataset!r} is not a file or folder here, and cannot be downloaded as a "
            f"Hugging Face dataset: {one_line(error)}"
        ) from None
    raise DataError(f"dataset {dataset!r} has no .parquet files: expected images in parquet")
