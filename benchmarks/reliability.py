"""Flip bits, forge artefacts, kill stages, type nonsense, and write docs/reliability.md.

``python benchmarks/reliability.py`` takes a quarter of an hour on one core. The cases are those of
``pytest -m slow tests/hostile/test_reliability.py``.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "hostile")]

import torch  # noqa: E402
from bad_inputs import bad_inputs  # noqa: E402
from reliability_cases import Lab, flips, forgeries, kills, table, tensor_forgeries  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- counts: benchmarks/reliability.py -->"


def main() -> None:
    """Count, and replace the tables between the marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=12, help="bits per kind of file")
    parser.add_argument("--forgeries", type=int, default=40, help="at most, per kind of file")
    parser.add_argument("--kills", type=int, default=25, help="per stage")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, parts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        lab = Lab.make(Path(folder))
        for title, cases in {
            "flipped bits in": flips(lab, each=given.flips),
            "forged": [*forgeries(lab, most=given.forgeries), *tensor_forgeries(lab)],
            "killed": kills(lab, each=given.kills),
            "bad input to": bad_inputs(lab, Path(scratch)),
        }.items():
            counted = Counter(cases)
            for (name, outcome), number in counted.items():
                if outcome not in {"refused", "same"}:
                    sys.stdout.write(f"{title} {name}: {number} x {outcome}\n")
            parts.append(table(title, counted))
            sys.stdout.write(f"{parts[-1]}\n")
    sys.stdout.write(f"{time.monotonic() - start:.0f} s\n")
    before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
    text = MARK.join([before, "\n\n" + "\n".join(parts) + "\n", after])
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
