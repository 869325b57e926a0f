"""Reading what other libraries wrote: their errors in one line, and weights that do not fit."""

import json
import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vitcut.errors import ModelError, one_line, shortage
from vitcut.labels import Labels

LOAD_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, ImportError, SafetensorError,
)  # fmt: skip
"""What libraries raise for damaged files, and for settings or weights that do not fit. The Hub's
errors are OSErrors."""
_WIDTHS = ("hidden_size", "embed_dim", "hidden_dim", "width")
_BESIDE_WIDTH = ("intermediate_size", "mlp_dim", "num_classes", "num_labels")
"""Sizes of matrices whose other side is the width; attention has one of width x width."""
_SIZE = re.compile("size|dim|width|heads|channels|classes|labels|tokens|ratio|chans")
_SHOWN = 3
"""How many names a message lists."""


@contextmanager
def told_as(problem: str) -> Generator[None]:
    """Turn a library's error into a `ModelError` of one line: the problem, and the reason."""
    try:
        yield
    except LOAD_ERRORS as error:
        if shortage(error):
            raise
        raise ModelError(f"{problem}: {one_line(error)}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings by name.

    Raises:
        ModelError: The file cannot be read, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, expected settings by name")
    return config


def labels_in(config: str, owner: str, named: Any, described: Any = None) -> Labels:
    """The classes that a configuration names.

    Args:
        config: The file and its entry, for messages.
        owner: Whose classes they are, for messages.
        named: The ids of the classes: a list, or texts by the number of the logit.
        described: Names for people by id, as far as there are any.

    Raises:
        ModelError: They are not one text, or number, for every logit from 0 on.
    """
    by_number = named if isinstance(named, dict) else dict(enumerate(named))
    places = {str(at) for at in range(len(by_number))}
    texts = [*by_number.values(), *(described or {}).values()]
    if set(map(str, by_number)) != places or not all(isinstance(one, (str, int)) for one in texts):
        shown = ", ".join(f"{key!r}: {value!r}" for key, value in list(by_number.items())[:_SHOWN])
        raise ModelError(
            f"{config} names classes {shown}{', ...' if len(by_number) > _SHOWN else ''}: expected "
            f"a text for each of the logits 0 to {len(by_number) - 1}: correct it"
        )
    ids = [str(by_number[key]) for key in sorted(by_number, key=int)]
    told = {str(key): str(value) for key, value in (described or {}).items()}
    return Labels(owner=owner, ids=tuple(ids), names=tuple(told.get(own, own) for own in ids))


def require_plausible(config: dict[str, Any], folder: Path) -> None:
    """Refuse sizes that the weights cannot have, before a model of these sizes is built.

    Args:
        config: Settings of a model; those of a text model beside it do not matter.
        folder: Holds the weights. Of pickled ones, only the number of bytes is known.

    Raises:
        ModelError: A layer would have no tensor, or a matrix would be larger than all weights.
    """
    num_tensors, num_weights = 0, 0
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        if path.suffix == ".bin":
            num_tensors, num_weights = num_tensors + 10_000, num_weights + path.stat().st_size
            continue
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as stored:
            shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
            num_tensors, num_weights = (
                num_tensors + len(shapes),
                num_weights + sum(map(prod, shapes)),
            )
    if not num_tensors:
        return
    found: dict[str, float] = {}
    waiting = [config]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict) and key != "text_config":
                waiting.append(value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[key] = max(value, found.get(key, value))
    width = max(1, *(found.get(key, 1) for key in _WIDTHS))
    for key, value in sorted(found.items(), key=lambda item: item[0] not in _WIDTHS):
        of_layers = any(word in key for word in ("layers", "depth"))
        most = num_tensors if of_layers else num_weights
        if key in _WIDTHS or key in _BESIDE_WIDTH:
            most /= width
        if value > most and (of_layers or _SIZE.search(key)):
            raise ModelError(
                f"{folder / 'config.json'} has {key} {value:g}, which a model with {num_weights:,} "
                f"weights in {num_tensors:,} tensors cannot have: restore the file"
            )


def listed(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def told_misfits(
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]],
) -> str:
    """How many weights do not fit a model, and the first few of each kind; empty if all do.

    Args:
        missing: Names that only the model has.
        unexpected: Names that only the weights have.
        mismatched: Name, shape in the weights and shape in the model, where those differ.
    """
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": (
            f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in mismatched
        ),
    }
    # The classifier first, then what is nested least: of a whole model, those tell most.
    found = {
        kind: sorted(
            names,
            key=lambda name: (not name.startswith(("head", "classifier")), name.count("."), name),
        )
        for kind, names in kinds.items()
    }
    return "; ".join(
        f"{len(names)} {kind} ({listed(names)})" for kind, names in found.items() if names
    )
