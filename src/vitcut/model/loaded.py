"""Checks and messages that the readers of all libraries share."""

from collections.abc import Mapping, Sequence

_SHOWN = 3


def listed(keys: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def told_misfits(misfits: Mapping[str, Sequence[str]]) -> str:
    """How many weights do not fit, and the first few of each kind; empty where all do."""
    return "; ".join(
        f"{len(keys)} {what} ({listed(keys)})" for what, keys in misfits.items() if keys
    )
