"""A headless browser for tests; they skip where there is none."""

import shutil
import time
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["no-sandbox", "disable-background-networking", "disable-component-update", "disable-sync"]


@contextmanager
def open_browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS]
        )
        yield opened
        opened.close()


def until(condition, seconds=20.0):
    """Wait until a condition holds. Playwright's own way evaluates code that pages forbid."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
