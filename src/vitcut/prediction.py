"""What a model says of pictures: files and folders in, groups with their probabilities out.

An .onnx file is run by ONNX Runtime, and torch is not loaded for it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vitcut.compact.info import NOTE, NOTE_VERSION, ModelInfo, preprocessing_of
from vitcut.deployment import for_use
from vitcut.errors import (
    ArtefactError,
    ConfigError,
    DataError,
    ModelError,
    one_line,
    printable,
    shortage,
)
from vitcut.extras import require_extra
from vitcut.images.archives import MAX_FILE_BYTES, is_leftover
from vitcut.images.decoding import (
    HEAD_BYTES,
    PICTURE_SUFFIXES,
    Picture,
    decode,
    picture_format,
    told_turned,
)
from vitcut.images.settings import Orientation
from vitcut.inputs import load_either
from vitcut.preprocessing import Framing
from vitcut.progress import Meter, Terminal, say
from vitcut.runtime import usable_threads
from vitcut.settings import require_at_least, require_one_of
from vitcut.store import convert, is_sealed

if TYPE_CHECKING:
    from torch import nn

    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.model.model import Model
    from vitcut.task import Task

STANDARD_INPUT = "-"

_MOST_IN_BATCH, _PIXELS_IN_BATCH = 64, 2**21
_MAX_THREADS = 8
_ERRORS_ONLY = 3


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one picture, or why it could not be read."""

    path: str
    group: str | None = None
    """The most probable group; None for a picture that could not be read."""
    probability: float | None = None
    """Of that group: the sum over its classes."""
    groups: tuple[tuple[str, float], ...] = ()
    """The most probable groups with their probabilities, best first."""
    classes: tuple[tuple[str, float], ...] = ()
    """The most probable classes likewise; empty for an .onnx file that gives groups only."""
    error: str | None = None
    """What is wrong with the file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxFile:
    """An .onnx file that vitcut wrote, loaded in ONNX Runtime."""

    path: Path
    session: Any
    """An ``onnxruntime.InferenceSession``."""
    info: ModelInfo
    with_preprocessing: bool
    """Whether it takes uint8 pictures of any size, one at a time, and gives group probabilities."""

    @classmethod
    def load(cls, path: Path) -> "OnnxFile":
        """Read an .onnx file and what its metadata says of it.

        Raises:
            ArtefactError: It is damaged, too new, or vitcut did not write it.
        """
        if not path.is_file():
            raise ArtefactError(f"no file at {path}: expected one that `vitcut export` wrote")
        if find_spec("onnxruntime") is None:
            require_extra("onnx", what="an .onnx file")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_threads()
        options.log_severity_level = _ERRORS_ONLY
        # Threads that wait for work would take the cores of those that decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        except Exception as error:
            # ONNX Runtime has a class per kind of failure and no common one.
            if shortage(error) is not None or isinstance(error, OSError):
                raise
            raise ArtefactError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {one_line(error)}; "
                "export the model again"
            ) from None
        again = "give a file that `vitcut export` wrote"
        try:
            noted = json.loads(session.get_modelmeta().custom_metadata_map[NOTE])
            version = noted["format_version"]
            stored = {item.name: noted[item.name] for item in fields(ModelInfo)}
        except KeyError as error:
            raise ArtefactError(
                f"{path} does not say which classes and preprocessing it has (no {error} in its "
                f"metadata): {again}"
            ) from None
        except (ValueError, TypeError) as error:
            raise ArtefactError(
                f"{path} has damaged metadata: {one_line(error)}; {again}"
            ) from None
        if version != NOTE_VERSION:
            raise ArtefactError(
                f"{path} has metadata of version {version!r}, expected {NOTE_VERSION}: upgrade "
                "vitcut, or export the model again"
            )
        # Files of earlier versions hold no hash.
        if "sha256" in noted and not is_sealed(path, str(noted["sha256"])):
            raise ArtefactError(
                f"{path} was altered: its hash is not the one that it was written with; export the "
                "model again"
            )
        info = convert(stored, ModelInfo, what=f"{path} has damaged metadata", remedy=again)
        whole = bool(noted.get("with_preprocessing"))
        outputs = session.get_outputs()[0].shape[-1]
        info = info if whole else info.complete(int(outputs))
        classes, groups = len(info.class_names), len(info.group_names)
        if (
            info.preprocessing is None
            or len(info.group_of_class) != classes
            or not set(info.group_of_class) <= set(range(groups))
            or outputs != (groups if whole else classes)
        ):
            raise ArtefactError(
                f"{path} does not fit its metadata: {classes} classes in {groups} groups for "
                f"{outputs} outputs, or no preprocessing; {again}"
            )
        return cls(path=path, session=session, info=info, with_preprocessing=whole)

    @property
    def batch(self) -> int | None:
        """Images per call, if the file fixes them."""
        size = self.session.get_inputs()[0].shape[0]
        return size if isinstance(size, int) else None

    def run(self, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Logits of images, or group probabilities of one whole picture.

        Args:
            pictures: Shape [images, height, width, channels].
        """
        [given], values = self.session.get_inputs(), pictures
        if not self.with_preprocessing:
            preprocessing = preprocessing_of(self.info)
            mean, std = (
                np.array(numbers, np.float32) for numbers in (preprocessing.mean, preprocessing.std)
            )
            scaled = (pictures.astype(np.float32) / np.float32(255) - mean) / std
            dtype = np.float16 if given.type == "tensor(float16)" else np.float32
            values = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype)
            if self.batch is not None and len(values) < self.batch:
                # The last images are fewer than the file takes.
                rest = np.zeros((self.batch - len(values), *values.shape[1:]), dtype)
                values = np.concatenate([values, rest])
        [answer] = self.session.run(None, {given.name: values})
        return answer[: len(pictures)].astype(np.float64)


def load_any(
    model: "str | Path | nn.Module", *, point: str | None = None, device: str = "cpu", **dense: Any
) -> "Model | Cut | OnnxFile":
    """Load a model that answers pictures, whatever it is.

    Args:
        model: An .onnx file that `vitcut export` wrote; the run directory of a cut, its model
            directory, or its id on the Hugging Face hub (org/name); or a dense model: "animals"
            (the shipped one), another run directory, a timm or transformers folder, "timm:NAME",
            "hf-hub:REPOSITORY", or a weights file (.safetensors, .pth).
        point: Which cut to take, if the run directory has several; "dense" takes its dense model.
        device: Where the model computes: cpu, cuda, cuda:N, or auto (cuda if there is one).
        **dense: The other arguments of `load_model`, for a dense model.

    Raises:
        ConfigError: An argument is for another kind of model.
        ArtefactError: The file or directory is damaged, or vitcut did not write it.
        ModelError: As for `load_model`.
    """
    if isinstance(model, (str, Path)) and Path(model).suffix.lower() == ".onnx":
        given = {"point": point, **dense, "device": None if device in {"cpu", "auto"} else device}
        for name, value in given.items():
            if value is not None and value is not False:
                raise ConfigError(
                    f"{name.replace('_', '-')} is not for an .onnx file, got it with {model}: "
                    "leave it out"
                )
        return OnnxFile.load(Path(model))
    return load_either(model, point=point, device=device, **dense)


def predict(
    model: "str | Path | Model | CompactViT | Cut | OnnxFile",
    pictures: "str | Path | Sequence[str | Path]",
    *,
    task: "str | Path | Task | None" = None,
    best: int = 3,
    orientation: Literal["auto", "apply", "ignore"] = "auto",
) -> Iterator[Prediction]:
    """Tell the most probable group and class of pictures.

    A file that cannot be read does not stop the others: it is reported on standard error, and the
    exit code is 2 at the end.

    Args:
        model: From `load_model`, `cut` or ``CompactViT.from_pretrained``; or what these load, or an
            .onnx file that `vitcut export` wrote, which is run without torch.
        pictures: Picture files; folders, which are searched with their subfolders for files that
            are pictures by their name or content; or "-", to read the names of files and folders
            from standard input, with a line break or a zero byte after each.
        task: A shipped task or a label file, for a dense model. By default its run directory's; or
            else every class is its own group.
        best: How many groups and classes to give.
        orientation: Whether to turn pictures as their EXIF entry says: apply, ignore, or auto (what
            the model was made with).

    Returns:
        One answer per picture, in order; pictures are read as they are asked for.

    Raises:
        ConfigError: The task is for a model that has groups of its own.
        TaskError: The model lacks classes of the task.
        DataError: No pictures are named.
        ModelError: The model gives NaN (once it does).
    """
    require_at_least("best", best, 1)
    require_one_of("orientation", orientation, get_args(Orientation))
    loaded = load_any(model) if isinstance(model, (str, Path)) else model
    named = [pictures] if isinstance(pictures, (str, Path)) else list(pictures)
    files = list(_files(named))
    if not files:
        raise DataError("no pictures are named: expected picture files or folders")
    if isinstance(loaded, OnnxFile):
        if task is not None:
            raise ConfigError(
                f"task is for a dense model, got it with {loaded.path}, which has groups of its "
                "own: leave it out"
            )
        return _predicted(files, loaded.run, loaded.info, loaded, best, orientation)
    import torch

    from vitcut.images.load import normalise

    module, info = for_use(loaded, task)
    preprocessing = preprocessing_of(info)
    like = next(module.parameters())

    def run(squares: NDArray[np.uint8]) -> NDArray[np.float64]:
        images = normalise(squares, preprocessing, dtype=like.dtype, device=like.device)
        with torch.inference_mode():
            return module(images).to("cpu", torch.float64).numpy()

    return _predicted(files, run, info, None, best, orientation)


def show_predictions(predictions: Iterable[Prediction]) -> None:
    """Print a table on a terminal; elsewhere a line per picture, with tabs between its parts.

    The parts are the path, the best group, its probability, the best class and its probability.

    Raises:
        DataError: Pictures could not be read.
    """
    if sys.stdout.isatty():
        table = Table("picture", "groups", "class", box=SIMPLE_HEAD, pad_edge=False)
        for item in _readable(predictions):
            groups, classes = (
                ", ".join(f"{name} {probability:.1%}" for name, probability in pairs)
                for pairs in (item.groups, item.classes[:1])
            )
            table.add_row(item.path, groups, classes)
        Terminal().print(table)
        return
    for item in _readable(predictions):
        best = (*item.groups[:1], *item.classes[:1])
        words = [item.path, *(word for name, p in best for word in (name, f"{p:.4f}"))]
        sys.stdout.write("\t".join(printable(word) for word in words) + "\n")


def show_predictions_as_json(predictions: Iterable[Prediction]) -> None:
    """Print one JSON object a line for each picture, those that could not be read included.

    Raises:
        DataError: Pictures could not be read.
    """

    def told() -> Iterator[Prediction]:
        for item in predictions:
            sys.stdout.write(f"{json.dumps(asdict(item))}\n")
            yield item

    for _ in _readable(told()):
        pass


def _readable(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Those of pictures that could be read; the others are reported, and refused at the end."""
    good, bad = 0, 0
    for item in predictions:
        if item.error is None:
            good += 1
            yield item
        else:
            bad += 1
            say(f"{item.path}: {item.error}")
    if bad:
        raise DataError(f"{bad} of {good + bad} pictures could not be read: they are listed above")


def _predicted(
    files: Sequence[tuple[str, str | None]],
    run: Callable[[NDArray[np.uint8]], NDArray[np.float64]],
    info: ModelInfo,
    onnx: OnnxFile | None,
    best: int,
    orientation: Orientation,
) -> Iterator[Prediction]:
    """Answer batch by batch; while the model computes, threads read the batch after it."""
    preprocessing, num_turned = preprocessing_of(info), 0
    framing = preprocessing.framing
    if orientation != "auto":
        framing = replace(framing, orientation=orientation)
    whole = onnx is not None and onnx.with_preprocessing
    batch = max(1, min(_MOST_IN_BATCH, _PIXELS_IN_BATCH // preprocessing.image_size**2))
    batch = 1 if whole else (onnx and onnx.batch) or batch
    size = None if whole else preprocessing.image_size
    framing = replace(framing, channels=3) if whole else framing
    # [classes groups]
    members = np.eye(len(info.group_names))[list(info.group_of_class)]

    def answers(read: Sequence[tuple[str, Picture | str]]) -> Iterator[Prediction]:
        good = [value.pixels for _, value in read if not isinstance(value, str)]
        given = iter(run(np.stack(good)) if good else ())
        for path, value in read:
            if isinstance(value, str):
                yield Prediction(path=path, error=value)
                continue
            row = next(given)
            if not np.isfinite(row).all():
                raise ModelError(f"the model gave NaN or infinity for {path}: check its weights")
            classes = None if whole else np.exp(row - row.max())
            groups = row if classes is None else classes @ members / classes.sum()
            top = _best(info.group_names, groups, best)
            yield Prediction(
                path=path,
                group=top[0][0],
                probability=top[0][1],
                groups=top,
                classes=()
                if classes is None
                else _best(info.class_names, classes / classes.sum(), best),
            )

    with (
        ThreadPoolExecutor(min(usable_threads(), _MAX_THREADS)) as pool,
        Meter("predicting", len(files), unit="pictures") as meter,
    ):
        waiting: list[Any] = []
        for start in range(0, len(files) + batch, batch):
            coming = [
                (path, error or pool.submit(_read, path, size, framing))
                for path, error in files[start : start + batch]
            ]
            read = [(path, v if isinstance(v, str) else v.result()) for path, v in waiting]
            num_turned += sum(v.orientation != 1 for _, v in read if not isinstance(v, str))
            for answer in answers(read):
                meter.advance()
                yield answer
            waiting = coming
    if num_turned:
        say(told_turned(num_turned, len(files), framing))


def _best(
    names: tuple[str, ...], probabilities: NDArray[np.float64], best: int
) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-probabilities, kind="stable")[:best]
    return tuple((names[int(at)], float(probabilities[at])) for at in order)


def _read(path: str, image_size: int | None, framing: Framing) -> Picture | str:
    """The decoded picture in a file, or what is wrong with it."""
    try:
        with Path(path).open("rb") as stream:
            # What is no picture is not read whole.
            content = stream.read(HEAD_BYTES)
            if picture_format(content) is None:
                return "not an image of a known format" if content else "the file is empty"
            content += stream.read(MAX_FILE_BYTES)
        if len(content) > MAX_FILE_BYTES:
            return f"more than {MAX_FILE_BYTES} bytes"
        return decode(content, image_size, framing)
    except OSError as error:
        if shortage(error) is not None:
            raise
        return error.strerror or one_line(error)
    except (DataError, ValueError) as error:
        # ValueError: a zero byte in the name.
        return one_line(error)


def _files(named: Iterable[str | Path]) -> Iterator[tuple[str, str | None]]:
    """Every file that is named or lies in a folder that is; for some, what is wrong with it."""
    for item in named:
        if item == STANDARD_INPUT:
            content = sys.stdin.buffer.read()
            ends = b"\0" if b"\0" in content else b"\n"
            words = [os.fsdecode(word.rstrip(b"\r")) for word in content.split(ends) if word]
            yield from _files(f"./{STANDARD_INPUT}" if w == STANDARD_INPUT else w for w in words)
        elif not Path(item).is_dir():
            yield str(item), None
        else:
            found = list(_files_in(str(item)))
            yield from found or [(str(item), "no pictures in this folder")]


def _files_in(root: str) -> Iterator[tuple[str, str | None]]:
    """The pictures below a folder, sorted; links to folders are not followed."""
    failed: list[OSError] = []
    for folder, inner, names in os.walk(root, onerror=failed.append):
        inner[:] = sorted(name for name in inner if not is_leftover(name))
        for name in sorted(name for name in names if not is_leftover(name)):
            path = Path(folder, name)
            known = name.lower().endswith(PICTURE_SUFFIXES)
            try:
                if not path.is_file():
                    # A fifo would be waited for. What is no picture by name is not missed.
                    if known:
                        yield str(path), "not a file, or a link to nothing"
                    continue
                if not known:
                    with path.open("rb") as stream:
                        known = picture_format(stream.read(HEAD_BYTES)) is not None
            except OSError as error:
                yield str(path), error.strerror or one_line(error)
                continue
            if known:
                yield str(path), None
    for error in failed:
        yield str(error.filename), error.strerror or one_line(error)
