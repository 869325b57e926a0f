"""The errors that vitcut raises on purpose.

A message says in one line what was wrong, what was expected and what to do. The command line prints
it and exits with code 2.
"""


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


def one_line(error: BaseException) -> str:
    """The message of any error in one line, as ours are."""
    return " ".join(str(error).split())
