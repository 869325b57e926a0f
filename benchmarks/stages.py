"""Where the seconds and the memory of one command go: `python benchmarks/stages.py cut ...`.

Runs a `vitcut` command in this process and writes, for each stage, how often it ran and how many
seconds it took without the stages inside it, and the peak resident memory, as JSON to standard
output or ``--stages FILE``.
"""

import functools
import json
import resource
import sys
import time
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

from vitcut import cli
from vitcut.runtime import describe_machine

STAGES = {
    "images": [("vitcut.images.prepare", "prepare"), ("vitcut.images.load", "split")],
    "model": [("vitcut.model.load", "load")],
    "means": [("vitcut.masked.fitting", "mean_fill")],
    "fills": [("vitcut.masked.fitting", "fit_fill")],
    "gradients": [("vitcut.selection.responses", "trace_sites")],
    "responses": [
        ("vitcut.selection.responses", "Site.responses"),
        ("vitcut.selection.responses", "Site.refresh"),
    ],
    "selection": [("vitcut.selection.rounds", "Selection.cut_to")],
    "compile": [("vitcut.compiler.emit", "compile_circuit")],
    "verify": [("vitcut.compiler.emit", "verify")],
    "evaluation": [("vitcut.benchmark.evaluation", "evaluate")],
    "export": [("vitcut.runtimes.session", "prepare_sessions")],
    "timing": [("vitcut.benchmark.latency", "measure_latency")],
}
"""Functions of each stage."""


class Clock:
    """Exclusive seconds of stages that may run inside one another."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._running = ["other"]
        self._since = time.perf_counter()

    def switch(self) -> None:
        """Book the time since the last switch on the stage that runs."""
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, stage: str, function: Any) -> Any:
        """A function that books its time."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._running.append(stage)
            self.calls[stage] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return wrapped


def main() -> int:
    """Run the command that is typed after this script's name."""
    arguments, out = sys.argv[1:], None
    if "--stages" in arguments:
        at = arguments.index("--stages")
        out = Path(arguments[at + 1])
        del arguments[at : at + 2]
    clock, replaced = Clock(), dict[int, Any]()
    for stage, functions in STAGES.items():
        for module_name, path in functions:
            owner: Any = import_module(module_name)
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            original = getattr(owner, name)
            replaced[id(original)] = clock.timed(stage, original)
            setattr(owner, name, replaced[id(original)])
    # Functions that other modules have imported by name.
    for name, module in list(sys.modules.items()):
        if name.startswith("vitcut"):
            for key, value in list(vars(module).items()):
                if id(value) in replaced:
                    setattr(module, key, replaced[id(value)])
    started = time.perf_counter()
    code = cli.main(arguments)
    clock.switch()
    found = {
        "command": ["vitcut", *arguments],
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "stages": {
            stage: {"seconds": round(seconds, 1), "calls": clock.calls[stage]}
            for stage, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])
        },
        "machine": describe_machine(),
    }
    text = json.dumps(found, indent=1)
    if out is None:
        sys.stdout.write(text + "\n")
    else:
        out.write_text(text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
