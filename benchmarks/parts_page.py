"""The page of benchmarks/parts.py."""

from pathlib import Path


def write_page(out: Path) -> None:
    """Written later."""
