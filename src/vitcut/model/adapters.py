"""Which adapter reads which model: those of the libraries, and those that users register.

How a library's model is read is left to a file of its own, imported when such a model comes.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn, TypeVar

from torch import nn

from vitcut.errors import ConfigError, UnsupportedModelError
from vitcut.model.weights import ViTWeights, map_tensors
from vitcut.shapes import Float, Tensor

M = TypeVar("M", bound=nn.Module)

_LIBRARIES: dict[str, tuple[str, str]] = {
    "timm": ("vitcut.model.timm_models", "read_timm"),
    "torchvision": ("vitcut.model.torchvision_models", "read_torchvision"),
    "transformers": ("vitcut.model.transformers_models", "read_transformers"),
}
"""By the package that a model's class comes from: the file of its adapter, and the function."""

_REMEDY = (
    "expected a ViT of timm, torchvision or transformers, or a class that an adapter was "
    "registered for with vitcut.register_adapter"
)
_registered: dict[type[nn.Module], Callable[[Any], ViTWeights]] = {}


class LogitsOnly(nn.Module):
    """A Hugging Face classifier as a module from pixels to logits, as every stage expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "images channels y x"]) -> Tensor:
        """The logits."""
        return self.model(pixel_values=pixels, return_dict=True).logits


def register_adapter(kind: type[M], read: Callable[[M], ViTWeights]) -> None:
    """Teach vitcut to read a ViT of your own.

    On every load the logits of what ``read`` gave are compared with the module's own, on random
    images, so an adapter that is wrong is noticed.

    Args:
        kind: The class; its subclasses are not meant, since they may compute something else.
            The last adapter registered for it counts, also before those that vitcut brings.
        read: From such a module, whose ``forward`` gives logits, to its weights as
            `vitcut.model.weights` describes them, LayerScale folded in; they are copied. It leaves
            the module as it was, and raises `UnsupportedModelError` for what it does not know.

    Raises:
        ConfigError: ``kind`` is no module class, or ``read`` cannot be called.
    """
    _require_adapter(kind, read)
    _registered[kind] = read


def read_weights(model: nn.Module) -> ViTWeights:
    """Read a model with the adapter of its class; the model is not changed.

    Raises:
        UnsupportedModelError: No adapter knows the class, or it has a feature that is not
            understood.
        ConfigError: Its library is too old.
    """
    if isinstance(model, LogitsOnly):
        model = model.model
    read = _registered.get(type(model))
    if read is None:
        return _read_with_library(model)
    weights: Any = read(model)
    if not isinstance(weights, ViTWeights):
        raise UnsupportedModelError(
            f"the adapter for {type(model).__name__} gave a {type(weights).__name__}, expected "
            "vitcut.model.weights.ViTWeights"
        )
    return map_tensors(weights, lambda tensor: tensor.detach().clone())


def as_classifier(model: nn.Module) -> nn.Module:
    """The same model as a module from pixels to logits; only Hugging Face's are others."""
    return LogitsOnly(model) if _library(type(model)) == "transformers" else model


def library_of(model: nn.Module) -> str:
    """The package that a model's class comes from, also behind `as_classifier`."""
    return _library(type(model.model if isinstance(model, LogitsOnly) else model))


def adapter_of(library: str) -> Callable[[nn.Module], ViTWeights]:
    """What reads the models of a library.

    Raises:
        ConfigError: The library is not installed, or too old.
    """
    file, function = _LIBRARIES[library]
    try:
        return getattr(import_module(file), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"models of {library} cannot be read, it is missing or too old ({error}): "
            f"pip install --upgrade {library}"
        ) from None


def logits_of(model: nn.Module, pixels: Float[Tensor, "images channels y x"]) -> Tensor:
    """What a model answers.

    Raises:
        UnsupportedModelError: It is no tensor with a row per image.
    """
    answer = as_classifier(model)(pixels)
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(pixels):
        kind = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} answers with {kind}; expected a tensor of "
            "logits, of shape [images, classes]"
        )
    return answer


def _require_adapter(kind: Any, read: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"an adapter is for a subclass of torch.nn.Module, got {kind!r}")
    if not callable(read):
        raise ConfigError(
            f"the adapter for {kind.__name__} must be a function from a module to ViTWeights, "
            f"got {read!r}"
        )


def _read_with_library(model: nn.Module) -> ViTWeights:
    library = library_of(model)
    if library not in _LIBRARIES:
        _refuse(type(model))
    read = adapter_of(library)
    try:
        return read(model)
    except AttributeError as error:
        # Another version of the library calls its parts otherwise, or a part was deleted.
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} of {library}, of which a part is missing: "
            f"{error}; expected a whole model of a recent version: "
            f"pip install --upgrade {library}"
        ) from error


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _refuse(kind: type) -> NoReturn:
    name = kind.__name__
    if name in {"OptimizedModule", "DataParallel", "DistributedDataParallel"}:
        name = f"{name}, a wrapper: give the model inside it"
    for base in kind.__mro__[1:]:
        if _library(base) in _LIBRARIES:
            name = f"{name}, a subclass of {_library(base)}'s {base.__name__} that may differ"
            break
    raise UnsupportedModelError(f"not supported: {name}; {_REMEDY}")
