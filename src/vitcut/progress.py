"""Progress of anything that takes over two seconds: a bar on a terminal, plain lines elsewhere."""

import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from vitcut.errors import printable

T = TypeVar("T")

_FIRST_LINE_AFTER_S = 2.0
_LINE_EVERY_S = 15.0
_WIDE = 10_000


class Terminal(Console):
    """A console that prints text as it is, whatever names from outside it contains."""

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(
            stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape what could steer a terminal; every string that is printed passes through here."""
        return super().render_str(printable(text), **options)

    def print_table(self, table: Table, *, keys: int = 1) -> None:
        """Print a table of strings; one that is too wide in parts below each other.

        Args:
            table: The whole one.
            keys: How many first columns each part begins with.
        """

        def part_of(columns: list[Column]) -> Table:
            part = copy(table)
            part.columns = [replace(item, _index=number) for number, item in enumerate(columns)]
            return part

        for column in table.columns:
            # Headers may break between words, cells may not.
            column.min_width = max((cell_len(printable(str(c))) for c in column.cells), default=1)
            column.header, words = str(column.header), printable(str(column.header)).split()
            column.min_width = max([column.min_width, *map(cell_len, words)])
            column.no_wrap = False
        parts = [table.columns[:keys]]
        for column in table.columns[keys:]:
            wider = part_of([*parts[-1], column])
            # Measured on a wide terminal, because no measure exceeds the terminal's own.
            needed = Measurement.get(self, self.options.update(width=_WIDE), wider).minimum
            fits = needed <= self.width
            if fits or len(parts[-1]) == keys:
                parts[-1] = [*parts[-1], column]
            else:
                parts.append([*table.columns[:keys], column])
        for number, columns in enumerate(parts, start=1):
            part = part_of(columns)
            part.title = table.title if number == 1 else None
            part.caption = table.caption if number == len(parts) else None
            self.print(part)

    def on_broken_pipe(self) -> None:
        """Leave it to the command line; rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def say(text: str) -> None:
    """Print one line for the user on standard error; standard output is for results."""
    Terminal(stderr=True, soft_wrap=True).print(text.replace("\n", " "))


class Meter:
    """Counts steps of one named job; use it as a context manager."""

    def __init__(self, label: str, total: int, *, unit: str = "steps") -> None:
        self._label = printable(label)
        self._total = total
        self._unit = unit
        self._done = 0
        self._note = ""
        self._start = time.monotonic()
        self._next_line = self._start + _FIRST_LINE_AFTER_S
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Terminal(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._label, total=self._total, rate="", note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        """Count ``steps`` more; ``note`` replaces the text at the end of the line."""
        self._done += steps
        self._note = self._note if note is None else printable(note)
        now = time.monotonic()
        seconds = now - self._start
        rate = f"{self._done / max(seconds, 1e-9):.3g} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=rate, note=self._note)
        elif now >= self._next_line:
            self._next_line = now + _LINE_EVERY_S
            left = seconds * (self._total - self._done) / max(self._done, 1)
            note = f", {self._note}" if self._note else ""
            say(f"{self._label}: {self._done}/{self._total}, {rate}, {left:.0f} s left{note}")


def track(items: Iterable[T], label: str, total: int, *, unit: str = "steps") -> Iterator[T]:
    """Yield ``items`` and show how far along they are."""
    with Meter(label, total, unit=unit) as meter:
        for item in items:
            yield item
            meter.advance()
