"""Make docs/benchmarks/animals again: the reference experiment, on the shipped model.

    OMP_NUM_THREADS=1 uv run --with matplotlib python benchmarks/animals.py \
        --source tiny-imagenet-200.zip

Searches circuits over tau with ACDC, evaluates each under several fills, repairs some beside rivals of
equal MACs, trains the shapes of some anew, and times all. What is finished is not done again, and
what was killed goes on; ``--steps`` does only some of: search, evaluate, repair, retrain, time,
page. ``--quick`` is a smaller version, in under ten minutes, whose page is in ``--out``.
"""

import argparse
import json
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from animals_page import PAGE, write_page
from torch import nn

import vitcut
from vitcut import BenchSettings, Budget, CutSettings, DiscoverSettings, FinetuneSettings
from vitcut.benchmark.evaluation import Evaluation, compare, evaluate
from vitcut.benchmark.latency import measure_latency
from vitcut.benchmark.points import add_accuracy, dense_point
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import dense_macs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.cut import Cut, class_only, cut_circuit, make_fitter
from vitcut.compiler.settings import CutAblation
from vitcut.discovery.search import find_circuits
from vitcut.errors import ArtefactError
from vitcut.images.load import Images, normalise
from vitcut.masked.fitting import Fitter
from vitcut.model.model import Model, read_model
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.progress import say
from vitcut.results import CLASS_ONLY, DENSE, Results
from vitcut.runs import Run, circuits_in
from vitcut.runtime import describe_machine
from vitcut.store import read_json, sealed, write_json
from vitcut.training.checkpoint import read_training
from vitcut.training.distillation import repair
from vitcut.training.loop import train
from vitcut.training.settings import TrainSettings

STEPS = ("search", "evaluate", "repair", "retrain", "time", "page")
TAUS = (0.9, 0.3, 0.1, 0.05, 0.01, 0.005, 0.004, 0.003, 0.002, 0.001, 5e-4, 1e-4)
FILLS: tuple[CutAblation, ...] = ("mean", "linear", "zero")


@dataclass(frozen=True, kw_only=True)
class Search:
    """One sweep of ACDC over tau, on one set of cached activations."""

    name: str
    settings: DiscoverSettings
    taus: tuple[float, ...]
    fills: tuple[CutAblation, ...] = ("mean",)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is done. Of repairs and trainings, the first are the most wanted."""

    searches: tuple[Search, ...]
    repaired: tuple[str, ...]
    """Models by name, see `Bed.cut`; ``dense`` is the dense model given the same repair."""
    epochs: int
    """Of a repair."""
    retrained: tuple[tuple[str, int], ...]
    """Architectures by name, with the seed of their new weights; trained by the light recipe."""
    seconds: float
    """Spent on timing each model, runtime and batch size."""


def sweeps(images: int, taus: tuple[float, ...]) -> tuple[Search, ...]:
    """The main sweeps: one corrupted image per image, and means."""
    return tuple(
        Search(
            name=ablation,
            settings=DiscoverSettings(ablation=ablation, images=images),
            taus=taus,
            fills=FILLS,
        )
        for ablation in ("resample", "mean")
    )


FULL = Extent(
    searches=(
        *sweeps(116, TAUS),
        # As many pairs, from fewer images with five each or from more images with one each.
        Search(
            name="five",
            settings=DiscoverSettings(ablation="resample", images=58, pairs="each_other_group"),
            taus=(0.01, 0.003),
        ),
        Search(
            name="more",
            settings=DiscoverSettings(ablation="resample", images=290),
            taus=(0.01, 0.003),
        ),
        Search(
            name="total",
            settings=DiscoverSettings(ablation="mean", images=116, criterion="total"),
            taus=(0.3, 0.1, 0.05, 0.01),
        ),
    ),
    repaired=(
        "mean-0.003",
        "fisher-as-mean-0.003",
        "first-2",
        "resample-0.003",
        "mean-0.01",
        "first-1",
        "random-as-mean-0.003",
        "fisher-as-mean-0.01",
        "dense",
        "fisher-as-resample-0.003",
        "resample-0.01",
    ),
    epochs=6,
    retrained=(
        *(
            (name, 0)
            for name in (
                "mean-0.003",
                "plain-as-mean-0.003",
                "random-as-mean-0.003",
                "mean-0.01",
                "budget-0.1",
                "budget-0.2",
                "mean-0.005",
                "mean-0.001",
                "first-2",
            )
        ),
        *((name, seed) for seed in (1, 2) for name in ("mean-0.003", "budget-0.1")),
    ),
    seconds=0.5,
)
QUICK = Extent(
    searches=sweeps(58, (0.05, 0.01, 0.005, 0.003, 0.001)),
    repaired=("mean-0.003", "first-2"),
    epochs=1,
    retrained=(),
    seconds=0.3,
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """JSON values that a run directory keeps."""

    content: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write them atomically."""
        write_json(path, sealed(self.content, 1))

    @classmethod
    def load(cls, path: Path) -> "Facts":
        """Read what `save` wrote."""
        return cls(content=read_json(path, kind="facts", version=1))


@dataclass(frozen=True, kw_only=True)
class Bed:
    """The dense model, its images, and what was made of it."""

    model: Model
    images: Images
    run: Run
    fitter: Fitter
    settings: CutSettings
    extent: Extent

    def search(self, search: Search, taus: tuple[float, ...]) -> dict[str, Circuit]:
        """The circuits of a sweep at some values of tau by their names, searched or read back."""
        run = Run(self.run.path / "search" / search.name)
        kept = asdict(replace(search.settings, tau=1.0))
        run.claim({"search": kept, "weights": self.model.weight_hash})
        found = find_circuits(self.model, self.images, search.settings, taus, run)
        return {f"{search.name}-{circuit.tau:g}": circuit for _, circuit in found}

    @cached_property
    def circuits(self) -> dict[str, tuple[Search, Circuit]]:
        """Every circuit that was found, by the name of its point."""
        circuits: dict[str, tuple[Search, Circuit]] = {}
        for search in self.extent.searches:
            points, ablation = self.run.path / "search" / search.name, search.settings.ablation
            there = circuits_in(points)
            taus = tuple(tau for tau in search.taus if f"acdc-{ablation}-{tau:g}" in there)
            for name, circuit in self.search(search, taus).items():
                circuits[name] = search, circuit
        return circuits

    def compiled(self, name: str, circuit: Circuit, fill: CutAblation) -> Cut:
        """A circuit compiled under a fill, or read back."""
        settings = replace(self.settings, ablation=fill)
        costs = CostModel.of(settings)

        def make() -> Cut:
            return cut_circuit(
                self.model,
                self.images,
                circuit,
                settings,
                fitter=self.fitter,
                costs=costs,
                name=name,
            )

        return self.run.once(f"points/{name}/{fill}", make, Cut.load)

    def cut(self, name: str) -> Cut:
        """A model by name.

        ``SEARCH-TAU`` is a circuit of ACDC with linear fill. ``budget-F`` is the Fisher cut to
        this fraction of the MACs, ``fisher-as-NAME`` the one to the MACs of another model,
        ``random-as-NAME`` the same with parts chosen at random. ``first-K`` keeps the first blocks.
        """
        kind, _, rest = name.partition("-")
        if kind == "first":
            return self.compiled(name, first_blocks(self.model, int(rest)), "linear")
        if kind in {"fisher", "random", "budget"}:
            given: dict[str, Any] = {}
            if kind == "random":
                given = {"scores": "random", "joint": False, "rescore": False}
                given["refresh_fraction"] = 0.0
            fraction = float(rest) if kind == "budget" else self.macs_fraction(rest[3:])
            budget = Budget(target_macs=round(fraction, 4), **given)
            out = self.run.path / "rivals" / name
            made = vitcut.cut(
                self.model, self.images, budget=budget, settings=self.settings, bench=None, out=out
            )
            return replace(made, name=name)
        return self.compiled(name, self.circuits[name][1], "linear")

    def macs_fraction(self, name: str) -> float:
        """The MACs of a model, as a fraction of the dense one's."""
        return (self.cut(name).point().macs or 0) / dense_macs(self.model.weights.shape)

    def evaluate(self, module: nn.Module, reference: Evaluation | None = None) -> Evaluation:
        """What a model answers on the test images."""
        return evaluate(
            module,
            self.images.test,
            self.images.task,
            self.model.preprocessing,
            reference=reference,
        )

    def known(self, name: str) -> dict[str, Any]:
        """What the steps before have found of a model, as fields of its point."""
        told, path = self.run.path, f"{name}.json"
        if (told / "evaluations" / path).exists():
            row = Facts.load(told / "evaluations" / path).content["fills"].get("linear", {})
        elif (told / "repaired" / path).exists():
            row = Facts.load(told / "repaired" / path).content["before"]
        else:
            return {}
        wanted = ("accuracy_coarse", "accuracy_fine", "kl")
        return {key: row[key] for key in wanted if key in row}

    def row(self, module: nn.Module, dense: Evaluation, *, paired: bool = False) -> dict[str, Any]:
        """How good a model is, beside the dense one."""
        found = self.evaluate(module, dense)
        change = compare("it", found, DENSE, dense)
        # One group for nearly every image: the task is no longer done, whatever the accuracy.
        answers = np.array(found.confusion).sum(axis=0)
        told = {
            "accuracy_coarse": found.accuracy_coarse,
            "accuracy_fine": found.accuracy_fine,
            "change": [change.difference, change.low, change.high],
            "kl": found.kl,
            "commonest_answer": int(answers.max()) / found.images,
        }
        # A bit per test image, for paired intervals.
        bits = {"correct": np.packbits(found.correct_coarse).tobytes().hex()}
        return told | bits if paired else told


def main() -> None:
    """Do the steps, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", help="The Tiny ImageNet archive or folder.")
    parser.add_argument("--out", type=Path, help="Run directory.")
    parser.add_argument("--quick", action="store_true", help="The smaller version.")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument(
        "--only", nargs="+", help="Search, repair, train anew or time only these, by name."
    )
    arguments = parser.parse_args()
    out = arguments.out or Path("runs/animals-quick" if arguments.quick else "runs/animals")
    page = out / "page" if arguments.quick else PAGE
    if set(arguments.steps) != {"page"}:
        bed = make_bed(arguments.source, out, QUICK if arguments.quick else FULL)
        page.mkdir(parents=True, exist_ok=True)
        if "search" in arguments.steps:
            for search in bed.extent.searches:
                if arguments.only is None or search.name in arguments.only:
                    bed.search(search, search.taus)
        if "evaluate" in arguments.steps:
            evaluate_circuits(bed, page)
        if "repair" in arguments.steps:
            repair_all(bed, page, arguments.only)
        if "retrain" in arguments.steps:
            retrain_all(bed, page, arguments.only)
        if "time" in arguments.steps:
            time_all(bed, page, arguments.only)
    if "page" in arguments.steps:
        write_page(page)


def make_bed(source: str | None, out: Path, extent: Extent) -> Bed:
    """The shipped model, its images, and the run directory."""
    model = vitcut.load_model("animals")
    images = vitcut.load_images(source, task="animals", model=model)
    model = model.for_task(images.task, images.labels)
    run = Run(out)
    run.claim({"benchmark": "animals", "weights": model.weight_hash, "images": images.fingerprint})
    settings = CutSettings(images=512)
    fitter = make_fitter(model, images, settings)
    return Bed(model=model, images=images, run=run, fitter=fitter, settings=settings, extent=extent)


def first_blocks(model: Model, count: int) -> Circuit:
    """The first blocks alone: nothing after them is kept."""
    graph = model.weights.graph
    heads = np.zeros((graph.num_layers, graph.num_heads, 1), dtype=np.bool_)
    neurons = np.zeros((graph.num_layers, 1, model.weights.num_neurons), dtype=np.bool_)
    heads[:count] = neurons[:count] = True
    return Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation="mean")


def evaluate_circuits(bed: Bed, page: Path) -> None:
    """Every circuit under every fill of its search."""
    dense = bed.evaluate(bed.model.module)
    rows: list[dict[str, Any]] = []

    def made(name: str, search: Search, circuit: Circuit) -> Facts:
        known, cut = circuit.provenance, bed.compiled(name, circuit, "mean")
        point, fills = cut.point(), dict[str, Any]()
        for fill in search.fills:
            # A circuit that sees nothing has constant answers, which no fill changes.
            if fill == "mean" or cut.model.plan.readout:
                fills[fill] = bed.row(bed.compiled(name, circuit, fill).model, dense)
        kept = ("edges_total", "edges_kept", "heads_total", "heads_kept", "macs", "max_abs_diff")
        searched = ("pairs", "seconds", "node_evaluations", "oracle_calls", "kl")
        return Facts(
            content={
                "name": name,
                "search": search.name,
                "tau": circuit.tau,
                "images": search.settings.images,
                **{key: getattr(point, key) for key in kept},
                "searched": {key: known[key] for key in searched},
                "fills": fills,
            }
        )

    for name, given in bed.circuits.items():
        place = f"evaluations/{name}.json"
        found = bed.run.once(place, lambda name=name, given=given: made(name, *given), Facts.load)
        rows.append(found.content)
    content = {
        "machine": describe_machine(),
        "dense": {**bed.row(bed.model.module, dense), "macs": dense_point(bed.model).macs},
        "largest_group": max(sum(row) for row in dense.confusion) / dense.images,
        "images": dense.images,
        "circuits": rows,
    }
    write(page / "circuits.json", content)


def write(path: Path, content: dict[str, Any]) -> None:
    """A raw file of the page."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def is_finished(folder: Path) -> bool:
    """Whether a training has ended."""
    try:
        read_training(folder)
    except ArtefactError:
        return False
    return True


def repair_all(bed: Bed, page: Path, only: list[str] | None) -> None:
    """Six epochs of distillation for each model; the raw file holds all that are finished."""
    dense = bed.evaluate(bed.model.module)
    for asked in bed.extent.repaired:
        if only is None or asked in only:
            repair_one(bed, asked, dense)
            rows = [
                repair_one(bed, name, dense).content
                for name in bed.extent.repaired
                if (bed.run.path / "repaired" / f"{name}.json").exists()
            ]
            write(page / "repairs.json", {"epochs": bed.extent.epochs, "repaired": rows})


def repair_one(bed: Bed, name: str, dense: Evaluation) -> Facts:
    """One model before and after its repair, or what is known of it already."""
    folder = bed.run.path / "repaired" / name
    settings = FinetuneSettings(epochs=bed.extent.epochs).for_width(bed.model.weights.width)

    def make() -> Facts:
        if name == DENSE:
            module: nn.Module = deepcopy(bed.model.module)
            known = {"macs": dense_point(bed.model).macs, "before": bed.row(module, dense)}
            taken = bed.model.preprocessing
            say("repairing the dense model")
            repair(module, bed.model.module, bed.images, settings, folder, preprocessing=taken)
        else:
            cut = bed.cut(name)
            known = {"macs": cut.point().macs, "before": bed.row(cut.model, dense)}
            module = vitcut.finetune(
                cut,
                bed.model,
                bed.images,
                settings=settings,
                repair_dense=False,
                bench=None,
                out=folder,
            ).cut.model
        seconds = read_training(folder)[1].seconds
        return Facts(
            content={
                "name": name,
                **known,
                "after": bed.row(module, dense, paired=True),
                "seconds": seconds,
            }
        )

    return bed.run.once(f"repaired/{name}.json", make, Facts.load)


def retrain_all(bed: Bed, page: Path, only: list[str] | None) -> None:
    """New weights for each architecture; the raw file holds all that are finished."""
    dense = bed.evaluate(bed.model.module)
    for asked, seed in bed.extent.retrained:
        if only is None or asked in only:
            retrain_one(bed, asked, seed, dense)
            rows = [
                retrain_one(bed, *job, dense).content
                for job in bed.extent.retrained
                if (bed.run.path / "retrained" / "{}-seed-{}.json".format(*job)).exists()
            ]
            write(page / "retrained.json", {"epochs": TrainSettings().epochs, "retrained": rows})


def retrain_one(bed: Bed, name: str, seed: int, dense: Evaluation) -> Facts:
    """A cut architecture with new weights, trained on the fine classes as the dense model was."""
    place = f"retrained/{name}-seed-{seed}"

    def make() -> Facts:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if name.startswith("plain-as-"):
                module, macs = plain_vit(bed, bed.macs_fraction(name.removeprefix("plain-as-")))
            else:
                cut = bed.cut(name)
                module, macs = CompactViT(cut.model.plan, cut.model.info), cut.point().macs
        say(f"training {name} anew, seed {seed}")
        result = train(
            module,
            bed.images,
            TrainSettings(seed=seed),
            bed.run.path / place,
            preprocessing=bed.model.preprocessing,
        )
        found = {"name": name, "seed": seed, "macs": macs, "seconds": result.seconds}
        return Facts(content={**found, **bed.row(module, dense, paired=True)})

    return bed.run.once(f"{place}.json", make, Facts.load)


def plain_vit(bed: Bed, fraction: float) -> tuple[nn.Module, int]:
    """The plain ViT whose MACs come nearest to a fraction of the dense model's."""
    classes, size = len(bed.images.task.classes), bed.images.preprocessing.image_size
    wanted = fraction * dense_macs(bed.model.weights.shape)
    found: list[tuple[float, int, nn.Module]] = []
    for width in range(8, 65, 8):
        for depth in range(2, 7):
            module = build_reference(
                VitSettings(width=width, depth=depth), num_classes=classes, image_size=size
            )
            macs = dense_macs(read_model(module).shape)
            # Of equally near ones the deepest, which is the most like the dense model.
            found.append((abs(macs / wanted - 1) - 0.001 * depth, macs, module))
    _, macs, module = min(found, key=lambda item: item[0])
    return module, macs


def time_all(bed: Bed, page: Path, only: list[str] | None) -> None:
    """Latencies of the circuits of the main sweeps and of what they are compared with, in turn."""
    baseline, module = class_only(bed.model, bed.images, CutSettings())
    found = bed.evaluate(bed.model.module)
    points = {DENSE: add_accuracy(dense_point(bed.model), found)}
    points[CLASS_ONLY] = add_accuracy(baseline, replace(found, kl=0.0))
    modules: dict[str, nn.Module] = {DENSE: bed.model.module, CLASS_ONLY: module}
    names = [
        f"{search.name}-{tau:g}"
        for search in bed.extent.searches
        if search.fills == FILLS
        for tau in search.taus
    ]
    for name in only or dict.fromkeys((*names, *bed.extent.repaired)):
        made = f"rivals/{name}/model" if "-as-" in name else f"points/{name}/linear"
        if not (bed.run.path / made).exists():
            say(f"{name} is not there yet: not timed")
            continue
        cut = bed.cut(name)
        # A circuit that sees nothing of the image has nothing to compute.
        if cut.model.plan.readout and cut.model.plan.embeds:
            points[name] = replace(cut.point(), name=name, **bed.known(name))
            modules[name] = cut.model
    torch.set_num_threads(1)
    settings = BenchSettings(seconds=bed.extent.seconds)
    report = measure_latency(
        modules,
        normalise(bed.images.test.read(np.arange(64)), bed.model.preprocessing),
        settings,
        baselines=(DENSE, CLASS_ONLY),
    )
    timed = {name: replace(point, latency=report.latencies[name]) for name, point in points.items()}
    dense = timed.pop(DENSE)
    Results(
        task=bed.images.task.name,
        machine=describe_machine(),
        dense=dense,
        points=tuple(timed.values()),
        comparisons=report.comparisons,
    ).save(page / "results.json")


if __name__ == "__main__":
    main()
