"""``vitcut report``: what runs hold, as one HTML page that needs neither network nor server."""

import base64
import html
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import yaml
from numpy.typing import NDArray

from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.decision_log import DecisionLog
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, ConfigError
from vitcut.extras import require_extra
from vitcut.graph import Graph
from vitcut.pages import assemble
from vitcut.reports.files import FileKind, Strengths, files_of, write_files
from vitcut.reports.pictures import Pictures
from vitcut.reports.tables import headline, recommend, verdict
from vitcut.results import CLASS_ONLY, DENSE, DENSE_REPAIRED, Point, Results
from vitcut.runs import (
    CIRCUIT_FILE,
    PATH_FILE,
    PICTURES_FILE,
    REPAIR_FILE,
    RESULTS_FILE,
    circuits_in,
    is_run,
    read_settings,
)
from vitcut.selection.settings import Budget
from vitcut.settings import as_plain, require_one_of
from vitcut.store import write_text
from vitcut.task import load_task, shipped_tasks
from vitcut.training.settings import FinetuneSettings

if TYPE_CHECKING:
    from vitcut.reports.embedded import EmbeddedModel
    from vitcut.selection.steps import PathStep

_NO_CUTS = {DENSE, CLASS_ONLY, DENSE_REPAIRED}
_HEIGHT = 900
"""Of the frame in a notebook, in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Report:
    """What some runs hold, as a page; a notebook shows it where it is the last value of a cell."""

    paths: tuple[Path, ...]
    """The run directories."""
    runs: tuple[dict[str, Any], ...]
    """One JSON object per run, as the page holds them."""
    model: "EmbeddedModel | None" = None
    """The cut model of the only run, where the page is to run it."""

    @classmethod
    def of(
        cls, runs: Sequence[str | Path], *, pictures: bool = True, with_model: bool = False
    ) -> "Report":
        """Read what run directories hold.

        Args:
            runs: The run directories.
            pictures: Whether to show the test images that they keep.
            with_model: Whether the page holds the cut model of the point that it opens at.

        Raises:
            ConfigError: There is no run, one is given twice, or several are given with a model.
            ArtefactError: A directory holds neither results nor a circuit, or one is damaged.
        """
        paths = [Path(run) for run in runs]
        if not paths:
            raise ConfigError("report needs a run directory, got none")
        places = [path.resolve() for path in paths]
        twice = next((run for run in places if places.count(run) > 1), None)
        if twice is not None:
            raise ConfigError(f"report got {twice} twice: give each run once")
        if with_model:
            require_extra("onnx", what="with-model")
            if len(paths) > 1:
                raise ConfigError(f"with-model takes one run, got {len(paths)}: give one alone")
        found = tuple(_read_run(run, pictures=pictures) for run in paths)
        model = None
        if with_model:
            from vitcut.reports.embedded import EmbeddedModel

            [run], [path] = found, paths
            measured = _results(path)
            model = EmbeddedModel.of(path, measured, None if measured is None else run["verdict"])
        return cls(paths=tuple(paths), runs=found, model=model)

    def to_html(self) -> str:
        """The whole page."""
        held, more = None, {"MODEL_POLICY": "", "MODEL": ""}
        if self.model is not None:
            held = {key: value for key, value in vars(self.model).items() if key != "onnx"}
            more = self.model.elements()
        title = ", ".join(run["name"] for run in self.runs)
        content = {"version": version("vitcut"), "model": held, "runs": self.runs}
        return assemble("report", title, content, **more)

    def save(self, path: str | Path) -> None:
        """Write the page, atomically."""
        write_text(path, self.to_html())

    def save_files(self, folder: str | Path, kinds: Sequence[FileKind]) -> None:
        """Write files for other programs.

        Points as ``csv``, each circuit as ``networkx`` and ``mib`` JSON, figures as ``svg`` and
        ``png``.

        Args:
            folder: Where to write; of several runs, each gets a folder of its own in it.
            kinds: Which files to write.

        Raises:
            ConfigError: A kind is unknown, or figures are asked for without matplotlib.
        """
        for kind in kinds:
            require_one_of("files", kind, get_args(FileKind))
        if {"svg", "png"} & set(kinds):
            require_extra("figures", what="svg and png")
        for number, path in enumerate(self.paths):
            place, results = Path(folder), _results(path)
            if len(self.paths) > 1:
                place /= f"{number + 1}-{self.runs[number]['name']}"
            circuits = {
                name: (Circuit.load(file), _strengths(path, name))
                for name, file in _circuit_files(path, results).items()
                if file.is_file()
            }
            write_files(place, files_of(results, circuits, set(kinds)))

    def show(self) -> None:
        """Show the page in a notebook.

        Raises:
            ConfigError: There is no IPython.
        """
        try:
            notebook = import_module("IPython.display")
        except ImportError:
            raise ConfigError("show needs a notebook: save the report and open the file") from None
        notebook.display(self)

    def _repr_html_(self) -> str:
        frame = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{frame}" width="100%" height="{_HEIGHT}" '
            'sandbox="allow-scripts allow-downloads" style="border:0"></iframe>'
        )


def _read_run(path: Path, *, pictures: bool) -> dict[str, Any]:
    """What the page knows of one run; keys whose value is None say what the run does not hold."""
    results = _results(path)
    settings = read_settings(path) if is_run(path) else {}
    files = _circuit_files(path, results)
    if results is None and not files:
        raise ArtefactError(
            f"nothing to report at {path}: expected the run directory of a finished "
            "`vitcut run`, `cut`, `finetune` or `discover`"
        )
    task = settings.get("images", {}).get("task", {})
    steps = _steps(path)
    files |= {step.name: path / step.circuit for step in steps}
    graphs: list[Graph] = []
    loaded = {name: Circuit.load(file) for name, file in files.items() if file.is_file()}
    circuits = {
        name: _circuit(circuit, graphs, _strengths(path, name)) for name, circuit in loaded.items()
    }
    # The dense model is the graph with all its edges.
    known = [*graphs, *(graph.unsplit for graph in graphs)]
    for point in () if results is None else results.all_points():
        whole = next((g for g in known if g.num_useful_edges == point.edges_total), None)
        if whole is not None and point.name in _NO_CUTS:
            circuits[point.name] = _circuit(Circuit.full(whole), graphs, {})
    chosen = None if results is None else recommend(results)
    cuts = [] if results is None else [p for p in results.points if p.name not in _NO_CUTS]
    task_name = next((c.task for c in loaded.values()), None) if results is None else results.task
    if not task and task_name in shipped_tasks():
        task = load_task(task_name).to_dict()
    seen = path / PICTURES_FILE
    return {
        "name": path.resolve().name,
        "task": task_name,
        "groups": list(task.get("groups", {})),
        "results": None if results is None else asdict(results),
        "headlines": {}
        if results is None
        else {p.name: headline(results, p) for p in _cuts(results)},
        "recommended": None if chosen is None else chosen.name,
        "verdict": verdict(steps if results is None else cuts),
        "steps": [asdict(step) for step in steps],
        "pairs": _pairs(path),
        "pictures": asdict(Pictures.load(seen)) if pictures and seen.is_file() else None,
        "graphs": [_graph(graph) for graph in graphs],
        "circuits": circuits,
        "settings": yaml.safe_dump(settings, sort_keys=False) if settings else None,
        "command": command_of(settings),
    }


def _results(path: Path) -> Results | None:
    return Results.load(path / RESULTS_FILE) if (path / RESULTS_FILE).is_file() else None


def _strengths(path: Path, name: str) -> Strengths:
    """What ACDC measured of each edge on its way to a point; empty for other methods."""
    log = path / "points" / name / "decisions.jsonl"
    return DecisionLog.read_increments(log) if log.is_file() else {}


def _cuts(results: Results) -> list[Point]:
    return [point for point in results.points if point.name != CLASS_ONLY]


def _circuit_files(path: Path, results: Results | None) -> dict[str, Path]:
    """The circuit of each point: of a repaired cut, that of the cut that it was made from."""
    found = circuits_in(path)
    own = path / "model" / CIRCUIT_FILE
    if own.is_file() and results is None:
        found["model"] = own
    for point in results.points if results is not None else ():
        # As it was cut: a merge may have brought edges back.
        if point.circuit is not None:
            found[point.name] = path / point.circuit
    return found


def _steps(path: Path) -> "Sequence[PathStep]":
    """The steps on the way to a budget, measured on val images."""
    if not (path / PATH_FILE).is_file():
        return []
    from vitcut.selection.steps import SearchPath

    return SearchPath.load(path / PATH_FILE).steps


def _pairs(path: Path) -> list[dict[str, Any]]:
    if not (path / REPAIR_FILE).is_file():
        return []
    from vitcut.training.repair import Repair

    return [asdict(pair) for pair in Repair.load(path / REPAIR_FILE).paired]


def _graph(graph: Graph) -> dict[str, Any]:
    """A graph by its names: target t reads the sources first, first + step, ... below end."""
    reads = [graph.readable(number) for number in range(len(graph.targets))]
    return {
        "layers": graph.num_layers,
        "heads": graph.num_heads,
        "kinds": graph.kinds,
        "sources": [source.name for source in graph.sources],
        "targets": [target.name for target in graph.targets],
        "reads": [[read.start, read.stop] for read in reads],
        "step": graph.num_kinds,
        "useful": _bits(graph.useful_edges.T[graph.edges.T]),
    }


def _circuit(circuit: Circuit, graphs: list[Graph], known: Strengths) -> dict[str, Any]:
    """A circuit, edge by edge in the order of targets, then of sources."""
    graph = circuit.graph
    if graph not in graphs:
        graphs.append(graph)
    neurons, strengths = None, None
    if circuit.neurons is not None:
        neurons = {
            "total": circuit.neurons.shape[2],
            "kept": circuit.neurons.sum(axis=2).tolist(),
        }
    if known:
        edges = [
            (graph.sources[source].name, graph.targets[target].name)
            for target, source in np.argwhere(graph.edges.T)
        ]
        values = np.array([known.get(edge, np.nan) for edge in edges], dtype="<f4")
        strengths = base64.b64encode(values.tobytes()).decode()
    return {
        "graph": graphs.index(graph),
        "method": circuit.method,
        "ablation": circuit.ablation,
        "tau": circuit.tau,
        "fingerprint": circuit.fingerprint,
        "kept": _bits(circuit.kept.T[graph.edges.T]),
        "onPath": _bits(circuit.live_sources & circuit.reached_sources),
        "neurons": neurons,
        "positions": None
        if circuit.positions is None
        else {"kept": _bits(circuit.positions), "total": len(circuit.positions)},
        "strengths": strengths,
    }


def _bits(values: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(values).tobytes()).decode()


def command_of(settings: dict[str, Any]) -> str | None:
    """What to type to make the run again; images and label files by their names alone."""
    verbs = {"taus": "run", "finetune": "finetune", "cut": "cut", "discover": "discover"}
    verb = next((verb for key, verb in verbs.items() if key in settings), None)
    if verb is None:
        return None
    images = settings["images"]
    task, source = images["task"]["name"], str(images["source"])
    given = task if task in shipped_tasks() else "LABELS.yaml"
    if verb == "run":
        data = {key: value for key, value in images.items() if key not in {"task", "fingerprint"}}
        rest = {k: v for k, v in settings.items() if k not in {"model", "images", "costs"}}
        recipe = yaml.safe_dump({"task": given, "data": data, **rest}, sort_keys=False)
        return f"vitcut run recipe.yaml\n\n# recipe.yaml\n{recipe}"
    words = ["vitcut", verb, *(["RUN"] if verb == "finetune" or "circuit" in settings else [])]
    words += ["--model", str(settings["model"]["model"]), "--source", source, "--task", given]
    defaults = {
        "discover": DiscoverSettings(),
        "select": Budget(),
        "cut": CutSettings(),
        "finetune": FinetuneSettings(),
        "bench": BenchSettings(),
    }
    flags: dict[str, str] = {}
    for section, default in defaults.items():
        plain = as_plain(default)
        for key, value in (settings.get(section) or {}).items():
            if value is not None and value != plain.get(key, value):
                flags[key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    for key, value in flags.items():
        words += [
            f"--{key.replace('_', '-')}",
            value.lower() if value in {"True", "False"} else value,
        ]
    return shlex.join(words)
