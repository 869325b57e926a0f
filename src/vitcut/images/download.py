"""What comes over the network: Tiny ImageNet's archive, and parquet files of Hugging Face datasets.

Both stay in a cache and are fetched once.
"""

import hashlib
import http.client
import urllib.request
from pathlib import Path

from vitcut.errors import DataError
from vitcut.progress import Meter, say
from vitcut.store import atomic_path, cache_dir

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

_TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60


def fetch_tiny_imagenet() -> Path:
    """The archive in the cache, downloaded (237 MiB) where it is not there yet.

    Raises:
        DataError: There is no network, or what came is not the known file.
    """
    path = cache_dir() / "downloads" / "tiny-imagenet-200.zip"
    if not path.exists():
        say(f"downloading {TINY_IMAGENET_URL} (ImageNet's terms apply: non-commercial research)")
        fetch(TINY_IMAGENET_URL, path, md5=_TINY_IMAGENET_MD5)
    return path


def fetch(url: str, path: Path, *, md5: str) -> None:
    """Download a file whose MD5 is known; nothing is left at ``path`` where that fails.

    Raises:
        DataError: There is no network, or what came is not the known file.
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
            _check_digest(url, digest.hexdigest(), md5)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot download {url} ({error}): give --source a .zip, folder, .parquet file or "
            "'drawn', or try again with network"
        ) from None


def fetch_parquet_files(dataset: str) -> tuple[Path, list[Path]]:
    """The parquet files of a Hugging Face dataset, from its main branch or the converted one.

    Args:
        dataset: An id, "org/name".

    Returns:
        The folder that holds them, and the files, sorted.

    Raises:
        DataError: The Hub does not answer, has no such dataset, or only other kinds of files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        for revision in ("main", "refs/convert/parquet"):
            folder = Path(
                snapshot_download(
                    dataset,
                    repo_type="dataset",
                    revision=revision,
                    allow_patterns="*.parquet",
                )
            )
            if files := sorted(folder.rglob("*.parquet")):
                return folder, files
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"source {dataset!r} is no file or folder here, and as a Hugging Face dataset it "
            f"cannot be downloaded: {reason}"
        ) from None
    raise DataError(f"dataset {dataset!r} holds no .parquet files: expected images in parquet")


def _check_digest(url: str, got: str, expected: str) -> None:
    if got != expected:
        raise DataError(f"{url} gave a file of MD5 {got}, expected {expected}: download it again")
