"""Bare checkpoints: a state dict in a file, brought into the names and shapes of a timm model.

Models that bring their architecture along are left to `loading`.
"""

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vitcut.errors import ModelError
from vitcut.progress import say
from vitcut.shapes import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries that hold the weights, in the order in which they are looked for."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
_HEAD = "head.weight"
_SHOWN = 3
_READ_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
    AssertionError, SafetensorError,
)  # fmt: skip
"""What the readers raise for a damaged file."""


def load_checkpoint(path: Path, arch: str | None) -> nn.Module:
    """Build the timm model of a name and fill it from a file, whose head says how many classes.

    Args:
        path: A .safetensors, .pth, .pt or .bin file.
        arch: What `timm.create_model` calls the architecture.

    Raises:
        ModelError: The file cannot be read without running code that it brings, there is no such
            architecture, or the weights are not the architecture's.
    """
    if arch is None:
        raise ModelError(
            f"{path} holds weights only: say which timm architecture they are of, such as "
            "--arch deit_tiny_patch16_224"
        )
    weights = _stripped(_read(path), path)
    head = weights.get(_HEAD)
    if head is None:
        raise ModelError(
            f"{path} has no {_HEAD}, which says how many classes there are: expected the weights "
            f"of a timm classifier, found {_listed(sorted(weights))}"
        )
    with torch.random.fork_rng(devices=[]):
        model = _build(arch, num_classes=len(head))
    _require_same_names(model, weights, path, arch)
    model.load_state_dict(weights)
    return model.eval()


def build_random(arch: str) -> nn.Module:
    """The timm model of a name with random weights, the same on every call.

    Raises:
        ModelError: There is no such architecture.
    """
    say(f"model: {arch} has random weights, as was asked for")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(arch).eval()


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than weights, so that loading it could run code that it brings, or "
            "is damaged: save model.state_dict() alone, best as .safetensors"
        ) from None
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot read {path} ({reason}): get it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _stripped(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights under the model's own names; what was taken off them is said."""
    taken: list[str] = []
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None):
        content = content[wrapper]
        taken.append(wrapper)
    while prefix := next((item for item in _PREFIXES if _all_begin(content, item)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
        taken.append(prefix)
    odd = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if odd or not content:
        what = f"has entries that are no tensors: {_listed(odd)}" if odd else "holds no weights"
        raise ModelError(f"{path} {what}; expected a state dict")
    if taken:
        say(f"model: the weights of {path.name} are under {' > '.join(taken)}")
    return content


def _all_begin(content: dict[str, Any], prefix: str) -> bool:
    return bool(content) and all(key.startswith(prefix) for key in content)


def _build(arch: str, **given: Any) -> nn.Module:
    if not timm.is_model(arch):
        raise ModelError(f"timm has no architecture {arch!r}: timm.list_models('*vit*') lists them")
    return timm.create_model(arch, **given)


def _require_same_names(
    model: nn.Module, weights: dict[str, Tensor], path: Path, arch: str
) -> None:
    expected = model.state_dict()
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": [
            f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
            for key in sorted(expected.keys() & weights.keys())
            if expected[key].shape != weights[key].shape
        ],
    }
    told = [f"{len(keys)} {what} ({_listed(keys)})" for what, keys in problems.items() if keys]
    if told:
        raise ModelError(
            f"{path} does not fit {arch}: {'; '.join(told)}: give the architecture that it was "
            "trained as"
        )


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
