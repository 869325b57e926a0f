"""Fresh environments, in which nothing but some packages is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Pythons that uv cannot reach, or no network to fetch one from.
ABSENT = ("error sending request", "No interpreter found", "network was disabled")


def uv(*words):
    """Run uv, and skip the test where it, the network or a Python is missing."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    command = ["uv", *map(str, words)]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    if found.returncode and any(sign in found.stderr for sign in ABSENT):
        pytest.skip(f"uv reaches no packages: {found.stderr.strip()[-200:]}")
    assert found.returncode == 0, found.stderr


def environment(folder, *packages, python=sys.executable):
    """The Python of a fresh environment."""
    made = folder / "bin" / "python"
    uv("venv", "-q", "-p", python, folder)
    uv("pip", "install", "-q", "-p", made, *packages)
    return made


def run(program, *arguments, folder=None, timeout=300, **variables):
    """What a program prints; it sees nothing of the clone."""
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    known = {name: value for name, value in os.environ.items() if name not in hidden}
    found = subprocess.run(
        [program, *map(str, arguments)],
        check=False,
        cwd=folder or Path(program).parent,
        env=known | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout
