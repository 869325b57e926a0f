"""The commands that show what is there: ``show`` and ``report`` need a directory alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitcut.errors import ConfigError

if TYPE_CHECKING:
    from vitcut.reports.page import Report


def show(path: str | Path, *, plan: bool = False) -> None:
    """Print a circuit, a plan or results as tables.

    Args:
        path: A run or model directory, or a circuit.json.
        plan: Print only what the compact model computes, block by block, with predicted times.

    Raises:
        ArtefactError: The path holds none of these.
    """
    from vitcut.reports.show import show_path, show_plan_of

    (show_plan_of if plan else show_path)(Path(path))


def report(
    runs: str | Path | Sequence[str | Path],
    *,
    files: tuple[Literal["csv", "networkx", "mib", "svg", "png"], ...] = (),
    pictures: bool = True,
    with_model: bool = False,
    out: str | Path | None = None,
) -> "Report":
    """Write what runs hold as one HTML page, with circuits, accuracies and latencies.

    Args:
        runs: Run directories of run, cut, finetune or discover; several are shown side by side.
        files: What to write beside the page, into a folder of its name without suffix: points as
            csv, each circuit as networkx or mib JSON, figures as svg or png.
        pictures: Show the test images that the runs keep; --no-pictures leaves them out.
        with_model: Put the cut model into the page, so that it answers pictures that are dropped
            on it: about 5 MB more, and the model.
        out: File to write; a notebook also shows the report itself.

    Raises:
        ConfigError: Files are asked for without ``out``, or figures without matplotlib.
        ArtefactError: A directory holds neither results nor a circuit, or one is damaged.
    """
    from vitcut.reports.page import Report

    if files and out is not None and not Path(out).suffix:
        raise ConfigError(
            f"out must be a name such as {out}.html, got {out}: files go into a folder of its name "
            "without suffix"
        )
    made = Report.of(
        [runs] if isinstance(runs, (str, Path)) else list(runs),
        pictures=pictures,
        with_model=with_model,
    )
    if files and out is None:
        raise ConfigError("files go beside the page: give out, the file to write")
    if out is not None:
        if files:
            made.save_files(Path(out).with_suffix(""), files)
        made.save(out)
    return made
