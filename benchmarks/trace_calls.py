"""Which of our functions one `vitcut cut --target-macs` enters, on a tiny model with drawn pictures.

The road from what was typed to the first tensor operation, and the number of functions on the whole
way, say how much a reader has to follow. Committed figures: docs/architecture.md.

    uv run python benchmarks/trace_calls.py
    uv run python benchmarks/trace_calls.py --list
"""

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitcut
from vitcut.cli import main
from vitcut.progress import say

SRC = Path(vitcut.__file__).parent
MODEL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CUT = (
    "--source drawn --target-macs 0.6 --rounds 2 --images 48 --score-images 24 --verify-images 8 "
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

    Comprehensions, lambdas and module bodies are not counted.
    """
    entered: dict[str, None] = {}

    def enter(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SRC)) and code.co_name[0] != "<":
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
        model = timm.create_model("vit_tiny_patch16_224", num_classes=12, **MODEL)
        torch.save(model.state_dict(), f"{folder}/weights.pth")
        where = ["--model", f"{folder}/weights.pth", "--arch", "vit_tiny_patch16_224"]
        found, first = trace(["cut", *where, *CUT.split(), "--out", f"{folder}/out"])
    if "--list" in sys.argv:
        for number, name in enumerate(found):
            say(f"{'-- first tensor operation' if number == first else name}")
    files = len({name.partition(":")[0] for name in found})
    say(f"{len(found)} functions in {files} files; {first} before the first tensor operation")
