"""Which of our functions one `vitcut cut --target-macs` enters, on a tiny model with drawn pictures.

The road from what was typed to the first tensor operation, and the number of functions on the whole
way, say how much a reader has to follow. Committed figures: docs/architecture.md.

    uv run python benchmarks/trace_calls.py
    uv run python benchmarks/trace_calls.py --list
"""

import inspect
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import vitcut
from vitcut.cli import main
from vitcut.progress import say

SRC = Path(vitcut.__file__).parent
TRAIN = (
    "--source drawn --task drawn --image-size 16 --patch-size 8 --width 16 --depth 2 --num-heads 2 "
    "--epochs 1 --warmup-epochs 0 --precision float32 --device cpu"
)
CUT = (
    "--target-macs 0.6 --rounds 2 --images 48 --score-images 24 --verify-images 8 "
    "--runtimes torch --batches 1 --seconds 0.05 --min-rounds 3 --min-sample-ms 0.1"
)


class FirstOperation(TorchDispatchMode):
    """Notes how many functions had been entered when the first tensor operation came."""

    def __init__(self, entered: dict[str, None]) -> None:
        super().__init__()
        self._entered = entered
        self.before: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.before is None:
            self.before = len(self._entered)
        return func(*args, **(kwargs or {}))


def trace(words: list[str]) -> tuple[dict[str, None], int]:
    """Run a command; the functions in the order in which they are entered, and how many came first.

    Comprehensions, lambdas, and the bodies of modules and classes are not counted.
    """
    entered: dict[str, None] = {}

    def enter(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and code.co_name[0] != "<"
        if event == "call" and is_function and code.co_filename.startswith(str(SRC)):
            file = Path(code.co_filename).relative_to(SRC).as_posix()
            entered.setdefault(f"{file}:{code.co_qualname}")

    mode = FirstOperation(entered)
    sys.setprofile(enter)
    try:
        with mode:
            code = main(words)
    finally:
        sys.setprofile(None)
    if code or mode.before is None:
        raise SystemExit(f"the command failed with {code}")
    return entered, mode.before


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(["train", *TRAIN.split(), "--out", f"{folder}/train"])
        words = ["cut", "--model", f"{folder}/train", *CUT.split(), "--out", f"{folder}/out"]
        found, first = trace(words)
    if "--list" in sys.argv:
        for number, name in enumerate(found):
            say(f"{'-- first tensor operation' if number == first else name}")
    files = len({name.partition(":")[0] for name in found})
    say(f"{len(found)} functions in {files} files; {first} before the first tensor operation")
