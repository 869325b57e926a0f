"""A dense model and what is known of it. Where it comes from is left to `loading`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitcut.errors import ModelError
from vitcut.framing import Framing
from vitcut.labels import Labels
from vitcut.model.weights import hash_tensors

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a picture to what a model takes."""

    image_size: int
    """Height and width, in pixels."""
    mean: tuple[float, ...]
    """Subtracted per channel, on the scale 0 to 1."""
    std: tuple[float, ...]
    """Divided by per channel, on the scale 0 to 1."""
    framing: Framing


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A dense model and what is known of it."""

    model: nn.Module
    """In eval mode, on the CPU; from pixels to logits."""
    name: str
    """What was asked for."""
    class_ids: tuple[str, ...] | None
    """In the order of the logits; None where the source does not say."""
    class_names: tuple[str, ...] | None
    """In the order of the logits; None where the source does not say."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    """Height and width, in pixels."""
    weight_hash: str
    """SHA-256 over names, shapes, types and values of the weights, in hex."""
    framing: Framing | None = None
    """How its images are made from pictures; None where the source does not say."""

    @classmethod
    def of(
        cls, model: nn.Module, spec: str, taken: Preprocessing, labels: Labels | None
    ) -> "LoadedModel":
        """Put together what was found of a model; None where nobody says what its classes are.

        Raises:
            ModelError: A weight is NaN or infinite.
        """
        _refuse_not_finite(model, spec)
        return cls(
            model=model.eval(),
            name=spec,
            class_ids=labels and labels.ids,
            class_names=labels and labels.names,
            mean=taken.mean,
            std=taken.std,
            image_size=taken.image_size,
            weight_hash=weight_hash(model),
            framing=taken.framing,
        )


def weight_hash(model: nn.Module) -> str:
    """The SHA-256 over names, shapes, types and values of a model's weights, in hex."""
    return hash_tensors(model.state_dict().items())


def listed(keys: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def told_misfits(misfits: Mapping[str, Sequence[str]]) -> str:
    """How many weights do not fit, and the first few of each kind; empty where all do."""
    return "; ".join(
        f"{len(keys)} {what} ({listed(keys)})" for what, keys in misfits.items() if keys
    )


def per_channel(values: Any, channels: int, what: str) -> tuple[float, ...]:
    """One number per channel; a single one holds for all.

    Raises:
        ModelError: They are no numbers, or not as many as there are channels.
    """
    found: list[Any] = list(values) if isinstance(values, (list, tuple)) else [values]
    if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in found):
        raise ModelError(f"{what} must be numbers, got {values!r}")
    if len(found) not in {1, channels}:
        raise ModelError(
            f"{what} must be {channels} numbers, one per channel of the model, got {len(found)}"
        )
    return tuple(float(item) for item in found) * (channels if len(found) == 1 else 1)


def _refuse_not_finite(model: nn.Module, spec: str) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{spec!r} has weights that are not finite, in {name}: expected a whole, trained "
                "model"
            )
