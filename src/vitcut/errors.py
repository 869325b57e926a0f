"""Every error that vitcut raises on purpose; what a bug raises is left to Python.

A message says what was got, what was expected and what to do. The command line prints it as one
line and exits with code 2.
"""


class VitcutError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(VitcutError):
    """A setting is out of range, unknown, or contradicts another."""


class DataError(VitcutError):
    """An archive, folder or image cannot be used."""


class TaskError(VitcutError):
    """A label file is malformed, or does not fit the data."""


class ModelError(VitcutError):
    """A model cannot be loaded, or holds values that cannot be computed with."""


class UnsupportedModelError(ModelError):
    """A model has a feature that vitcut does not understand; it is named."""


class CircuitError(VitcutError):
    """A circuit does not fit the graph, the model or the request."""


class ArtefactError(VitcutError):
    """A file written by vitcut is missing, damaged, of a newer version or of another run."""


class ExactnessError(VitcutError):
    """Two computations that must agree do not; nothing was written."""
