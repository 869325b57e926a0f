"""The Python interface: models and images in, circuits and compact models out.

Thin on purpose: the work is done by ``stages``; files and resuming are left to ``run`` and
``commands``.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vitcut.benchmark import evaluation
from vitcut.benchmark.evaluation import Evaluation
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError
from vitcut.images import images as task_images
from vitcut.images.images import TaskImages, to_float
from vitcut.images.settings import DataSettings
from vitcut.model.adapters import as_classifier, read_weights
from vitcut.model.given import Given
from vitcut.model.loaded import per_channel
from vitcut.model.loading import LoadedModel, weight_hash
from vitcut.model.tracing import read_model
from vitcut.pipeline.arguments import (
    IN_PYTHON,
    configured,
    configured_both,
    numbers_of,
    require_kind,
    require_made_for,
    require_names,
)
from vitcut.pipeline.budget import BudgetSearch, require_possible
from vitcut.pipeline.classes import fit, load_images_for
from vitcut.pipeline.costs import cost_model
from vitcut.pipeline.fills import Fills
from vitcut.pipeline.folder import RunFolder
from vitcut.pipeline.repair import repair
from vitcut.pipeline.settings import require_budget_or
from vitcut.pipeline.stages import Cut, Discovery, cut_circuit
from vitcut.pipeline.stored import require_cut_of
from vitcut.pipeline.subject import Subject, load_dense
from vitcut.selection.settings import Budget
from vitcut.settings import as_plain
from vitcut.shapes import Float, Tensor
from vitcut.task import Task, load_task
from vitcut.training.settings import FinetuneSettings

_BUDGETS = {"target_macs", "target_latency"}


def load_model(
    model: str | Path | nn.Module,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    arch: str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
) -> LoadedModel:
    """Load a dense model, or wrap one that was loaded already, and check that it is understood.

    Args:
        model: "animals", a run directory (the model that it trained, or that it is about), a
            folder of timm or transformers, "timm:NAME", "hf-hub:REPOSITORY", a file of bare
            weights; or a ViT of timm, torchvision, transformers or a class with an adapter, which
            is copied, not changed.
        mean: On the scale 0 to 1: what the module's pixels are shifted by, one number or one per
            channel. Needed with a module, possible with bare weights, and refused with all else.
        std: What they are divided by afterwards. Likewise.
        arch: The architecture of a file of bare weights: timm's name, or "torchvision:NAME".
        random_weights: Build "timm:NAME" without its weights, and without network.
        image_size: Height and width, in pixels, of the images that "timm:NAME" is built for; its
            position embeddings are brought to that size. None is the size of its weights.

    Raises:
        ModelError: There is no such model, it is damaged, or its weights are not finite.
        UnsupportedModelError: The model has a feature that is not understood.
        ConfigError: ``mean`` and ``std`` are missing; something is given that is for another kind
            of model, or out of range; transformers is not installed.
        ArtefactError: The run directory is damaged.
    """
    given = Given(
        arch=arch,
        mean=numbers_of("mean", mean),
        std=numbers_of("std", std),
        random_weights=random_weights,
        image_size=image_size,
    )
    if isinstance(model, nn.Module):
        return _wrap(model, given)
    loaded = load_dense(str(model), given)
    read_model(loaded.model)
    return loaded


def load_images(  # noqa: PLR0913 - what a caller may choose
    source: str | Path | None,
    *,
    task: str | Path | Task,
    model: LoadedModel | None = None,
    image_size: int | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    skip_bad_images: bool = False,
) -> TaskImages:
    """Prepare the images of a task; they are decoded once and kept in the cache.

    Args:
        source: A Tiny ImageNet .zip or folder, a folder of class folders, a .parquet file, a
            Hugging Face dataset id, or "drawn"; None downloads Tiny ImageNet.
        task: A shipped task's name ("animals", "drawn"), a label file, or a `Task`.
        model: Prepare them as this one takes them, its size, colours, crop and interpolation; the
            task's positions, names and rest are then of its classes, else of the data's.
        image_size: Height and width, in pixels; None is the model's, or 64 without a model.
        seed: Of the splits that the data lacks, and of drawn pictures.
        val_fraction: Part of each class's training images that is set aside for choosing.
        skip_bad_images: Leave out images that do not decode, instead of stopping.

    Raises:
        DataError: The source cannot be used.
        TaskError: There is no such task, or it does not fit the data.
        ConfigError: A setting is out of range, or not the model's.
    """
    if model is not None:
        require_kind(model, LoadedModel)
    if image_size is not None and model is not None and image_size != model.image_size:
        raise ConfigError(
            f"the model takes images of {model.image_size} pixels, got image_size={image_size}: "
            "leave it out"
        )
    config = DataSettings(
        source=None if source is None else str(source),
        image_size=(model.image_size if model else 64) if image_size is None else image_size,
        seed=seed,
        val_fraction=val_fraction,
        skip_bad_images=skip_bad_images,
    )
    wanted = task if isinstance(task, Task) else load_task(task)
    if model is not None:
        return load_images_for(model, config, wanted)
    return task_images.load_images(config, wanted)


def discover(
    model: LoadedModel, images: TaskImages, /, *, log: str | Path | None = None, **settings: Any
) -> Circuit:
    """Find the circuit of a task in a model.

    Args:
        model: From `load_model`.
        images: From `load_images`; calibration images are drawn from the training images.
        log: Decisions are appended to this file; after a kill the same call continues it.
        **settings: Those of `DiscoverSettings`, such as ``tau`` and ``images`` (how many).

    Raises:
        ConfigError: A setting is unknown or out of range, or the images have another size.
        TaskError: The model's classes are not the task's.
        UnsupportedModelError: The model has a feature that is not understood.
        ArtefactError: ``log`` belongs to another search.
    """
    _require_loaded(model, images)
    config = configured(DiscoverSettings, settings)
    path = None if log is None else Path(log)
    return Discovery(_subject(model, images), config).find(config.tau, log=path)


def cut(
    model: LoadedModel,
    images: TaskImages,
    circuit: Circuit | None = None,
    /,
    *,
    out: str | Path | None = None,
    **settings: Any,
) -> Cut:
    """Cut a model down to a circuit, or to a budget, and check that it computes the masked model.

    Args:
        model: The one that the circuit was found in.
        images: Of the task; fills are fitted to training images.
        circuit: Under any ablation, which the compact model's is too unless a setting says so, or
            where it is resample. None: it is searched, within ``target_macs`` or
            ``target_latency``, under linear ablation unless a setting says so.
        out: Keeps the circuits on the way to a budget, and ``path.json``; after a kill the same
            call continues it.
        **settings: Those of `CutSettings`, such as ``ablation``, ``images`` (how many) and ``merge``;
            with a budget those of `Budget` too, such as ``rounds``.

    Returns:
        The compact model, its circuit, and by how much its logits differ from the masked model's.

    Raises:
        ConfigError: A setting is unknown or out of range, there is not either a circuit or a
            budget, a budget is to be merged, or the images have another size.
        CircuitError: The circuit is of another model, or the budget cannot be met.
        ExactnessError: The compact model does not compute the masked one.
        ArtefactError: ``out`` belongs to another cut.
    """
    _require_loaded(model, images)
    if circuit is not None:
        require_kind(circuit, Circuit)
    if circuit is not None and not settings.keys() & _BUDGETS:
        return cut_circuit(_subject(model, images), circuit, configured(CutSettings, settings))
    config, select = configured_both(CutSettings, Budget, settings)
    config = replace(config, ablation=config.ablation_for(None))
    require_budget_or(select, circuit, merge=config.merge, words=IN_PYTHON)
    subject = _subject(model, images)
    with TemporaryDirectory() as temporary:
        folder = RunFolder(
            Path(temporary if out is None else out),
            {
                "weight_hash": model.weight_hash,
                "images_fingerprint": images.fingerprint,
                "select": as_plain(select),
                "cut": as_plain(config),
                "costs": cost_model(config.batch).fingerprint,
            },
        )
        fills = Fills(subject, config)
        search = BudgetSearch(subject, folder, select, config, fills)
        require_possible(subject.weights, select, config)
        folder.claim()
        return cut_circuit(subject, search.find(), config, fills=fills)


def finetune(
    compact: CompactViT,
    model: LoadedModel,
    images: TaskImages,
    /,
    *,
    out: str | Path | None = None,
    **settings: Any,
) -> CompactViT:
    """Repair a compact model: a few epochs of distillation from the model that it was cut from.

    Args:
        compact: From `cut` or ``CompactViT.from_pretrained``; it is not changed.
        model: The one that it was cut from; likewise.
        images: Of the task.
        out: Keeps checkpoints; after a kill the same call continues it.
        **settings: Those of `FinetuneSettings`, such as ``epochs`` and ``learning_rate``.

    Returns:
        The compact model with the weights of the best epoch.

    Raises:
        ConfigError: A setting is unknown or out of range, or the images have another size.
        ModelError: It was cut from another model, or gives every image the same logits.
        TaskError: The classes are not the task's.
        ArtefactError: ``out`` belongs to another training.
    """
    require_kind(compact, CompactViT)
    _require_loaded(model, images)
    config = configured(FinetuneSettings, settings)
    subject = _subject(model, images)
    require_cut_of(compact, subject)
    repaired = deepcopy(compact)
    with TemporaryDirectory() as temporary:
        repair(subject, repaired, config, Path(temporary if out is None else out))
    return repaired


def evaluate(model: LoadedModel | CompactViT, images: TaskImages) -> Evaluation:
    """Measure a dense or compact model on the test images.

    Args:
        model: From `load_model`, `cut` or ``CompactViT.from_pretrained``.
        images: Of the task that the model was made for.

    Raises:
        TaskError: The model's classes are not the task's.
        ConfigError: The images have another size than the model takes.
        ModelError: A logit is NaN or infinite.
    """
    compact = isinstance(model, CompactViT)
    require_kind(model, CompactViT if compact else LoadedModel)
    require_kind(images, TaskImages)
    size = model.plan.shape.image_size if compact else model.image_size
    if compact:
        module, known = model, model.info
        require_names(known.class_names, images.task)
    else:
        known, _ = fit(model, read_weights(model.model), images)
        module = known.model
    require_made_for(size, known.framing, len(known.mean), images)
    parameter = next(module.parameters())

    def preprocess(pixels: NDArray[np.uint8]) -> Float[Tensor, "images channels y x"]:
        return to_float(
            pixels,
            mean=known.mean,
            std=known.std,
            dtype=parameter.dtype,
            device=parameter.device,
        )

    groups = images.task.group_of_class
    return evaluation.evaluate(module, images.test, group_of_class=groups, preprocess=preprocess)


def _wrap(module: nn.Module, given: Given) -> LoadedModel:
    given.require_for_module()
    mean, std = given.mean, given.std
    if mean is None or std is None:
        raise ConfigError(
            "a module needs mean and std, on the scale 0 to 1, one number each or one per channel: "
            "give those that it was trained with"
        )
    own = as_classifier(deepcopy(module).float().cpu().eval())
    weights = read_model(own)
    if not {len(mean), len(std)} <= {1, weights.channels}:
        raise ConfigError(
            f"mean and std need one number each, or {weights.channels}, one per channel, got "
            f"{len(mean)} and {len(std)}"
        )
    return LoadedModel(
        model=own,
        name=type(module).__name__,
        class_ids=None,
        class_names=None,
        mean=per_channel(mean, weights.channels, "mean"),
        std=per_channel(std, weights.channels, "std"),
        image_size=weights.image_size,
        weight_hash=weight_hash(own),
    )


def _require_loaded(model: object, images: object) -> None:
    require_kind(model, LoadedModel)
    require_kind(images, TaskImages)


def _subject(model: LoadedModel, images: TaskImages) -> Subject:
    require_made_for(model.image_size, model.framing, len(model.mean), images)
    return Subject.of(model, images)
