"""The commands of vitcut as Python functions; the command line calls them and prints the results.

Settings are dataclasses whose values are checked. Everything a function writes goes into ``out``, a
run directory. Called again with the same arguments after being killed, it continues from what is
there. Stages are imported inside the functions, so that reading signatures loads no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.info import preprocessing_of
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, ConfigError
from vitcut.extras import require_extra
from vitcut.inputs import (
    for_images,
    load_cut,
    load_images,
    load_model,
    plain_images,
    require,
    require_classes_of,
    require_made_for,
    subject,
    warn_if_no_better,
)
from vitcut.names import SHIPPED_MODEL
from vitcut.results import CLASS_ONLY, DENSE_REPAIRED, Asked, Point, Results
from vitcut.runs import (
    DIFFERENCE_FILE,
    REPAIR_FILE,
    RESULTS_FILE,
    Run,
    circuits_in,
    find_circuit,
    find_run,
    read_settings,
)
from vitcut.selection.settings import Budget
from vitcut.settings import as_plain, require_here
from vitcut.store import write_text
from vitcut.training.settings import FinetuneSettings

if TYPE_CHECKING:
    from torch import nn

    from vitcut.benchmark.evaluation import Evaluation
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.images.load import Images
    from vitcut.model.model import Model
    from vitcut.preprocessing import Preprocessing
    from vitcut.reports.checks import Checks
    from vitcut.reports.info import Info
    from vitcut.training.repair import Repaired


def discover(
    model: "Model",
    images: "Images",
    *,
    settings: DiscoverSettings = DiscoverSettings(),
    out: str | Path | None = None,
) -> Circuit:
    """Find the circuit of a task in a model with ACDC.

    Args:
        model: From `load_model`.
        images: From `load_images`; calibration images are drawn from their train split.
        settings: How to search.
        out: Run directory; the circuit is saved in it as ``points/NAME/circuit.json``. One
            directory can hold circuits for several values of tau and several ablations.

    Raises:
        ConfigError: There are fewer training images than asked for, or the search needs more
            memory than allowed.
        TaskError: The model's classes are not the task's.
        ArtefactError: ``out`` holds something else.
    """
    run, model = Run(out), for_images(model, images)
    images.calibration(settings.images, seed=settings.seed)
    chosen = {"discover": as_plain(settings)}
    run.claim({**subject(model, images), **chosen}, free=("discover.tau", "discover.ablation"))
    warn_if_no_better(model, images, run)
    from vitcut.discovery.search import find_circuits

    [(_, circuit)] = find_circuits(model, images, settings, [settings.tau], run)
    return circuit


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
    """Cut a model to a budget or to a given circuit, and measure the result.

    The compact model is checked against the masked model, which it must equal, and measured
    alongside the dense model.

    Args:
        model: From `load_model`; with a circuit, the model that it was found in.
        images: From `load_images`; fills are fitted to training images.
        circuit: A circuit, a circuit.json, or a run directory with circuits. The compact model uses
            the circuit's ablation (mean if that is resample), unless the settings say otherwise.
            Leave it out to search for a circuit within a budget.
        point: Which circuit to use, if the run directory has several.
        budget: How small or fast the model must be, and how the parts are chosen.
        settings: The ablation of the cut (linear by default for a budget), and how many images are
            used for fitting and checking.
        bench: How to time the models; None measures nothing.
        out: Run directory: the model is saved in ``model/`` (of several targets, each in
            ``points/NAME/model/``), the circuits on the way to a budget in ``path/``, and all
            measurements in ``results.json``.

    Returns:
        The compact model, its circuit, the largest difference between its logits and the masked
        model's, and the measurements. Of several targets, the smallest model that loses at most
        one point, or else the most accurate (without ``bench``, the smallest); all are in the run
        directory.

    Raises:
        ConfigError: Neither a circuit nor a budget is given, or both are, or merge is combined with
            a budget.
        CircuitError: The circuit belongs to another model, or the budget cannot be met.
        ExactnessError: The compact model does not compute the same as the masked model.
        ArtefactError: ``out`` holds something else.
    """
    from vitcut.benchmark.points import measure
    from vitcut.compiler.cost import CostModel
    from vitcut.compiler.cut import Cut, class_only, cut_circuit, make_fitter, require_cut_from
    from vitcut.reports.cards import origin_of, write_cards
    from vitcut.reports.pictures import evaluate_and_keep
    from vitcut.reports.tables import recommend
    from vitcut.selection.search import leave_images, require_decidable, search

    require_here(bench)
    run, model = Run(out), for_images(model, images)
    require_decidable(budget, images)
    if isinstance(circuit, (str, Path)):
        circuit = Circuit.load(find_circuit(Path(circuit), point))
    check_cut(
        {"circuit": circuit, "budget": budget, "settings": settings, "point": point, "model": model}
    )
    found_under = None if circuit is None else require(circuit, Circuit).ablation
    settings = replace(settings, ablation=settings.ablation_for(found_under))
    if circuit is None:
        settings = leave_images(settings, images, budget)
    costs = CostModel.of(settings)
    chosen: dict[str, Any] = {
        "cut": as_plain(replace(settings, costs=None)),
        "costs": costs.fingerprint,
    }
    if circuit is None:
        chosen["select"] = as_plain(budget)
    else:
        chosen["circuit"] = circuit.fingerprint
    chosen["bench"] = None if bench is None else as_plain(bench)
    run.claim({**subject(model, images), **chosen}, free=run.free_bench())
    if circuit is not None:
        warn_if_no_better(model, images, run)
    fitter = make_fitter(model, images, settings)

    def make(sought: Circuit, name: str | None, asked: Asked | None) -> Cut:
        return cut_circuit(
            model, images, sought, settings, fitter=fitter, costs=costs, name=name, budget=asked
        )

    if circuit is not None:
        wanted = {"model": (circuit, None, None)}
    else:
        threads = 1 if bench is None else bench.threads
        answers = search(model, images, budget, settings, fitter, costs, run, threads=threads)
        single = len(answers) == 1
        wanted = {
            "model" if single else f"points/{item.name}/model": (
                item.circuit,
                item.name,
                item.asked,
            )
            for item in answers
        }
    cuts: list[Cut] = []
    for folder, given in wanted.items():
        made = run.once(folder, lambda given=given: make(*given), Cut.load)
        cuts.append(replace(require_cut_from(made, model), folder=run.kept(folder)))
    if bench is None:
        return cuts[-1]

    def measured() -> Results:
        baseline = class_only(model, images, settings)
        points = {CLASS_ONLY: baseline}
        points |= {item.name: (item.point(run.path), item.model) for item in cuts}
        found = evaluate_and_keep(model, images, points, run.path)
        results = measure(model, images, points, bench, evaluations=found)
        write_cards(results, run.path, cuts[-1].model.info, origin_of(model, images))
        return results

    results = run.once(RESULTS_FILE, measured, Results.load)
    best = recommend(results)
    taken = next((item for item in cuts if best is not None and item.name == best.name), cuts[-1])
    return replace(taken, results=results)


def check_cut(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `cut` that cannot work, before images are decoded.

    Args:
        given: The circuit, point, budget and settings, and the model once it is loaded.

    Raises:
        ConfigError: Neither a circuit nor a budget is given, or both are, or merge is combined with
            a budget.
        CircuitError: The budget cannot be met, or the circuit was found in another model.
        ArtefactError: The file of costs is missing or damaged.
    """
    circuit, budget, settings = given["circuit"], given["budget"], given["settings"]
    if circuit is None and not budget.is_given:
        raise ConfigError(
            "cut needs a circuit (a run directory or circuit.json; in Python what vitcut.discover "
            "gives), or a budget: target-macs 0.2, target-latency 0.25 or max-drop 1"
        )
    if circuit is not None and budget.is_given:
        raise ConfigError("cut takes a circuit or a budget, got both: leave one of them out")
    if budget.is_given and settings.merge:
        raise ConfigError(
            "merge brings edges back to a circuit that is there, got a budget: cut to the budget "
            "first, then cut its circuit with merge"
        )
    if circuit is None and given["point"] is not None:
        raise ConfigError("point chooses among the circuits of a run directory, got a budget")
    from vitcut.compiler.cost import CostModel

    costs = CostModel.of(settings)
    if "model" in given:
        from vitcut.compiler.cut import require_found_in
        from vitcut.model.model import Model
        from vitcut.selection.search import require_possible

        model = require(given["model"], Model)
        if budget.is_given:
            require_possible(model.weights, budget, costs)
        elif isinstance(circuit, Circuit):
            require_found_in(circuit, model)


def check_finetune(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `finetune` that contradict each other.

    Raises:
        ConfigError: A repaired dense model is given, but ``repair_dense`` is false.
    """
    taken = given["repaired_dense"]
    if taken is not None and not given["repair_dense"]:
        raise ConfigError(
            f"repaired_dense is {str(taken)!r} and repair_dense is false: leave one of them out"
        )


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
    """Repair a cut model by a few epochs of distillation, and compare it with the dense model.

    Args:
        cut: A run directory of cut, or a model directory. In Python also the result of `cut` or of
            ``CompactViT.from_pretrained``. It is not changed.
        model: The dense model that it was cut from, which is also the teacher.
        images: The images of the task.
        point: Which cut to repair, if the run directory has several.
        settings: How to train.
        repair_dense: Give the dense model the same repair, for comparison.
        repaired_dense: Reuse the repaired dense model in the run directory of an earlier finetune.
        bench: How to time the models; None measures nothing.
        out: Run directory: checkpoints, the model in ``model/``, and ``results.json``.

    Returns:
        The repaired compact model, the outcome of each training, and the measurements.

    Raises:
        ModelError: The cut model came from another dense model, or sees nothing of the image; or
            the dense model should be repaired but cannot be saved.
        TaskError: The cut model belongs to another task.
        ConfigError: ``repaired_dense`` is given although ``repair_dense`` is false.
        ArtefactError: ``out`` holds something else; or the given repaired dense model is missing,
            or was trained with other settings.
    """
    require_extra("cut", "train", what="a repair")
    from vitcut.benchmark.points import dense_point, measure
    from vitcut.compiler.cut import Cut, class_only, require_cut_from
    from vitcut.model.model import Model, weight_hash
    from vitcut.model.saving import require_savable
    from vitcut.reports.cards import dense_repaired_card, origin_of, repaired_card
    from vitcut.reports.pictures import evaluate_and_keep
    from vitcut.training import repair as repairs
    from vitcut.training.checkpoint import read_training
    from vitcut.training.loop import for_machine

    require_here(settings, bench)
    check_finetune({"repaired_dense": repaired_dense, "repair_dense": repair_dense})
    start = load_cut(cut, point)
    run, model = Run(out), for_images(model, images)
    asked, device = settings, str(model.weights.device)
    # Chosen once, so that the dense model is trained in the same way.
    device = device if asked.device == "auto" else asked.device
    settings = for_machine(replace(asked, device=device).for_width(model.weights.width), run.path)
    repairs.require_cut_of(start.model, model, images)
    taken = None
    if repaired_dense is not None:
        taken = repairs.find_repair(Path(repaired_dense), model, images, settings)
    elif repair_dense:
        require_savable(model.module)
    chosen = {
        "start": weight_hash(start.model),
        "finetune": as_plain(asked),
        "repair_dense": repair_dense,
        "repaired_dense": None if taken is None else str(taken[0].resolve()),
        "bench": None if bench is None else as_plain(bench),
    }
    run.claim({**subject(model, images), **chosen}, free=run.free_bench())
    start = replace(run.once("start", lambda: start, Cut.load), folder=run.kept("start"))
    repaired = run.once(
        "model", lambda: repairs.repair_cut(start, model, images, settings, run.path)[0], Cut.load
    )
    repaired = replace(require_cut_from(repaired, model), folder=run.kept("model"))
    _, training = read_training(run.path)
    dense, dense_training, folder = None, None, run.path / DENSE_REPAIRED
    if taken is not None:
        folder, dense_training = taken
        dense = Model.load(folder / "dense")
    elif repair_dense:

        def make() -> Model:
            made, result = repairs.repair_dense_model(model, images, settings, folder)
            return replace(made, card=dense_repaired_card(images.task, result, settings))

        dense = run.once(f"{folder.name}/dense", make, Model.load)
        _, dense_training = read_training(folder)
    told = repairs.Repair(training=training, dense_training=dense_training, paired=())

    def measured(timing: BenchSettings) -> Results:
        points: dict[str, tuple[Point, nn.Module]] = {
            CLASS_ONLY: class_only(model, images, CutSettings())
        }
        if dense is not None and dense_training is not None:
            point = replace(
                dense_point(model, name=DENSE_REPAIRED),
                seconds=round(dense_training.seconds, 2),
                model=None if run.is_temporary or taken else f"{folder.name}/dense",
            )
            points[DENSE_REPAIRED] = point, dense.module
        points |= {item.name: (item.point(run.path), item.model) for item in (start, repaired)}
        found = evaluate_and_keep(model, images, points, run.path)
        results = measure(model, images, points, timing, evaluations=found)
        paired = repairs.compare_pairs(repaired.name, found, seed=timing.seed)
        replace(told, paired=paired).save(run.path / REPAIR_FILE)
        known = repaired.model.info, origin_of(model, images)
        card = repaired_card(results, *known, result=training, config=settings)
        write_text(run.path / "model" / "README.md", card)
        return results

    results = None
    if bench is not None:
        results = run.once(RESULTS_FILE, lambda: measured(bench), Results.load)
        told = repairs.Repair.load(run.path / REPAIR_FILE)
    return repairs.Repaired(cut=repaired, dense=dense, repair=told, results=results)


def evaluate(
    model: "Model | CompactViT | Cut",
    images: "Images",
    *,
    against: "Model | CompactViT | Cut | Evaluation | None" = None,
    out: str | Path | None = None,
) -> "Evaluation":
    """Measure the accuracy of a dense or cut model on test images.

    Args:
        model: From `load_model`, `cut` or ``CompactViT.from_pretrained``.
        images: The images of the task that the model was made for.
        against: Another model, to compare with image by image; KL is the divergence from it. In
            Python also what evaluate gave for it on the same images.
        out: Run directory for ``results.json``, and ``difference.json`` if models are compared.

    Returns:
        Accuracies and confusion, and the difference to the other model with its interval.

    Raises:
        TaskError: The model's classes are not the task's.
        ConfigError: The images were not prepared as the model needs them, or the other evaluation
            is of other images.
        ModelError: A logit is NaN or infinite.
        ArtefactError: ``out`` holds something else.
    """
    from vitcut.benchmark.evaluation import Evaluation, say_if_no_better
    from vitcut.benchmark.points import dense_point, measure_accuracy
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.images.load import Images
    from vitcut.model.model import weight_hash

    run, asked, earlier = Run(out), {"model": model}, None
    if isinstance(against, Evaluation):
        earlier = against
    elif against is not None:
        asked["against"] = against
    ready: list[tuple[Point, nn.Module, Preprocessing]] = []
    noted: dict[str, Any] = {}
    for role, given in asked.items():
        if isinstance(given, (Cut, CompactViT)):
            cut = Cut(model=given, circuit=None) if isinstance(given, CompactViT) else given
            require_classes_of(cut.model, require(images, Images).task)
            require_made_for(preprocessing_of(cut.model.info), images)
            name = cut.name if cut.folder is None else str(cut.folder)
            point = replace(cut.point(), name=name)
            ready.append((point, cut.model, preprocessing_of(cut.model.info)))
            noted[role] = {"model": name, "weight_hash": weight_hash(cut.model)}
        else:
            dense = for_images(given, images)
            point = dense_point(dense, name=dense.name)
            ready.append((point, dense.module, dense.preprocessing))
            noted[role] = subject(dense, images)["model"]
    if earlier is not None:
        noted["against"] = {"model": earlier.name}
    run.claim({**noted, "images": plain_images(images)})
    first, *others = ready
    results, found = measure_accuracy(images, first, earlier or next(iter(others), None))
    say_if_no_better(found, images.test, images.task, split="test")
    results.save(run.path / RESULTS_FILE)
    if found.difference is not None:
        found.difference.save(run.path / DIFFERENCE_FILE)
    return found


def info(model: "Model | CompactViT | Cut") -> "Info":
    """Tell what a model is, and how small it can be cut, without reading images.

    Args:
        model: From `load_model`, `cut` or ``CompactViT.from_pretrained``.

    Raises:
        ConfigError: It is something else.
    """
    from vitcut.compact.model import CompactViT
    from vitcut.compiler.cut import Cut
    from vitcut.model.model import Model
    from vitcut.reports.info import describe

    return describe(model if isinstance(model, (Cut, CompactViT)) else require(model, Model))


def bench(
    run: str | Path,
    *,
    settings: BenchSettings = BenchSettings(),
    device: str = "cpu",
    out: str | Path | None = None,
) -> Results:
    """Measure the models of a run directory again.

    Args:
        run: Run directory of a finished run, cut or finetune.
        settings: Runtimes, batch sizes and timing.
        device: Where torch computes: cpu, cuda, cuda:N, or auto (cuda if there is one). ONNX
            Runtime and OpenVINO stay on the CPU.
        out: Run directory for the new ``results.json``.

    Raises:
        ArtefactError: The directory holds no results.
    """
    from vitcut.benchmark.points import measure
    from vitcut.compiler.cut import Cut, class_only
    from vitcut.model.model import Model

    path, target = Path(run), Run(out)
    if not (path / RESULTS_FILE).is_file():
        remedy = "expected the run directory of a finished `vitcut run`, `cut` or `finetune`"
        around = find_run(path)
        if around is not None and (around / RESULTS_FILE).is_file():
            remedy = f"give the run directory that it lies in, {around}"
        elif circuits_in(path):
            remedy = f"a circuit is measured when it is cut: vitcut cut {path}"
        raise ArtefactError(f"nothing was measured in {path}: {remedy}")
    earlier = Results.load(path / RESULTS_FILE)
    model = load_model(path, device=device)
    images = load_images(model=model)
    model = for_images(model, images)
    chosen = {"run": str(path.resolve()), "bench": as_plain(settings), "device": device}
    target.claim({**subject(model, images), **chosen})
    points: dict[str, tuple[Point, nn.Module]] = {
        CLASS_ONLY: class_only(model, images, CutSettings())
    }
    # A repaired dense model that was reused lies where its own repair put it.
    reused = read_settings(path).get("repaired_dense")
    for point in earlier.points:
        place = reused if point.name == DENSE_REPAIRED and isinstance(reused, str) else None
        place = f"{place}/dense" if place else point.model
        if place is not None:
            folder = path / place
            if point.name == DENSE_REPAIRED:
                module: nn.Module = Model.load(folder).module
            else:
                module = Cut.load(folder).model
            # They lie in another directory than the new results.
            points[point.name] = replace(point, model=None, circuit=None), module
    if len(points) == 1 and {point.name for point in earlier.points} - points.keys():
        raise ArtefactError(
            f"{path} holds no models, only what was measured of those in another run directory: "
            "give that one"
        )
    results = measure(model, images, points, settings)
    results.save(target.path / RESULTS_FILE)
    return results


def checks(
    model: "str | Path | Model" = SHIPPED_MODEL,
    *,
    models: int = 18,
    seconds: float = 0.5,
    save: str | Path | None = None,
) -> "Checks":
    """Describe the machine and what is installed; with save, measure what operations cost on it.

    Args:
        model: Sets the sizes to measure; its weights do not matter.
        models: How many random compact models to measure.
        seconds: Time spent on each compact model at each batch size.
        save: File to write the costs to, for ``--costs``. Without it, nothing is measured.

    Raises:
        ConfigError: Fewer than 3 models, or a model, models or seconds without a file to save to.
    """
    if models < 3:
        raise ConfigError(f"models must be at least 3, got {models}")
    if save is None and (model, models, seconds) != (SHIPPED_MODEL, 18, 0.5):
        raise ConfigError(
            "model, models and seconds are for measuring: give save too, or leave them out"
        )
    from vitcut.reports.checks import check_machine

    if save is None:
        return check_machine()
    from vitcut.compiler.calibrate import calibrate
    from vitcut.model.model import Model

    loaded = load_model(model) if isinstance(model, (str, Path)) else require(model, Model)
    weights = loaded.weights
    found = calibrate(weights.shape, weights.split_graph, models=models, seconds=seconds)
    found.costs.save(Path(save))
    return check_machine(found)
