"""The points of a run: a circuit and the model cut from it, found once and then read again."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitcut.circuit import Circuit
from vitcut.compact.artefact import FILL
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError
from vitcut.names import Ablation
from vitcut.pipeline.cards import compact_card
from vitcut.pipeline.fills import Fills
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.stages import Cut, Discovery, cut_circuit, cut_point
from vitcut.pipeline.subject import Subject
from vitcut.results import Point, Results
from vitcut.runtime import describe_machine
from vitcut.store import write_text

CIRCUIT_FILE = "circuit.json"
MODEL_FOLDER = "model"
_DECISIONS_FILE = "decisions.jsonl"
RECORD_FILE = "cut.json"
"""What is known of a cut before it is measured; its presence says that the model is whole."""


def point_name(method: str, ablation: Ablation, tau: float | None) -> str:
    """What a circuit's point is called: how it was searched."""
    return f"{method}-{ablation}" + ("" if tau is None else f"-{tau:g}")


def _seconds(circuit: Circuit, cutting: float) -> float | None:
    """What finding and cutting took; None where the search was resumed or is not known."""
    finding = circuit.provenance.get("seconds")
    return None if finding is None else round(finding + cutting, 2)


class PointMaker:
    """Finds and cuts the circuits of one run directory."""

    def __init__(self, subject: Subject, folder: RunFolder, cut: CutSettings) -> None:
        self._subject = subject
        self._folder = folder
        self._cut = cut
        self.fills = Fills(subject, cut)

    def find(
        self, config: DiscoverSettings, taus: Sequence[float]
    ) -> Iterator[tuple[str, Circuit]]:
        """The name and circuit of the point at each tau, all from the same cached activations."""
        discovery: Discovery | None = None
        for tau in taus:
            name = point_name(config.method, config.ablation, tau)
            path = self._folder.point(name) / CIRCUIT_FILE
            if not path.exists():
                discovery = discovery or Discovery(self._subject, config)
                log = self._folder.point(name) / _DECISIONS_FILE
                discovery.find(tau, log=log).save(path)
            circuit = Circuit.load(path)
            if circuit.tau != tau:
                raise ConfigError(
                    f"{path} was found at tau {circuit.tau!r}, not {tau!r}, which has the same "
                    "name: choose another --out"
                )
            yield name, circuit

    def cut(
        self,
        name: str,
        circuit: Circuit,
        *,
        into: Path | None = None,
        budget: dict[str, Any] | None = None,
    ) -> tuple[Point, CompactViT]:
        """Compile a circuit, check it and save the model.

        Args:
            name: Of the point.
            circuit: Under any ablation.
            into: Takes the model directory; the point's folder if None.
            budget: What the circuit was searched for, if for one.
        """
        into = self._folder.point(name) if into is None else into
        record, model_folder = into / RECORD_FILE, into / MODEL_FOLDER
        if record.exists():
            return Results.load(record).points[0], CompactViT.from_pretrained(model_folder)
        start = time.perf_counter()
        cut = cut_circuit(self._subject, circuit, self._cut, fills=self.fills)
        save_cut(cut, model_folder)
        point = cut_point(
            name,
            cut,
            seconds=_seconds(circuit, time.perf_counter() - start),
            circuit=self._relative(model_folder / CIRCUIT_FILE),
            model=self._relative(model_folder),
        )
        point = replace(point, budget=budget)
        task, machine = self._subject.task.name, describe_machine()
        Results(task=task, machine=machine, points=(point,)).save(record)
        return point, cut.model

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder.path).as_posix()


def save_cut(cut: Cut, folder: Path) -> None:
    """Write a model directory with its circuit, and the fill where that was fitted to it."""
    circuit = json.dumps(cut.circuit.to_dict(), indent=1)
    if cut.fill.circuit is None:
        cut.model.save_pretrained(folder, circuit=circuit)
        return
    with tempfile.TemporaryDirectory() as temporary:
        fill = Path(temporary) / FILL
        cut.fill.save(fill)
        cut.model.save_pretrained(folder, circuit=circuit, fill=fill)


def save_results(results: Results, folder: Path) -> None:
    """Write every point's model card, then ``results.json``, whose presence says: complete."""
    for point in results.points:
        if point.model is not None:
            write_text(folder / point.model / "README.md", compact_card(results, point))
    results.save(folder / "results.json")
