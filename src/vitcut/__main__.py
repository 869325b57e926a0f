"""The console script. It loads the command line late, so that Ctrl-C is heard from the start."""

import io
import signal
import sys
from typing import Any


def entry() -> None:
    """Run the command that was typed, and leave with its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A path may have bytes that are not UTF-8, and a terminal another encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from vitcut.cli import main

        code = main()
    except KeyboardInterrupt as stop:
        sys.stderr.write("interrupted; run the same command to continue\n")
        # As a shell has it: 128 and the number of the signal.
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
    sys.exit(code)


def _terminate(number: int, _: Any) -> None:
    """Treat SIGTERM as Ctrl-C, so that everything is put away in the same way."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    entry()
