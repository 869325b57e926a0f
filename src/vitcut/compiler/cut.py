"""A cut: a circuit compiled into a compact model, and the proof that it equals the masked one."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitcut.benchmark.evaluation import evaluate
from vitcut.circuit import Circuit
from vitcut.compact.artefact import fill_folder, recorded_hash
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import count_macs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.emit import Exactness, compile_circuit, verify
from vitcut.compiler.merging import MERGES, merge_streams, num_streams
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ArtefactError, CircuitError, ConfigError
from vitcut.images.load import Images, ImageSet, normalise
from vitcut.images.stratified import choose_evenly
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import Fitter
from vitcut.model.model import Model
from vitcut.results import CLASS_ONLY, Asked, Faithfulness, Measured, Merged, Point, Results
from vitcut.runs import CIRCUIT_FILE
from vitcut.settings import require_at_least
from vitcut.store import FOLDER_REMEDY, atomic_folder, load, save, sha256_file

FILL_FILE = "fill.safetensors"
_FACTS_FILE = "cut.json"
_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """The content of ``cut.json``."""

    model: str
    """SHA-256 of the file of tensors that it lies beside."""
    name: str
    exactness: Exactness | None
    faithfulness: Faithfulness | None
    budget: Asked | None
    seconds: float | None

    def __post_init__(self) -> None:
        if not self.name.isprintable() or {"/", "\\"} & {*self.name} or self.name.strip(". ") == "":
            raise ConfigError(f"a cut cannot be called {self.name!r}")
        if self.exactness is not None:
            found = self.exactness
            if not 0 <= found.max_abs_diff <= found.tolerance:
                raise ConfigError("the compact model is not within the tolerance")
            require_at_least("images", found.images, 1)
        if self.seconds is not None:
            require_at_least("seconds", self.seconds, 0)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Cut:
    """A compact model and what is known about it."""

    model: CompactViT
    circuit: Circuit | None
    """Under the ablation that it was cut with; None for a model that does not bring it along."""
    fill: Fill | None = None
    """What stands in for what the circuit cuts; None for a cut that was read from disk, where
    `read_fill` finds it."""
    exactness: Exactness | None = None
    """How far it is from the masked model; None for a repaired model, which computes another."""
    faithfulness: Faithfulness | None = None
    """KL on the calibration images under the ablations of discovery and of the cut, and the effect
    of merging if it was asked for."""
    name: str = "cut"
    """Name of its point in results."""
    budget: Asked | None = None
    """What the circuit was searched for: {"macs": 0.2}, or {"latency": 0.25, ...}."""
    seconds: float | None = None
    """How long finding and cutting it took; None if unknown."""
    folder: Path | None = None
    """The model directory, once it is on disk."""
    results: Results | None = None
    """Measurements of it beside the dense model; None if it was not measured."""

    def save(self, folder: Path) -> None:
        """Write a model directory with the circuit, a linear fill and the facts of the cut."""
        model = self.model
        with atomic_folder(folder) as fresh:
            if self.circuit is not None:
                self.circuit.save(fresh / CIRCUIT_FILE)
            if self.fill is not None and self.fill.circuit is not None:
                self.fill.save(fresh / FILL_FILE)
            weights = model.state_dict()
            facts = _Facts(
                model=fill_folder(fresh, plan=model.plan, info=model.info, tensors=weights),
                name=self.name,
                exactness=self.exactness,
                faithfulness=self.faithfulness,
                budget=self.budget,
                seconds=self.seconds,
            )
            save(fresh / _FACTS_FILE, facts, version=_VERSION)

    @classmethod
    def load(cls, folder: Path) -> "Cut":
        """Read a model directory, whether ``save`` or ``CompactViT.save_pretrained`` wrote it.

        Raises:
            ArtefactError: It is damaged, or of another version.
        """
        model = CompactViT.from_pretrained(folder)
        path, facts = folder / CIRCUIT_FILE, folder / _FACTS_FILE
        circuit = Circuit.load(path) if path.is_file() else None
        known: dict[str, Any] = {}
        if facts.is_file():
            found = load(facts, _Facts, kind="cut", version=_VERSION, remedy=FOLDER_REMEDY)
            if found.model != recorded_hash(folder):
                raise ArtefactError(
                    f"{facts} is not of the model that it lies beside: restore it, or remove it"
                )
            known = {key: value for key, value in vars(found).items() if key != "model"}
        elif circuit is not None:
            known["name"] = point_name(circuit)
        return cls(model=model, circuit=circuit, folder=folder, **known)

    def read_fill(self) -> Fill | None:
        """The linear fill in the model directory, for building the masked model again.

        Running the model does not need it. None if none was saved, or if it was removed.

        Raises:
            ArtefactError: It is damaged, of another version, or not the one of this model.
        """
        if self.folder is None or not (self.folder / FILL_FILE).is_file():
            return None
        fill = Fill.load(self.folder / FILL_FILE)
        if sha256_file(self.folder / FILL_FILE) != recorded_hash(self.folder, "fill"):
            raise ArtefactError(
                f"the fill in {self.folder} is not the one that the model was saved with: restore "
                "it, or remove it"
            )
        return fill

    def point(self, run: Path | None = None) -> Point:
        """What is known about the compact model before it is measured.

        Args:
            run: The directory that the point's paths are relative to; paths out of it are left
                out. None leaves out all.
        """
        circuit, point, place = self.circuit, Point(name=self.name), None
        if run is not None and self.folder is not None:
            inside = Path(os.path.relpath(self.folder, run)).as_posix()
            place = None if inside.startswith("..") else inside
        if circuit is not None:
            graph = circuit.graph
            point = replace(
                point,
                method=circuit.method,
                granularity="edge" if circuit.neurons is None else "part",
                ablation=circuit.ablation,
                tau=circuit.tau,
                edges_total=graph.num_useful_edges,
                edges_kept=circuit.num_kept,
                heads_total=graph.num_layers * graph.num_heads,
                heads_kept=circuit.num_heads_kept,
                neurons_kept_fraction=circuit.neurons_kept_fraction,
                positions_kept_fraction=circuit.positions_kept_fraction,
                circuit=None if place is None else f"{place}/{CIRCUIT_FILE}",
            )
        return replace(
            point,
            macs=count_macs(self.model.plan),
            max_abs_diff=None if self.exactness is None else self.exactness.max_abs_diff,
            seconds=self.seconds,
            faithfulness=self.faithfulness,
            budget=self.budget,
            model=place,
            params=sum(tensor.numel() for tensor in self.model.parameters()),
            bytes=sum(t.numel() * t.element_size() for t in self.model.state_dict().values()),
        )

    def __repr__(self) -> str:
        plan = self.model.plan
        words = [repr(self.name), f"{plan.shape.num_layers} blocks", f"{count_macs(plan):,} MACs"]
        if self.exactness is not None:
            words.append(f"|compact - masked| {self.exactness.max_abs_diff:.2g}")
        return f"Cut({', '.join(words)})"


def cut_circuit(
    model: Model,
    images: Images,
    circuit: Circuit,
    settings: CutSettings,
    *,
    fitter: Fitter,
    costs: CostModel,
    name: str | None = None,
    budget: Asked | None = None,
) -> Cut:
    """Compile a circuit, check the result, and measure it again under the cut's ablation.

    Streams are merged first where the settings say so; a linear fill is fitted to the merged
    circuit.

    Args:
        model: The dense model, for the task of the images.
        images: Of the task; the compact model is compared with the masked one on val images.
        circuit: Under any ablation.
        settings: The ablation of the cut, and on how many images it is checked.
        fitter: Gives fills; shared by circuits of one model, since all need the same means.
        costs: Decide between ways to compute the same.
        name: Name of the cut's point; None derives it from how the circuit was found.
        budget: What the circuit was searched for.

    Raises:
        CircuitError: The circuit is of another model.
        ExactnessError: The compact model does not compute the masked one.
    """
    start = time.perf_counter()
    require_found_in(circuit, model)
    weights, task = model.weights, images.task
    parent = circuit.with_ablation(settings.ablation_for(circuit.ablation))
    final = merge_streams(parent, weights.shape, costs) if settings.merge else parent
    fill = fitter.fit(final).fill
    compact = compile_circuit(weights, final, fill, costs=costs)
    compact.info = model.info_for(task)
    count = min(settings.verify_images, len(images.val))
    chosen = choose_evenly(images.val.labels, count, seed=settings.seed)
    pixels = normalise(images.val.read(chosen), model.preprocessing)
    exactness = verify(compact, weights, final, fill, pixels)
    faithfulness = _faithfulness(model, images, circuit, final, compact)
    if settings.merge:
        merged: Merged = {
            "edges_restored": 0,
            "kl": None,
            "streams": (num_streams(compact.plan), num_streams(compact.plan)),
        }
        if final is not parent:
            before = compile_circuit(weights, parent, fitter.fit(parent).fill, costs=costs)
            # On val: the test images are for reporting.
            was, now = _kls(model, images, [before, compact])
            merged = {
                "edges_restored": final.provenance[MERGES][-1]["edges_restored"],
                "streams": (num_streams(before.plan), num_streams(compact.plan)),
                "kl": (was, now),
            }
        faithfulness["merge"] = merged
    finding, cutting = circuit.provenance.get("seconds"), time.perf_counter() - start
    return Cut(
        model=compact,
        circuit=final,
        fill=fill,
        exactness=exactness,
        faithfulness=faithfulness,
        name=name or point_name(circuit),
        budget=budget,
        seconds=None if finding is None else round(finding + cutting, 2),
    )


def require_found_in(circuit: Circuit, model: Model) -> None:
    """Check that a circuit was found in this model, if it says where it was found.

    Raises:
        CircuitError: It was found in another one.
    """
    found = circuit.provenance.get("weight_hash")
    if found not in {None, model.weight_hash}:
        raise CircuitError(
            f"the circuit was found in a model whose weights hash to {str(found)[:12]}, those of "
            f"{model.name!r} hash to {model.weight_hash[:12]}: use the model that it was found in"
        )


def require_cut_from(cut: Cut, model: Model) -> Cut:
    """A cut that was read back, which must have been cut from this model.

    Raises:
        ArtefactError: It was cut from another one.
    """
    found = cut.model.info.source_sha256
    if found != model.weight_hash:
        raise ArtefactError(
            f"{cut.name} was cut from weights that hash to {str(found)[:12]}, those of "
            f"{model.name!r} hash to {model.weight_hash[:12]}: choose another --out"
        )
    return cut


def class_only(model: Model, images: Images, settings: CutSettings) -> tuple[Point, CompactViT]:
    """The second baseline of every cut: the uncut circuit, compiled; it is not saved.

    It computes what the dense model computes, without what its classifier does not read.
    """
    circuit = Circuit.full(model.weights.graph, ablation="zero")
    settings = replace(settings, ablation="zero", merge=False)
    fitter, costs = make_fitter(model, images, settings), CostModel.of(settings)
    cut = cut_circuit(model, images, circuit, settings, fitter=fitter, costs=costs, name=CLASS_ONLY)
    return cut.point(), cut.model


def make_fitter(model: Model, images: Images, settings: CutSettings) -> Fitter:
    """What fits fills, on the calibration images of a cut; they are read when one is needed."""
    count = min(settings.images, len(images.train))
    chosen = images.calibration(count, seed=settings.seed)
    return Fitter(
        model.weights,
        lambda: normalise(chosen.all(), model.preprocessing),
        ridge=settings.ridge,
        memory_gib=settings.memory_gib,
    )


def point_name(circuit: Circuit) -> str:
    """What a circuit's point is called: how it was searched."""
    tau = "" if circuit.tau is None else f"-{circuit.tau:g}"
    return f"{circuit.method}-{circuit.discovered_under}{tau}"


def _faithfulness(
    model: Model, images: Images, found: Circuit, final: Circuit, compact: CompactViT
) -> Faithfulness:
    """KL on the images of discovery, as found and as cut; None if unknown."""
    settings, kl = found.provenance.get("settings") or {}, found.provenance.get("kl")
    if kl is None or not {"images", "seed"} <= settings.keys():
        return {"discovery": None, "cut": None}
    discovery: Measured = {"ablation": found.discovered_under, "kl": kl}
    if found.provenance.get("images_fingerprint") != images.fingerprint:
        return {"discovery": discovery, "cut": None}
    searched = images.calibration(settings["images"], seed=settings["seed"])
    [as_cut] = _kls(model, images, [compact], on=searched)
    return {"discovery": discovery, "cut": {"ablation": final.ablation, "kl": as_cut}}


def _kls(
    model: Model, images: Images, compact: list[CompactViT], *, on: ImageSet | None = None
) -> list[float]:
    """Mean KL(dense || compact) of compact models, on val images unless others are given."""
    on, task, preprocessing = on or images.val, images.task, model.preprocessing
    dense = evaluate(model.module, on, task, preprocessing)
    return [evaluate(each, on, task, preprocessing, reference=dense).kl or 0.0 for each in compact]
