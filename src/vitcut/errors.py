"""The errors that vitcut raises on purpose.

A message says in one line what was wrong, what was expected and what to do. The command line prints
it and exits with code 2.
"""

import errno
import re
import unicodedata

_OF_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|out of memory|bad_?alloc|unable to allocate", re.I
)
_OF_THREADS = re.compile(
    "can't start new thread|pthread_create|thread creation failed|resource temporarily unavailable",
    re.I,
)
"""How torch, numpy, ONNX Runtime and the system say it, in errors of any class."""
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of what steers a terminal or cannot be written: control and format
characters, lone surrogates, separators of lines and paragraphs."""
_KEPT = {"\n", "\u200c", "\u200d"}
"""Line breaks, and the joiners that Persian, Hindi and emoji are written with."""


class VitcutError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(VitcutError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(VitcutError):
    """An archive, folder or image cannot be used."""


class TaskError(VitcutError):
    """A label file is malformed or does not fit the data."""


class ModelError(VitcutError):
    """A model cannot be loaded, or its weights cannot be computed with."""


class UnsupportedModelError(ModelError):
    """A model has a feature that vitcut does not support; the message names it."""


class CircuitError(VitcutError):
    """A circuit does not fit the graph, the model or the request."""


class ArtefactError(VitcutError):
    """A file written by vitcut is missing, damaged, too new, or belongs to another run."""


class ExactnessError(VitcutError):
    """Two computations that must agree do not; nothing was written."""


def shortage(error: BaseException) -> str | None:
    """What the machine ran out of, and what to do, if that is what an error says; else None."""
    text, number = str(error), getattr(error, "errno", None)
    if isinstance(error, RecursionError):
        return "the call stack: something is nested too deeply; use input that is nested less"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _OF_MEMORY.search(text):
        return "memory: use fewer images, a smaller batch or image size, or a larger machine"
    if number == errno.EAGAIN or _OF_THREADS.search(text):
        return "threads or processes: end others, use fewer threads, or raise the limit (ulimit -u)"
    if number in {errno.EMFILE, errno.ENFILE}:
        return "open files: end other programs, or raise the limit (ulimit -n)"
    return None


def one_line(error: BaseException) -> str:
    """The message of any error in one line, as ours are."""
    return printable(" ".join(str(error).split()) or type(error).__name__)


def printable(text: str) -> str:
    """Text from outside for a terminal: whatever could steer it is written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char
        if char in _KEPT or unicodedata.category(char) not in _HIDDEN
        else char.encode("unicode_escape").decode()
        for char in text
    )


def plain_markdown(text: str) -> str:
    """Text from outside that Markdown and HTML show as it is, in one line."""
    escaped = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#>!$])", r"\\\1", escaped)
