"""Which adapter reads which model: those for timm, torchvision and transformers, and users' own."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from vitcut.errors import ConfigError, UnsupportedModelError, VitcutError, one_line, shortage
from vitcut.model.weights import ViTWeights, map_tensors
from vitcut.shapes import Float, Tensor

M = TypeVar("M", bound=nn.Module)

LIBRARIES = ("timm", "torchvision", "transformers")
"""Packages whose models are read: `read_LIBRARY` in `vitcut.model.LIBRARY_models`."""
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

    On every load, the logits computed from what ``read`` returned are compared with the module's
    own on random images, so a wrong adapter is noticed.

    Args:
        kind: The class. Subclasses are not included, since they may compute something else. The
            adapter registered last is used, and takes precedence over the built-in ones.
        read: Returns the weights of such a module as `vitcut.model.weights` describes them, with
            LayerScale folded in; they are copied. The module's ``forward`` must return logits.
            It must not change the module, and raises `UnsupportedModelError` for what it does not
            understand.

    Raises:
        ConfigError: ``kind`` is not a module class, or ``read`` cannot be called.
    """
    given: Any = kind  # a caller without a type checker may pass anything
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise ConfigError(f"an adapter is for a subclass of torch.nn.Module, got {kind!r}")
    if not callable(read):
        raise ConfigError(
            f"the adapter for {kind.__name__} must be a function from a module to ViTWeights, "
            f"got {read!r}"
        )
    _registered[kind] = read


def read_weights(model: nn.Module) -> ViTWeights:
    """Read a model with the adapter of its class; the model is not changed.

    Raises:
        UnsupportedModelError: No adapter knows the class, or it has a feature that is not
            understood.
        ConfigError: The version of its library is too old.
    """
    if isinstance(model, LogitsOnly):
        model = model.model
    kind, library = type(model), library_of(model)
    if kind in _registered:
        with blamed_on_adapter(model):
            weights: Any = _registered[kind](model)
        if not isinstance(weights, ViTWeights):
            raise UnsupportedModelError(
                f"the adapter for {kind.__name__} gave a {type(weights).__name__}, expected "
                "vitcut.model.weights.ViTWeights"
            )
        return map_tensors(weights, lambda tensor: tensor.detach().clone())
    if library in LIBRARIES:
        read = adapter_of(library)
        try:
            return read(model)
        except AttributeError as error:
            # Another version of the library names its parts differently, or a part was deleted.
            raise UnsupportedModelError(
                f"not supported: {kind.__name__} of {library}, a part of which is missing: "
                f"{error}; expected a complete model of a recent version: "
                f"pip install --upgrade {library}"
            ) from error
    name = kind.__name__
    # DataParallel, torch.compile, Lightning and the like hold the ViT as an attribute.
    held = [
        (attribute, type(part).__name__)
        for attribute, part in model.named_modules()
        if part is not model and (library_of(part) in LIBRARIES or has_adapter(part))
    ]
    if held and not any(library_of_class(base) in LIBRARIES for base in kind.__mro__):
        attribute, inside = held[0]
        name = f"{name}, which holds a {inside}: give model.{attribute}, if that classifies alone"
    for base in kind.__mro__[1:]:
        origin = library_of_class(base)
        if origin in LIBRARIES:
            name = f"{name}, a subclass of {origin}'s {base.__name__} that may differ"
            break
    raise UnsupportedModelError(
        f"not supported: {name}; expected a ViT of timm, torchvision or transformers, or a class "
        "that has an adapter: register one with vitcut.register_adapter"
    )


def has_adapter(model: nn.Module) -> bool:
    """Whether a user's own adapter reads the model."""
    return type(model) in _registered


@contextmanager
def blamed_on_adapter(model: nn.Module) -> Generator[None]:
    """Say whose mistake it is if a user's adapter fails, or gives what cannot be computed with."""
    try:
        yield
    except (VitcutError, MemoryError):
        raise
    except Exception as error:
        if shortage(error) or not has_adapter(model):
            raise
        kind = type(model).__name__
        raise UnsupportedModelError(
            f"the adapter for {kind} failed, or gave weights that cannot be computed with "
            f"({type(error).__name__}: {one_line(error)}): mend the adapter"
        ) from error


def as_classifier(model: nn.Module) -> nn.Module:
    """The model as a module from pixels to logits; only Hugging Face's need to be wrapped."""
    if isinstance(model, LogitsOnly) or library_of(model) != "transformers":
        return model
    return LogitsOnly(model)


def library_of(model: nn.Module) -> str:
    """The package that a model's class comes from, also for one that `as_classifier` wrapped."""
    own = model.model if isinstance(model, LogitsOnly) else model
    return library_of_class(type(own))


def library_of_class(kind: type) -> str:
    """The package that a class comes from; what a library holds models in is none of them."""
    package, _, inside = kind.__module__.partition(".")
    return f"{package}.utils" if inside.startswith("utils") else package


def adapter_of(library: str) -> Callable[[nn.Module], ViTWeights]:
    """The function that reads models of a library.

    Raises:
        ConfigError: The library is not installed, or too old.
    """
    try:
        return getattr(import_module(f"vitcut.model.{library}_models"), f"read_{library}")
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"models of {library} cannot be read, it is missing or too old ({error}): "
            f"pip install --upgrade {library}"
        ) from None


def logits_of(model: nn.Module, pixels: Float[Tensor, "images channels y x"]) -> Tensor:
    """Run a model and check that it returns logits.

    Raises:
        UnsupportedModelError: Its output is not a tensor with one row per image.
    """
    answer = as_classifier(model)(pixels)
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(pixels):
        kind = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UnsupportedModelError(
            f"not supported: {type(model).__name__} answers with {kind}; expected a tensor of "
            "logits, of shape [images, classes]"
        )
    return answer
