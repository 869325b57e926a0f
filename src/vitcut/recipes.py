"""Run a whole recipe (train, discover, cut and measure), or its training alone.

A recipe is a YAML file with one group of settings per stage.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from vitcut.benchmark.settings import BenchSettings
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError, TaskError, one_line
from vitcut.extras import require_extra
from vitcut.hints import argument_error
from vitcut.images.settings import DataSettings
from vitcut.inputs import (
    OWN,
    for_images,
    load_images,
    plain_images,
    require,
    require_made_for,
    subject,
    warn_if_no_better,
)
from vitcut.labels import Labels
from vitcut.model.settings import VitSettings
from vitcut.names import EdgeAblation
from vitcut.progress import say
from vitcut.results import CLASS_ONLY, Results
from vitcut.runs import REPORT_FILE, RESULTS_FILE, Run
from vitcut.selection.settings import Budget
from vitcut.settings import as_plain, require_here, require_positive
from vitcut.store import parse_yaml
from vitcut.training.settings import FinetuneSettings, TrainSettings, TransferSettings

if TYPE_CHECKING:
    from vitcut.circuit import Circuit
    from vitcut.images.load import Images
    from vitcut.masked.fitting import Fitter
    from vitcut.model.model import Model


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Train a ViT, find its circuits at several values of tau, cut to each, and measure all."""

    task: str = "animals"
    """Name of a shipped task, or path to a label file."""
    data: DataSettings = field(default_factory=DataSettings)
    """The images."""
    vit: VitSettings = field(default_factory=VitSettings)
    """The dense model."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """How it is trained."""
    discover: DiscoverSettings = field(default_factory=DiscoverSettings)
    """The search; ``taus`` and ``ablations`` replace its tau and ablation."""
    taus: tuple[float, ...] = (0.01,)
    """ACDC's thresholds in nats; each gives one point."""
    ablations: tuple[EdgeAblation, ...] = ("mean",)
    """What stands in for cut edges during the search; each is searched at every tau."""
    select: Budget = field(default_factory=Budget)
    """A budget for one more point, cut under linear ablation; without a target there is none."""
    repair: FinetuneSettings | None = None
    """How to repair that point; None skips the repair."""
    cut: CutSettings = field(default_factory=CutSettings)
    """How circuits are compiled; merge applies to the points of ``taus``, not to the budget's."""
    bench: BenchSettings = field(default_factory=BenchSettings)
    """How models are timed."""

    def __post_init__(self) -> None:
        if self.repair is not None and not self.select.is_given:
            raise ConfigError("repair needs a budget: give select.target_macs")
        for tau in self.taus:
            require_positive("taus", tau)
        for name, values in (("taus", self.taus), ("ablations", self.ablations)):
            if not values or len(set(values)) < len(values):
                listed = ", ".join(map(str, values)) or "none"
                raise ConfigError(f"{name} must be one or more different ones, got {listed}")


def recipe_names() -> list[str]:
    """Names of the recipes that come with vitcut."""
    folder = resources.files("vitcut") / "assets" / "recipes"
    return sorted(Path(item.name).stem for item in folder.iterdir())


def read_recipe(recipe: str | Path, changes: Mapping[str, Any] | None = None) -> RunSettings:
    """Read a recipe and override some of its values.

    Args:
        recipe: The name of a shipped recipe, or the path to a YAML file.
        changes: Values by dotted key, such as ``{"train.epochs": 2}``; strings are read as YAML.

    Raises:
        ConfigError: There is no such recipe, or a key or value is not one of `RunSettings`.
    """
    path = Path(recipe)
    if path.suffix not in {".yaml", ".yml"}:
        if str(recipe) not in recipe_names():
            raise ConfigError(
                f"no recipe {str(recipe)!r}: expected one of {', '.join(recipe_names())}, or a "
                ".yaml file"
            )
        path = Path(str(resources.files("vitcut"))) / "assets" / "recipes" / f"{recipe}.yaml"
    try:
        content = parse_yaml(path.read_text(encoding="utf-8")) or {}
        for key, value in (changes or {}).items():
            *groups, name = key.split(".")
            place = content
            for group in groups:
                place[group] = place.get(group) or {}
                place = place[group]
            place[name] = parse_yaml(value) if isinstance(value, str) else value
    except FileNotFoundError:
        raise ConfigError(f"no recipe file at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is not a readable recipe: {one_line(error)}") from None
    return settings_from(content, str(path))


def settings_from(content: Any, origin: str) -> RunSettings:
    """Settings from nested values, checked against the types of `RunSettings`.

    Args:
        content: Values by name; a single value may stand for a list of one.
        origin: The file to name in error messages.

    Raises:
        ConfigError: A key is unknown, or a value is of another type or out of range.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} is not a recipe: expected settings by name")
    listed = {
        name: [content[name]]
        for name in ("taus", "ablations")
        if name in content and not isinstance(content[name], (list, tuple))
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunSettings, "run")
    try:
        return parser.instantiate(parser.parse_object({"run": {**content, **listed}})).run
    except (ArgumentError, TypeError) as error:
        text = one_line(error)
        unknown = re.search(r"option '([\w.]+)'", text, re.IGNORECASE)
        if unknown is None:
            told = argument_error(text.replace("run.", ""), [])
            raise ConfigError(f"{origin}: {told}") from None
        known = [key.removeprefix("run.") for key in parser.get_defaults().keys()]  # noqa: SIM118
        near = get_close_matches(unknown[1], [*known, *FinetuneSettings.__dataclass_fields__], n=1)
        hint = f"did you mean {near[0]}?" if near else "vitcut run demo --print-config shows them"
        raise ConfigError(f"{origin} has no setting {unknown[1]!r}: {hint}") from None


_USED_BY_PROBES = ("device", "precision", "threads")
"""The settings of a training that matter where only the classifier is fitted."""


def fine_tuning_recipe() -> Path:
    """The shipped settings for fine-tuning a pretrained model, as flags of `train`."""
    return Path(str(resources.files("vitcut"))) / "assets" / "training" / "fine-tune.yaml"


def train(
    images: "Images",
    *,
    model: "Model | None" = None,
    transfer: TransferSettings = TransferSettings(),
    vit: VitSettings = VitSettings(),
    settings: TrainSettings | None = None,
    out: str | Path | None = None,
) -> "Model":
    """Train a small ViT on a task, or give a pretrained model the classes of a task.

    Args:
        images: From `load_images`: without a model, or with the model and ``new_head=True``.
        model: A pretrained model from `load_model`, which is not changed. Its classifier is
            replaced by a new one.
        transfer: Which of its weights are trained, and how much the early ones.
        vit: The architecture of a new model.
        settings: How to train. By default the light recipe for a new model, the shipped one for
            fine-tuning a pretrained model. With ``freeze="backbone"``, only device, precision and
            threads matter.
        out: Run directory: checkpoints, metrics, and the model in ``dense/``.

    Raises:
        ConfigError: The image size is not a multiple of the patch size, or an argument is for
            another kind of training.
        TaskError: The images are labelled with groups, not with the task's classes.
        UnsupportedModelError: The model's classifier cannot be replaced.
        ModelError: The model is of a class of your own, which cannot be saved.
        ArtefactError: ``out`` holds something else.
    """
    from vitcut.images.load import Images
    from vitcut.model.saving import require_savable

    if settings is None and model is not None and transfer.freeze == "none":
        found = yaml.safe_load(fine_tuning_recipe().read_text(encoding="utf-8"))
        settings = TrainSettings(**{k: v for k, v in found.items() if k != "layer_decay"})
    settings = settings or TrainSettings()
    check_train({"model": model, "transfer": transfer, "vit": vit, "settings": settings})
    _require_fine_labels(require(images, Images))
    run, own = Run(out), {"train": as_plain(settings)}
    if transfer.freeze == "backbone":
        own["train"] = {name: own["train"][name] for name in _USED_BY_PROBES}
    start = {"model": {"model": OWN}, "images": plain_images(images)}
    if model is None:
        vit.require_whole_patches(images.preprocessing.image_size)
        run.claim({**start, "vit": as_plain(vit), **own})
        return _trained(images, vit, settings, run)
    require_made_for(model.preprocessing, images)
    origin = subject(model, images)["model"]
    require_savable(model.module, remedy="train a model of these libraries")
    told = {"freeze": "backbone"} if transfer.freeze == "backbone" else as_plain(transfer)
    own["preprocessing"] = as_plain(model.preprocessing)
    run.claim({**start, "pretrained": origin, "transfer": told, **own})
    return _transferred(model, images, transfer, settings, run)


def check_train(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `train` that contradict each other, once the model is known.

    Raises:
        ConfigError: A setting is for another kind of training.
    """
    require_extra("cut", "train", what="training")
    if "model" not in given:
        return
    transfer, settings = given["transfer"], given["settings"]
    if given["model"] is None:
        kind, others = "a pretrained model (--model)", [transfer]
    elif transfer.freeze == "backbone":
        kind = "training all weights, got freeze backbone"
        others = [given["vit"], settings, replace(transfer, freeze="none")]
    else:
        kind, others = "a new model, got a pretrained one", [given["vit"]]
    for value in others:
        for name, default in vars(type(value)()).items():
            if getattr(value, name) != default and name not in _USED_BY_PROBES:
                raise ConfigError(f"{name} is for {kind}: leave it out")


def _transferred(
    model: "Model",
    images: "Images",
    transfer: TransferSettings,
    settings: TrainSettings,
    run: Run,
) -> "Model":
    """The pretrained model with the classes of a task: trained, or read back."""
    from vitcut.benchmark.evaluation import evaluate
    from vitcut.model.model import Model
    from vitcut.reports.cards import transferred_card
    from vitcut.training.transfer import fine_tune, fit_probe

    def make() -> Model:
        if transfer.freeze == "backbone":
            made, result = fit_probe(model, images, settings, run.path)
        else:
            made, result = fine_tune(model, images, settings, transfer, run.path)
        found = evaluate(made.module, images.test, images.task, made.preprocessing)
        say(
            f"test: {found.accuracy_fine:.1%} of {found.images} images right over the classes, "
            f"{found.accuracy_coarse:.1%} over the groups"
        )
        return replace(
            made,
            card=transferred_card(
                images.task, model.public_name or "a model of vitcut", result, found
            ),
        )

    return _own(run.once("dense", make, Model.load), run)


def _require_fine_labels(images: "Images") -> None:
    task = images.task
    if task.folders:
        listed = ", ".join(task.label_ids[:5]) + (", ..." if len(task.label_ids) > 5 else "")
        raise TaskError(
            f"training needs images labelled with the {len(task.classes)} classes of task "
            f"{task.name!r}, these are labelled with its {len(task.groups)} groups: give a label "
            f"file of the folders, 'classes: [{listed}]', or cut a model that already knows the "
            f"{len(task.classes)} classes"
        )


def _trained(images: "Images", vit: VitSettings, settings: TrainSettings, run: Run) -> "Model":
    """The dense model of a run directory: trained, or read back."""
    from vitcut.model.model import Model
    from vitcut.model.reference import build_reference
    from vitcut.reports.cards import dense_card
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
        made = Model.of(module, task.name, images.preprocessing, labels)
        return replace(made, card=dense_card(task, result, settings))

    return _own(run.once("dense", make, Model.load), run)


def _own(made: "Model", run: Run) -> "Model":
    """The model of a run directory as load_model gives it, whether trained now or before."""
    if run.is_temporary:
        return made
    origin = {"model": str((run.path / "dense").resolve())}
    return replace(made, name=str(run.path), origin=origin, run=run.path)


def run(
    recipe: "str | Path | RunSettings",
    *,
    changes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> Results:
    """Run a recipe: train, discover, cut, measure.

    Args:
        recipe: The name of a shipped recipe, or a YAML file; in Python also `RunSettings`.
        changes: Values of the recipe to override, by dotted key: ``{"train.epochs": 2}``.
        out: Run directory; by default ``runs/RECIPE``, or none for `RunSettings`.

    Raises:
        VitcutError: Any error of a stage; once its cause is fixed, the same call continues.
    """
    require_extra("cut", "train", what="a run")
    from vitcut.benchmark.points import measure
    from vitcut.compiler.cost import CostModel
    from vitcut.compiler.cut import Cut, class_only, cut_circuit, make_fitter, require_cut_from
    from vitcut.discovery.search import find_circuits
    from vitcut.model.model import read_model
    from vitcut.model.reference import build_reference
    from vitcut.reports.cards import origin_of, write_cards
    from vitcut.reports.pictures import evaluate_and_keep
    from vitcut.selection.search import leave_images, require_decidable, require_possible, search
    from vitcut.training.repair import repair_cut

    named = not isinstance(recipe, RunSettings)
    if changes and not named:
        raise ConfigError("changes are for a recipe's name or file: use dataclasses.replace")
    settings = read_recipe(recipe, changes) if named else recipe
    target = Run(Path("runs") / Path(recipe).stem if out is None and named else out)
    require_here(settings.train, settings.repair, settings.bench)
    vit, data = settings.vit, settings.data
    vit.require_whole_patches(data.image_size)
    images = load_images(task=settings.task, **asdict(data))
    _require_fine_labels(images)
    # What cannot be is refused before the directory is claimed and a model is trained.
    images.calibration(settings.discover.images, seed=settings.discover.seed)
    size, classes = data.image_size, len(images.task.classes)
    untrained = read_model(build_reference(vit, num_classes=classes, image_size=size))
    linear = replace(settings.cut, ablation="linear", merge=False)
    costs = CostModel.of(settings.cut)
    if settings.select.is_given:
        require_possible(untrained, settings.select, costs)
        require_decidable(settings.select, images)
    chosen = {k: v for k, v in as_plain(settings).items() if k not in {"task", "data"}}
    chosen["cut"] = as_plain(replace(settings.cut, costs=None))
    chosen["costs"] = costs.fingerprint
    target.claim({"model": {"model": OWN}, "images": plain_images(images), **chosen})
    model = for_images(_trained(images, vit, settings.train, target), images)
    warn_if_no_better(model, images, target)
    cuts: list[Cut] = []

    def keep(folder: Path, make: Callable[[], Cut]) -> Cut:
        made = target.once(str(folder / "model"), make, Cut.load)
        require_cut_from(made, model)
        cuts.append(replace(made, folder=target.kept(f"{folder}/model")))
        return cuts[-1]

    def compiled(circuit: "Circuit", how: CutSettings, fitter: "Fitter", **facts: Any) -> Cut:
        return cut_circuit(model, images, circuit, how, fitter=fitter, costs=costs, **facts)

    fitter = make_fitter(model, images, settings.cut)
    for ablation in settings.ablations:
        sought = replace(settings.discover, ablation=ablation)
        for name, circuit in find_circuits(model, images, sought, settings.taus, target):
            make = partial(compiled, circuit, settings.cut, fitter, name=name)
            keep(Path("points") / name, make)
    if settings.select.is_given:
        linear = leave_images(linear, images, settings.select)
        fitter = make_fitter(model, images, linear)
        select, threads = settings.select, settings.bench.threads
        for answer in search(
            model, images, select, linear, fitter, costs, target, threads=threads, warn=False
        ):
            facts = {"name": answer.name, "budget": answer.asked}
            make = partial(compiled, answer.circuit, linear, fitter, **facts)
            start = keep(Path("points") / answer.name, make)
            if settings.repair is not None:
                folder = Path("points") / f"{answer.name}-repaired"
                into = target.path / folder
                training = settings.repair.for_width(model.weights.width)
                make = partial(repair_cut, start, model, images, training, into)
                keep(folder, lambda repair=make: repair()[0])

    def measured() -> Results:
        points = {CLASS_ONLY: class_only(model, images, settings.cut)}
        points |= {item.name: (item.point(target.path), item.model) for item in cuts}
        found = evaluate_and_keep(model, images, points, target.path)
        results = measure(model, images, points, settings.bench, evaluations=found)
        write_cards(results, target.path, cuts[-1].model.info, origin_of(model, images))
        return results

    return target.once(RESULTS_FILE, measured, Results.load)


def demo(*, changes: Mapping[str, Any] | None = None, out: str | Path | None = None) -> Results:
    """Run every stage on drawn pictures in under three minutes, without data or network access.

    The run ends with its report, ``report.html``.

    Args:
        changes: Values of the ``demo`` recipe to override, by dotted key.
        out: Run directory; by default ``runs/demo``.
    """
    from vitcut.reports.page import Report

    out = Path("runs/demo") if out is None else Path(out)
    results = run("demo", changes=changes, out=out)
    Report.of([out]).save(out / REPORT_FILE)
    return results
