"""The verbs of vitcut as Python functions; the command line calls them and prints their results.

Settings are dataclasses of checked values. Whatever a verb writes goes into ``out``, a run
directory: called again after a kill, with the same arguments, it goes on from what is there. Stages
are imported when a verb runs, so that reading signatures loads no torch.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from vitcut.benchmark.settings import BenchSettings
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, ConfigError, TaskError
from vitcut.images.settings import DataSettings
from vitcut.model.settings import VitSettings
from vitcut.names import SHIPPED_MODEL
from vitcut.progress import say
from vitcut.recipes import RunSettings, read_recipe
from vitcut.runs import (
    CIRCUIT_FILE,
    CONFIG_FILE,
    REPAIR_FILE,
    RESULTS_FILE,
    Run,
    find_circuit,
    find_cut,
    find_run,
    read_settings,
)
from vitcut.selection.settings import Budget
from vitcut.settings import as_plain
from vitcut.task import Task, all_classes_task, load_task, parse_task
from vitcut.training.settings import FinetuneSettings, TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from vitcut.benchmark.evaluation import Evaluation
    from vitcut.circuit import Circuit
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.calibrate import Calibration
    from vitcut.compiler.cost import CostModel
    from vitcut.compiler.cut import Cut
    from vitcut.images.load import Images
    from vitcut.images.prepare import PreparedData
    from vitcut.masked.fitting import Fitter
    from vitcut.model.model import Model
    from vitcut.preprocessing import Preprocessing
    from vitcut.results import Point, Results
    from vitcut.training.repair import Repaired

T = TypeVar("T")

_OWN = "."
"""A run's model that lies in the run directory itself, wherever that is moved."""


def load_model(
    model: "str | Path | nn.Module",
    *,
    arch: str | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
) -> "Model":
    """Load a dense model, read its weights, and check that they reproduce its logits.

    Args:
        model: "animals" (the shipped model), a run directory (the model that it trained or is
            about), a folder of timm or transformers, "timm:NAME", "hf-hub:REPOSITORY", or a file
            of bare weights (.safetensors, .pth). In Python also a ViT of timm, torchvision,
            transformers or a class with an adapter, which is copied, not changed.
        arch: Architecture of a file of bare weights: timm's name, or "torchvision:NAME".
        mean: On the scale 0 to 1: what pixels are shifted by, one number or one per channel
            (0.485,0.456,0.406). Needed with a module, possible with bare weights, refused with all
            else.
        std: What pixels are divided by afterwards; likewise.
        random_weights: Build "timm:NAME" with random weights, without network.
        image_size: Height and width, in pixels, of the images that "timm:NAME" is built for; its
            position embeddings are resized. None is the size of its weights.

    Raises:
        ModelError: There is no such model, it is damaged, or its weights are not finite.
        UnsupportedModelError: The model has a feature that is not understood.
        ConfigError: Something is given that is for another kind of model, or is out of range.
        ArtefactError: The run directory is damaged, or of another version.
    """
    from vitcut.model.load import load
    from vitcut.preprocessing import numbers

    given: dict[str, Any] = {
        "arch": arch,
        "mean": numbers("mean", mean),
        "std": numbers("std", std),
        "random_weights": random_weights,
        "image_size": image_size,
    }
    typed = {
        name: value for name, value in given.items() if value is not None and value is not False
    }
    run, path = None, None
    if isinstance(model, (str, Path)):
        path = Path(model)
        if str(model) != SHIPPED_MODEL and (path / CONFIG_FILE).is_file():
            run = path
            stored = dict(read_settings(path).get("model") or {})
            stored.pop("weight_hash", None)
            model = stored.pop("model", _OWN)
            given |= {**stored, **typed}
            typed = {**stored, **typed}
            if model == _OWN:
                model = path / "dense"
        # A path is kept absolute: a run directory is read from other places too.
        if str(model) != SHIPPED_MODEL and Path(str(model)).exists():
            model = str(Path(str(model)).resolve())
    loaded = load(model, **given)
    for name in {"mean", "std"} & typed.keys():
        typed[name] = list(getattr(loaded.preprocessing, name))
    origin = {"model": str(model), **typed} if path is not None else None
    if run is not None:
        return replace(loaded, name=str(path), origin=origin, run=run)
    return replace(loaded, name=loaded.name if path is None else str(path), origin=origin)


def load_images(
    source: str | Path | None = None,
    *,
    task: "str | Path | Task | None" = None,
    model: "Model | None" = None,
    image_size: int | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    skip_bad_images: bool = False,
) -> "Images":
    """Prepare the images of a task; they are decoded once and kept in the cache.

    Args:
        source: A Tiny ImageNet .zip or folder, a folder or .zip of class folders, a .parquet file,
            a Hugging Face dataset id, or "drawn" (pictures drawn on the spot). None takes those of
            the run directory that the model was loaded from, else downloads Tiny ImageNet.
        task: A shipped task's name ("animals", "drawn"), a label file, or a `Task`. None takes the
            run directory's, else the one called like the model or source, else every class is its
            own group.
        model: Prepare images as this model takes them, its size, colours, crop and interpolation;
            positions and names in the label file are then of its classes, else of the data's.
        image_size: Height and width, in pixels; None is the model's, or 64 without a model.
        mean: Of a model to be trained: on the scale 0 to 1, what pixels are shifted by, one number
            or one per channel; None is ImageNet's.
        std: What pixels are divided by afterwards; likewise.
        seed: Of the splits that the data lacks, and of drawn pictures.
        val_fraction: Part of each class's training images that is set aside for choosing.
        skip_bad_images: Leave out images that do not decode, instead of stopping.

    Raises:
        DataError: The source cannot be used, or a class has too few images to be split.
        TaskError: There is no such task, or it does not fit the data or the model.
        ConfigError: A setting is out of range, or not the model's.
    """
    from vitcut.images.load import split
    from vitcut.images.prepare import prepare as prepare_images
    from vitcut.model.classes import find_labels
    from vitcut.model.model import Model
    from vitcut.preprocessing import Preprocessing, numbers

    size = None if model is None else _require(model, Model).preprocessing.image_size
    if None not in {size, image_size} and size != image_size:
        raise ConfigError(
            f"the model takes images of {size} pixels, got image_size={image_size}: leave it out"
        )
    settings = DataSettings(
        source=None if source is None else str(source),
        image_size=size or image_size or 64,
        seed=seed,
        val_fraction=val_fraction,
        skip_bad_images=skip_bad_images,
    )
    if model is not None and model.run is not None:
        # What is not said is the run's, but for the image size, which is the model's.
        stored: Any = read_settings(model.run).get("images")
        try:
            own = parse_task(json.dumps(stored.pop("task")), origin=str(model.run))
            del stored["fingerprint"]
            stored["image_size"] = settings.image_size
            base = DataSettings(**stored)
        except (KeyError, TypeError, AttributeError, TaskError, ConfigError) as error:
            raise ArtefactError(
                f"{model.run / CONFIG_FILE} is damaged: {error!r}; run its command again in a new "
                "directory"
            ) from None
        task = own if task is None else task
        skip = base.skip_bad_images or skip_bad_images
        source = base.source if source is None else str(source)
        settings = replace(base, source=source, skip_bad_images=skip)
    if task is None:
        named = [settings.source, None if model is None else model.name]
        task = next((name for name in named if name in {SHIPPED_MODEL, "drawn"}), None)
    if model is None:
        given = {"mean": numbers("mean", mean), "std": numbers("std", std)}
        known: Any = {name: value for name, value in given.items() if value is not None}
        preprocessing = Preprocessing(image_size=settings.image_size, **known)
    else:
        preprocessing = model.preprocessing
    # A label file is read before images are fetched or decoded.
    wanted = task if isinstance(task, Task) or task is None else load_task(task)
    prepared = prepare_images(settings, preprocessing.framing)
    labels = prepared.labels
    wanted = wanted or all_classes_task(labels)
    if model is not None:
        classes = model.weights.num_classes
        labels, _ = find_labels(model.labels, model.name, classes, prepared.labels, wanted)
    return split(prepared, settings, wanted.among(labels), preprocessing)


def discover(
    model: "Model",
    images: "Images",
    *,
    settings: DiscoverSettings = DiscoverSettings(),
    out: str | Path | None = None,
) -> "Circuit":
    """Find the circuit of a task in a model with ACDC.

    Args:
        model: From `load_model`.
        images: From `load_images`; calibration images are drawn from their train split.
        settings: The search.
        out: Run directory; the circuit goes to ``points/NAME/circuit.json`` in it. One directory
            may hold circuits of several tau and ablations.

    Raises:
        ConfigError: Fewer training images than asked for, or too little memory allowed.
        TaskError: The model's classes are not the task's.
        ArtefactError: ``out`` holds something else.
    """
    run, model = Run(out), _for_images(model, images)
    images.calibration(settings.images, seed=settings.seed)
    chosen = {"discover": as_plain(settings)}
    run.claim({**_subject(model, images), **chosen}, free=("discover.tau", "discover.ablation"))
    [(_, circuit)] = _circuits(model, images, settings, [settings.tau], run)
    return circuit


def _circuits(
    model: "Model", images: "Images", settings: DiscoverSettings, taus: Sequence[float], run: Run
) -> "Iterator[tuple[str, Circuit]]":
    """The name and circuit of the point at each tau, all from the same cached activations."""
    import torch

    from vitcut.circuit import Circuit
    from vitcut.discovery.search import Discovery, make_examples
    from vitcut.images.load import normalise

    discovery: Discovery | None = None
    for tau in taus:
        name = f"{settings.method}-{settings.ablation}-{tau:g}"
        folder = Path("points") / name

        def find(tau: float = tau, folder: Path = folder) -> Circuit:
            nonlocal discovery
            if discovery is None:
                chosen = images.calibration(settings.images, seed=settings.seed)
                groups = images.task.group_of_class
                pixels = normalise(chosen.all(), model.preprocessing)
                examples = make_examples(
                    pixels, groups[chosen.labels], torch.from_numpy(groups), settings
                )
                discovery = Discovery(model.weights, examples, settings)
            log = None if run.is_temporary else run.path / folder / "decisions.jsonl"
            found = discovery.find(tau, log=log)
            return Circuit(
                graph=discovery.oracle.graph,
                kept=found.kept,
                ablation=settings.ablation,
                method=settings.method,
                task=images.task.name,
                tau=tau,
                provenance={
                    "model": model.name,
                    "weight_hash": model.weight_hash,
                    "images_fingerprint": images.fingerprint,
                    "settings": as_plain(replace(settings, tau=tau)),
                    "kl": found.kl,
                    "pairs": discovery.num_pairs,
                    "node_evaluations": found.node_evaluations,
                    "oracle_calls": found.oracle_calls,
                    "precision": found.precision,
                    "seconds": None if found.seconds is None else round(found.seconds, 2),
                },
            )

        circuit = run.once(str(folder / CIRCUIT_FILE), find, Circuit.load)
        if circuit.tau != tau:
            raise ConfigError(
                f"{run.path / folder} holds a circuit of tau {circuit.tau!r}, not {tau!r}, which "
                "has the same name: choose another --out"
            )
        yield name, circuit


_GIVEN_BY = {
    "Model": ("what vitcut.load_model gives", "vitcut.load_model(...)"),
    "Images": (
        "what vitcut.load_images gives",
        "vitcut.load_images(source, task=..., model=model)",
    ),
    "Circuit": ("what vitcut.discover gives", "vitcut.Circuit.load(path)"),
    "Cut": ("what vitcut.cut gives", "vitcut.CompactViT.from_pretrained(folder)"),
}
"""What each kind of argument is called, and what gives one."""


def _require(value: Any, kind: type[T]) -> T:
    """Refuse an argument of another kind, and say what gives the right one."""
    if isinstance(value, kind):
        return value
    expected, remedy = _GIVEN_BY[kind.__name__]
    if type(value).__name__ == "Cut":
        remedy = f"give its {'circuit' if kind.__name__ == 'Circuit' else 'model'}"
    elif kind.__name__ == "Model" and hasattr(value, "state_dict"):
        remedy = "vitcut.load_model(module, mean=..., std=...)"
    raise ConfigError(f"expected {expected}, got {type(value).__name__}: {remedy}")


def _for_images(model: "Model", images: "Images") -> "Model":
    """The model whose logits are the fine classes of the images' task, in their order."""
    from vitcut.images.load import Images
    from vitcut.model.model import Model

    _require(model, Model)
    _require_made_for(model.preprocessing, _require(images, Images))
    return model.for_task(images.task, images.labels)


def _require_made_for(wanted: "Preprocessing", images: "Images") -> None:
    """Check that images were made as a model takes them; mean and std are applied later."""
    made = images.preprocessing
    if wanted.image_size != made.image_size:
        raise ConfigError(
            f"the model takes images of {wanted.image_size} pixels, got {made.image_size}: give "
            f"load_images model=..., or image_size={wanted.image_size}"
        )
    for name, own in vars(wanted.framing).items():
        got = getattr(made.framing, name)
        if own != got:
            raise ConfigError(
                f"the model takes images with {name} {own}, got {got}: give load_images model=..."
            )


def _subject(model: "Model", images: "Images") -> dict[str, Any]:
    """What a run directory notes of the model and images that it is about."""
    origin = dict(model.origin or {"model": model.name})
    return {
        "model": {**origin, "weight_hash": model.weight_hash},
        "images": _plain_images(images),
    }


def _plain_images(images: "Images") -> dict[str, Any]:
    return {**images.origin, "fingerprint": images.fingerprint}


def _costs(settings: CutSettings) -> "CostModel":
    """The costs that plans are chosen by: those of a file, or the shipped ones."""
    from vitcut.compiler.cost import CostModel

    if settings.costs is None:
        return CostModel(batch=settings.batch)
    return replace(CostModel.load(Path(settings.costs)), batch=settings.batch)


def _fitter(model: "Model", images: "Images", settings: CutSettings) -> "Fitter":
    """What fits fills, on the calibration images of a cut; they are read when one is needed."""
    from vitcut.images.load import normalise
    from vitcut.masked.fitting import Fitter

    count = min(settings.images, len(images.train))
    chosen = images.calibration(count, seed=settings.seed)
    return Fitter(
        model.weights,
        lambda: normalise(chosen.all(), model.preprocessing),
        ridge=settings.ridge,
        memory_gib=settings.memory_gib,
    )


def cut(
    model: "Model",
    images: "Images",
    circuit: "Circuit | str | Path | None" = None,
    *,
    point: str | None = None,
    budget: Budget = Budget(),
    settings: CutSettings = CutSettings(),
    bench: BenchSettings | None = BenchSettings(),
    out: str | Path | None = None,
) -> "Cut":
    """Cut a model to a budget, or to a circuit that was found, and measure it.

    The compact model is compared with the masked model that it must equal, and measured beside the
    dense model.

    Args:
        model: From `load_model`; for a circuit the one that it was found in.
        images: From `load_images`; fills are fitted to training images.
        circuit: A circuit, a circuit.json, or a run directory with circuits; its ablation is the
            compact model's too, unless ``settings`` say otherwise or it is resample (then mean).
            None: one is searched within the budget.
        point: Which circuit of a run directory.
        budget: How small or fast, and how the parts are chosen.
        settings: The ablation of the cut (linear for a budget unless they say so), and on how many
            images it is fitted and checked.
        bench: The timing; None measures nothing.
        out: Run directory: the model in ``model/``, the circuits on the way to a budget in
            ``path/``, ``results.json``.

    Returns:
        The compact model, its circuit, by how much its logits differ from the masked model's, and
        what was measured.

    Raises:
        ConfigError: There is not either a circuit or a budget, or a budget is to be merged.
        CircuitError: The circuit is of another model, or the budget cannot be met.
        ExactnessError: The compact model does not compute the masked one.
        ArtefactError: ``out`` holds something else.
    """
    from vitcut.benchmark.points import measure
    from vitcut.circuit import Circuit
    from vitcut.compiler.cut import Cut, class_only, cut_circuit
    from vitcut.report.cards import save_results
    from vitcut.results import CLASS_ONLY, Results
    from vitcut.selection.search import search

    run, model = Run(out), _for_images(model, images)
    if isinstance(circuit, (str, Path)):
        circuit = Circuit.load(find_circuit(Path(circuit), point))
    check_cut({"circuit": circuit, "budget": budget, "settings": settings, "model": model})
    found_under = None if circuit is None else _require(circuit, Circuit).ablation
    settings = replace(settings, ablation=settings.ablation_for(found_under))
    costs = _costs(settings)
    chosen: dict[str, Any] = {
        "cut": as_plain(replace(settings, costs=None)),
        "costs": costs.fingerprint,
    }
    if circuit is None:
        chosen["select"] = as_plain(budget)
    else:
        chosen["circuit"] = circuit.fingerprint
    if bench is not None:
        chosen["bench"] = as_plain(bench)
    run.claim({**_subject(model, images), **chosen})
    fitter = _fitter(model, images, settings)

    def make() -> Cut:
        sought = circuit
        if sought is None:
            threads = 1 if bench is None else bench.threads
            sought = search(model, images, budget, settings, fitter, costs, run, threads=threads)
        name, asked = _budget_point(budget, settings, sought)
        return cut_circuit(
            model, images, sought, settings, fitter=fitter, costs=costs, name=name, budget=asked
        )

    done = replace(run.once("model", make, Cut.load), folder=run.path / "model")
    if bench is None:
        return done

    def measured() -> Results:
        baseline = class_only(model, images, fitter=fitter, costs=costs)
        points = {CLASS_ONLY: baseline, done.name: (done.point(run.path), done.model)}
        return save_results(measure(model, images, points, bench), run.path)

    return replace(done, results=run.once(RESULTS_FILE, measured, Results.load))


def check_cut(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `cut` that cannot be met, before images are decoded.

    Args:
        given: Its circuit, budget and settings; with its model, whether the budget can be met.

    Raises:
        ConfigError: There is not either a circuit or a budget, or a budget is to be merged.
        CircuitError: The budget cannot be met.
    """
    circuit, budget, settings = given["circuit"], given["budget"], given["settings"]
    if circuit is None and not budget.is_given:
        raise ConfigError(
            "cut needs a circuit (a run directory or circuit.json; in Python what vitcut.discover "
            "gives), or a budget: target-macs 0.2 or target-latency 0.25"
        )
    if circuit is not None and budget.is_given:
        raise ConfigError("cut takes a circuit or a budget, got both: leave one of them out")
    if budget.is_given and settings.merge:
        raise ConfigError(
            "merge brings edges back to a circuit that is there, got a budget: cut to the budget "
            "first, then cut its circuit with merge"
        )
    if budget.is_given and "model" in given:
        from vitcut.model.model import Model
        from vitcut.selection.search import require_possible

        require_possible(_require(given["model"], Model).weights, budget, _costs(settings))


def check_finetune(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `finetune` that contradict each other.

    Raises:
        ConfigError: A repaired dense model is given and none is wanted.
    """
    taken = given["repaired_dense"]
    if taken is not None and not given["repair_dense"]:
        raise ConfigError(
            f"repaired_dense is {str(taken)!r} and repair_dense is false: leave one of them out"
        )


def _budget_point(
    budget: Budget, settings: CutSettings, circuit: "Circuit"
) -> tuple[str | None, dict[str, Any] | None]:
    """The name of a budget's point, and what was asked for."""
    if not budget.is_given:
        return None, None
    if budget.target_macs is not None:
        asked: dict[str, Any] = {"macs": budget.target_macs}
    else:
        asked = {"latency": budget.target_latency, "runtime": budget.runtime}
        asked["batch"] = settings.batch
    kind, target = next(iter(asked.items()))
    return f"{budget.scores}-{circuit.ablation}-{kind}-{target:g}", asked


def finetune(
    cut: "Cut | CompactViT | str | Path",
    model: "Model",
    images: "Images",
    *,
    point: str | None = None,
    settings: FinetuneSettings = FinetuneSettings(),
    repair_dense: bool = True,
    repaired_dense: str | Path | None = None,
    bench: BenchSettings | None = BenchSettings(),
    out: str | Path | None = None,
) -> "Repaired":
    """Repair a cut model: a few epochs of distillation, measured beside the dense one.

    Args:
        cut: From `cut`, ``CompactViT.from_pretrained``, or the path of a run or model directory;
            it is not changed.
        model: The model that it was cut from, and its teacher.
        images: Of the task.
        point: Which cut of a run directory.
        settings: The training.
        repair_dense: Give the dense model the same repair, to compare with.
        repaired_dense: Take the repaired dense model of an earlier run directory of finetune.
        bench: The timing; None measures nothing.
        out: Run directory: checkpoints, the model in ``model/``, ``results.json``.

    Returns:
        The repaired compact model, what the trainings came to, and what was measured.

    Raises:
        ModelError: The model was cut from another one, or sees nothing of the image; the dense
            model is to be repaired and cannot be saved.
        TaskError: It is of another task.
        ConfigError: Both ``repaired_dense`` and no repair of the dense model are asked for.
        ArtefactError: ``out`` holds something else; the repaired dense model that was given is
            not there, or of other settings.
    """
    from vitcut.benchmark.points import dense_point, evaluate_points, measure
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut, class_only
    from vitcut.model.model import Model, weight_hash
    from vitcut.model.saving import require_savable
    from vitcut.report.cards import dense_repaired_card, repaired_card
    from vitcut.results import CLASS_ONLY, DENSE_REPAIRED, Results
    from vitcut.store import write_text
    from vitcut.training.repair import (
        Repair,
        Repaired,
        compare_pairs,
        find_repair,
        repair,
        repair_cut,
        require_cut_of,
        require_sight,
    )  # fmt: skip

    check_finetune({"repaired_dense": repaired_dense, "repair_dense": repair_dense})
    if isinstance(cut, (str, Path)):
        start = Cut.load(find_cut(Path(cut), point))
    else:
        start = Cut(model=cut, circuit=None) if isinstance(cut, CompactViT) else _require(cut, Cut)
    run = Run(out)
    require_sight(start.model)
    model = _for_images(model, images)
    require_cut_of(start.model, model, images)
    taken = None
    if repaired_dense is not None:
        taken = find_repair(Path(repaired_dense), model, images, settings)
    elif repair_dense:
        require_savable(model.module)
    chosen = {
        "start": weight_hash(start.model),
        "finetune": as_plain(settings),
        "repair_dense": repair_dense,
        "repaired_dense": None if taken is None else str(taken[0].resolve()),
        "bench": None if bench is None else as_plain(bench),
    }
    run.claim({**_subject(model, images), **chosen})
    repaired, training = repair_cut(start, model, images, settings, run.path)
    repaired = replace(run.once("model", lambda: repaired, Cut.load), folder=run.path / "model")
    dense, dense_training, folder = None, None, run.path / DENSE_REPAIRED
    if taken is not None:
        folder, dense_training = taken
        dense = Model.load(folder / "dense")
    elif repair_dense:
        say("giving the dense model the same repair")
        module = deepcopy(model.module)
        dense_training = repair(
            module, model.module, images, settings, folder, preprocessing=model.preprocessing
        )
        card = dense_repaired_card(images.task, dense_training, settings)
        kept = replace(model, module=module, card=card)
        dense = run.once(f"{DENSE_REPAIRED}/dense", lambda: kept, Model.load)

    def measured(timing: BenchSettings) -> Results:
        fitter = _fitter(model, images, CutSettings())
        baseline = class_only(model, images, fitter=fitter, costs=_costs(CutSettings()))
        points: dict[str, tuple[Point, nn.Module]] = {CLASS_ONLY: baseline}
        if dense is not None and dense_training is not None:
            point = replace(
                dense_point(model),
                name=DENSE_REPAIRED,
                seconds=round(dense_training.seconds, 2),
                model=run.relative(folder / "dense"),
            )
            points[DENSE_REPAIRED] = point, dense.module
        points |= {item.name: (item.point(run.path), item.model) for item in (start, repaired)}
        found = evaluate_points(model, images, points)
        results = measure(model, images, points, timing, evaluations=found)
        told = Repair(
            training=training,
            dense_training=dense_training,
            paired=compare_pairs(repaired.name, found, seed=timing.seed),
        )
        told.save(run.path / REPAIR_FILE)
        card = repaired_card(results, results.points[-1], training, settings)
        write_text(run.path / "model" / "README.md", card)
        return results

    results = (
        None if bench is None else run.once(RESULTS_FILE, lambda: measured(bench), Results.load)
    )
    told = Repair(training=training, dense_training=dense_training, paired=())
    told = told if results is None else Repair.load(run.path / REPAIR_FILE)
    return Repaired(cut=repaired, dense=dense, repair=told, results=results)


def evaluate(model: "Model | CompactViT | Cut", images: "Images") -> "Evaluation":
    """Measure a dense or compact model on the test images.

    Args:
        model: From `load_model`, `cut` or ``CompactViT.from_pretrained``.
        images: Of the task that the model was made for.

    Raises:
        TaskError: The model's classes are not the task's.
        ConfigError: The images have another size than the model takes.
        ModelError: A logit is NaN or infinite.
    """
    from vitcut.benchmark.evaluation import evaluate as measure_accuracy
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.images.load import Images

    model = model.model if isinstance(model, Cut) else model
    if not isinstance(model, CompactViT):
        model = _for_images(model, images)
        return measure_accuracy(model.module, images.test, images.task, model.preprocessing)
    info, task = model.info, _require(images, Images).task
    # Labels of transformers are texts: a folder's name, or what a person calls the class.
    known = [{item.id, item.name} for item in task.classes]
    same = len(known) == len(info.class_names) and all(
        name in either for name, either in zip(info.class_names, known, strict=True)
    )
    if info.class_names and not same:
        raise TaskError(
            f"the model's classes are not those of task {task.name!r}: use the label file that it "
            "was made for"
        )
    if info.preprocessing is None:
        raise ConfigError(
            "the compact model does not say how its images are made: set model.info to a ModelInfo "
            "with its preprocessing"
        )
    _require_made_for(info.preprocessing, images)
    return measure_accuracy(model, images.test, task, info.preprocessing)


def bench(
    run: str | Path,
    *,
    settings: BenchSettings = BenchSettings(),
    out: str | Path | None = None,
) -> "Results":
    """Measure the models of a run directory again.

    Args:
        run: What `run`, `cut` or `finetune` wrote.
        settings: Runtimes, batch sizes and times.
        out: Run directory for the new ``results.json``.

    Raises:
        ArtefactError: The directory holds no measured run.
    """
    from vitcut.benchmark.points import measure
    from vitcut.compiler.cut import Cut, class_only
    from vitcut.model.model import Model
    from vitcut.results import CLASS_ONLY, DENSE_REPAIRED, Results

    path, target = Path(run), Run(out)
    if not (path / RESULTS_FILE).is_file():
        remedy = "expected the run directory of a finished `vitcut run`, `cut` or `finetune`"
        around = find_run(path)
        if around is not None and (around / RESULTS_FILE).is_file():
            remedy = f"give the run directory that it lies in, {around}"
        elif next(path.glob(f"points/*/{CIRCUIT_FILE}"), None) is not None:
            remedy = f"a circuit is measured when it is cut: vitcut cut {path}"
        raise ArtefactError(f"nothing was measured in {path}: {remedy}")
    earlier = Results.load(path / RESULTS_FILE)
    model = load_model(path)
    images = load_images(model=model)
    model = _for_images(model, images)
    chosen = {"run": str(path.resolve()), "bench": as_plain(settings)}
    target.claim({**_subject(model, images), **chosen})
    fitter, costs = _fitter(model, images, CutSettings()), _costs(CutSettings())
    points: dict[str, tuple[Point, nn.Module]] = {
        CLASS_ONLY: class_only(model, images, fitter=fitter, costs=costs)
    }
    for point in earlier.points:
        if point.model is not None:
            folder = path / point.model
            if point.name == DENSE_REPAIRED:
                module: nn.Module = Model.load(folder).module
            else:
                module = Cut.load(folder).model
            moved = replace(
                point,
                model=target.relative(path / point.model),
                circuit=None if point.circuit is None else target.relative(path / point.circuit),
            )
            points[point.name] = moved, module
    results = measure(model, images, points, settings)
    results.save(target.path / RESULTS_FILE)
    return results


def train(
    images: "Images",
    *,
    vit: VitSettings = VitSettings(),
    settings: TrainSettings = TrainSettings(),
    out: str | Path | None = None,
) -> "Model":
    """Train a small ViT on a task.

    Args:
        images: From `load_images`, without a model.
        vit: The architecture.
        settings: The training.
        out: Run directory: checkpoints, metrics, and the model in ``dense/``.

    Raises:
        ConfigError: The image cannot be cut into whole patches.
        ArtefactError: ``out`` holds something else.
    """
    from vitcut.images.load import Images

    vit.require_whole_patches(_require(images, Images).preprocessing.image_size)
    run = Run(out)
    own = {"vit": as_plain(vit), "train": as_plain(settings)}
    run.claim({"model": {"model": _OWN}, "images": _plain_images(images), **own})
    return _trained(images, vit, settings, run)


def _trained(images: "Images", vit: VitSettings, settings: TrainSettings, run: Run) -> "Model":
    """The dense model of a run directory: trained, or read back."""
    from vitcut.labels import Labels
    from vitcut.model.model import Model
    from vitcut.model.reference import build_reference
    from vitcut.report.cards import dense_card
    from vitcut.training.loop import train as fit

    def make() -> Model:
        module = build_reference(
            vit,
            num_classes=len(images.task.classes),
            image_size=images.preprocessing.image_size,
            seed=settings.seed,
        )
        result = fit(module, images, settings, run.path, preprocessing=images.preprocessing)
        task = images.task
        labels = Labels(owner=task.name, ids=task.class_ids, names=task.class_names)
        made = Model.of(module, str(run.path), images.preprocessing, labels)
        return replace(made, card=dense_card(task, result, settings))

    return run.once("dense", make, Model.load)


def run(
    recipe: "str | Path | RunSettings",
    *,
    changes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> "Results":
    """Train, discover, cut and measure by a recipe.

    Args:
        recipe: A shipped recipe's name, a YAML file, or `RunSettings`.
        changes: Values of the recipe to change, by dotted key: ``{"train.epochs": 2}``.
        out: Run directory; None takes ``runs/NAME``, by the recipe's name.

    Raises:
        VitcutError: Any stage's own error; the directory can be continued once it is mended.
    """
    from vitcut.benchmark.points import measure
    from vitcut.compiler.cut import Cut, class_only, cut_circuit
    from vitcut.model.model import read_model
    from vitcut.model.reference import build_reference
    from vitcut.report.cards import save_results
    from vitcut.results import CLASS_ONLY, Results
    from vitcut.selection.search import require_possible, search
    from vitcut.training.repair import repair_cut

    named = not isinstance(recipe, RunSettings)
    settings = read_recipe(recipe, changes) if named else recipe
    target = Run(Path("runs") / Path(recipe).stem if out is None and named else out)
    vit, data = settings.vit, settings.data
    vit.require_whole_patches(data.image_size)
    images = load_images(task=settings.task, **asdict(data))
    # What cannot be is refused before the directory is claimed and a model is trained.
    images.calibration(settings.discover.images, seed=settings.discover.seed)
    size, classes = data.image_size, len(images.task.classes)
    untrained = read_model(build_reference(vit, num_classes=classes, image_size=size))
    linear = replace(settings.cut, ablation="linear", merge=False)
    costs = _costs(settings.cut)
    if settings.select.is_given:
        require_possible(untrained, settings.select, costs)
    chosen = {
        key: value for key, value in as_plain(settings).items() if key not in {"task", "data"}
    }
    target.claim({"model": {"model": _OWN}, "images": _plain_images(images), **chosen})
    model = _for_images(_trained(images, vit, settings.train, target), images)
    cuts: list[Cut] = []

    def keep(folder: Path, make: Callable[[], Cut]) -> Cut:
        made = target.once(str(folder / "model"), make, Cut.load)
        cuts.append(replace(made, folder=target.path / folder / "model"))
        return cuts[-1]

    fitter = _fitter(model, images, settings.cut)
    for ablation in settings.ablations:
        sought = replace(settings.discover, ablation=ablation)
        for name, circuit in _circuits(model, images, sought, settings.taus, target):
            keep(
                Path("points") / name,
                lambda c=circuit, n=name: cut_circuit(
                    model, images, c, settings.cut, fitter=fitter, costs=costs, name=n
                ),
            )
    if settings.select.is_given:
        fitter = _fitter(model, images, linear)
        threads = settings.bench.threads
        circuit = search(
            model, images, settings.select, linear, fitter, costs, target, threads=threads
        )
        name, asked = _budget_point(settings.select, linear, circuit)
        start = keep(
            Path("points") / str(name),
            lambda: cut_circuit(
                model, images, circuit, linear, fitter=fitter, costs=costs, name=name, budget=asked
            ),
        )
        if settings.repair is not None:
            training = settings.repair
            folder = Path("points") / f"{name}-repaired"
            keep(
                folder, lambda: repair_cut(start, model, images, training, target.path / folder)[0]
            )

    def measured() -> Results:
        points = {CLASS_ONLY: class_only(model, images, fitter=fitter, costs=costs)}
        points |= {item.name: (item.point(target.path), item.model) for item in cuts}
        return save_results(measure(model, images, points, settings.bench), target.path)

    return target.once(RESULTS_FILE, measured, Results.load)


def demo(*, changes: Mapping[str, Any] | None = None, out: str | Path | None = None) -> "Results":
    """Go the whole way in under three minutes, on drawn pictures: no data and no network needed.

    Args:
        changes: Values of the recipe ``demo`` to change, by dotted key.
        out: Run directory; None takes ``runs/demo``.
    """
    return run("demo", changes=changes, out=out)


def prepare(
    source: str | Path | None = None, *, image_size: int = 64, skip_bad_images: bool = False
) -> "PreparedData":
    """Decode a source of images into the cache.

    Args:
        source: As in `load_images`.
        image_size: Height and width, in pixels.
        skip_bad_images: Leave out images that do not decode, instead of stopping.

    Raises:
        DataError: The source cannot be used.
    """
    from vitcut.images.prepare import prepare as prepare_images

    return prepare_images(
        DataSettings(
            source=None if source is None else str(source),
            image_size=image_size,
            skip_bad_images=skip_bad_images,
        )
    )


def suggest(
    source: str | Path | None = None,
    *,
    groups: int = 6,
    out: str | Path = Path("labels.yaml"),
) -> Task:
    """Write a label file: ImageNet's classes in groups, by WordNet. No image is decoded.

    Args:
        source: As in `load_images`.
        groups: How many groups.
        out: The label file to write.

    Raises:
        TaskError: Fewer than two classes of the source are ImageNet-1k's.
        ConfigError: ``out`` is there already, or there cannot be as many groups.
    """
    from vitcut.images.drawn import SOURCE_WORD
    from vitcut.images.sources import open_source
    from vitcut.store import write_text
    from vitcut.suggest import suggest as suggest_task

    path = Path(out)
    if path.exists():
        raise ConfigError(f"{path} is there already: choose another --out, or move it away")
    if source == SOURCE_WORD:
        raise ConfigError(f"{SOURCE_WORD} pictures have a label file: give --task {SOURCE_WORD}")
    with open_source(None if source is None else str(source)) as opened:
        task = suggest_task(sorted(opened.class_names), groups, path.stem)
    text = yaml.safe_dump(task.to_dict(), sort_keys=False, allow_unicode=True)
    write_text(
        path, "# Groups suggested by WordNet 3.0 ancestors: look through them, and edit.\n" + text
    )
    return task


def checks(
    model: "str | Path | Model" = SHIPPED_MODEL,
    *,
    models: int = 18,
    seconds: float = 0.5,
    save: str | Path | None = None,
) -> "Calibration":
    """Describe the machine, and measure what the operations of compact models cost on it.

    Args:
        model: Gives the sizes; its weights do not matter.
        models: How many random compact models to measure.
        seconds: Time for each, for each batch size.
        save: Write the costs to this file, for ``--costs``.

    Raises:
        ConfigError: Fewer than 3 models.
    """
    from vitcut.compiler.calibrate import calibrate

    if models < 3:
        raise ConfigError(f"models must be at least 3, got {models}")
    loaded = load_model(model) if isinstance(model, (str, Path)) else model
    weights = loaded.weights
    found = calibrate(weights.shape, weights.split_graph, models=models, seconds=seconds)
    if save is not None:
        found.costs.save(Path(save))
    return found


def show(path: str | Path, *, plan: bool = False) -> None:
    """Print a circuit, a plan or results as tables.

    Args:
        path: A run or model directory, or a circuit.json.
        plan: Only what the compact model computes, block by block, with predicted times.

    Raises:
        ArtefactError: It holds none of these.
    """
    from vitcut.report.show import show_path, show_plan_of

    (show_plan_of if plan else show_path)(Path(path))
