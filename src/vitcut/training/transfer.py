"""New classes for a pretrained model: fine-tune all weights, or fit a classifier to its features.

In both cases the model's own classifier is replaced, so its old classes do not matter.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vitcut.errors import ArtefactError
from vitcut.images.load import Images, normalise
from vitcut.labels import Labels
from vitcut.metrics import coarse_log_probs
from vitcut.model.classes import with_new_head
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing
from vitcut.progress import Meter, say, track
from vitcut.runtime import choose_device, set_threads
from vitcut.settings import config_hash
from vitcut.shapes import Float, Tensor
from vitcut.tensors import read_tensors, write_tensors
from vitcut.training.checkpoint import TrainResult
from vitcut.training.loop import for_machine, train, training_precision
from vitcut.training.settings import TrainSettings, TransferSettings

FEATURES_FILE = "features.safetensors"
_VERSION = 2
_PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strong to weak, so that each fit starts near its optimum."""
_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the fit of a classifier came to; accuracies are on the val split, as fractions of 1."""

    penalty: float
    """The weight decay that val images chose."""
    accuracy_fine: float
    accuracy_coarse: float
    seconds: float
    """With the features, if they were not there yet."""


def fine_tune(
    model: Model, images: Images, settings: TrainSettings, transfer: TransferSettings, out: Path
) -> tuple[Model, TrainResult]:
    """Train a copy of a model, with a new classifier, on the classes of a task.

    Args:
        model: The pretrained model.
        images: Prepared for it, with the new classes.
        settings: The recipe.
        transfer: Its layer decay is used.
        out: A folder for the training's files. Run again after a kill, the training continues.

    Raises:
        UnsupportedModelError: The model's classifier cannot be replaced.
        VitcutError: What `vitcut.training.loop.train` raises.
    """
    module, _ = with_new_head(model.module, model.weights, len(images.task.classes))
    result = train(
        module,
        images,
        settings,
        out,
        preprocessing=model.preprocessing,
        layer_decay=transfer.layer_decay,
    )
    return _named(module, model, images), result


def fit_probe(
    model: Model, images: Images, settings: TrainSettings, out: Path
) -> tuple[Model, Probe]:
    """Fit a new classifier to the features of a model, whose other weights stay as they are.

    Multinomial logistic regression on standardised features, without augmentation. It is convex:
    there is no learning rate to choose, and no seed. Val images choose the L2 penalty, by the
    likelihood of their labels.

    Args:
        model: The pretrained model.
        images: Prepared for it, with the new classes.
        settings: Device, threads, and the precision of the features are used.
        out: A folder that keeps the features, which take nearly all the time.

    Raises:
        UnsupportedModelError: The model's classifier cannot be replaced.

    Source:
        The linear probes of Radford et al. 2021, arXiv:2103.00020, appendix A.3. Deviation: a
        fixed grid of penalties.
    """
    start = time.perf_counter()
    set_threads(settings.threads)
    settings, device = for_machine(settings, out), choose_device(settings.device)
    task = images.task
    module, layers = with_new_head(model.module, model.weights, len(task.classes))
    preprocessing = model.preprocessing
    known = config_hash(
        model.weight_hash,
        images.fingerprint,
        list(preprocessing.mean),
        list(preprocessing.std),
        settings.precision,
    )
    train_x, val_x = _features(module, layers, images, settings, out, preprocessing, known)
    train_y, val_y = (
        torch.from_numpy(part.labels).to(device) for part in (images.train, images.val)
    )
    mean, std = train_x.mean(0), train_x.std(0, correction=0).clamp_min(1e-6)
    # Folded back: w . (x - mean) / std + b = (w / std) . x + (b - (w / std) . mean).
    fits: list[tuple[float, float, Tensor, Tensor]] = []
    weight = train_x.new_zeros(len(task.classes), train_x.shape[1])
    bias = train_x.new_zeros(len(task.classes))
    for penalty in track(_PENALTIES, "fitting the classifier", len(_PENALTIES), unit="fits"):
        weight, bias = _fit((train_x - mean) / std, train_y, weight, bias, penalty)
        folded = weight / std
        shift = bias - folded @ mean
        loss = F.cross_entropy(F.linear(val_x, folded, shift), val_y).item()
        fits.append((loss, penalty, folded, shift))
    _, penalty, folded, shift = min(fits, key=lambda fit: fit[0])
    logits = F.linear(val_x, folded, shift)
    groups = torch.from_numpy(task.group_of_class).to(device)
    coarse = coarse_log_probs(logits, groups, len(task.groups)).argmax(1)
    # The logits are the mean over the layers, so each gets its columns times their number.
    parts = folded.split([layer.in_features for layer in layers], dim=1)
    with torch.no_grad():
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.copy_(part * len(layers))
            layer.bias.copy_(shift)
    return _named(module, model, images), Probe(
        penalty=penalty,
        accuracy_fine=(logits.argmax(1) == val_y).double().mean().item(),
        accuracy_coarse=(coarse == groups[val_y]).double().mean().item(),
        seconds=time.perf_counter() - start,
    )


def _named(module: nn.Module, model: Model, images: Images) -> Model:
    task = images.task
    labels = Labels(owner=task.name, ids=task.class_ids, names=task.class_names)
    return Model.of(module, task.name, model.preprocessing, labels)


def _fit(
    features: Float[Tensor, "images features"],
    labels: Tensor,
    weight: Float[Tensor, "classes features"],
    bias: Float[Tensor, "classes"],
    penalty: float,
) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy + penalty / 2 |weight|^2, from a given start."""
    weight, bias = (start.clone().requires_grad_() for start in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _features(
    module: nn.Module,
    layers: list[nn.Linear],
    images: Images,
    settings: TrainSettings,
    out: Path,
    preprocessing: Preprocessing,
    known: str,
) -> tuple[Tensor, Tensor]:
    """What the classifier reads of train and val images, computed or read back.

    Args:
        module: In eval mode; afterwards on the CPU.
        layers: Its classifier. Their inputs are put side by side: [images, features].
        images: Of the new task.
        settings: For the device and the precision.
        out: The folder that keeps the features.
        preprocessing: The model's.
        known: A hash of everything that the features depend on.

    Raises:
        ArtefactError: The folder holds features of something else.
    """
    path, device = out / FEATURES_FILE, choose_device(settings.device)
    if path.exists():
        tensors, facts = read_tensors(path, kind="features", version=_VERSION)
        if facts != {"of": known}:
            raise ArtefactError(
                f"{path} holds features of another model, other images or another precision: "
                "choose another --out"
            )
        size = sum(layer.in_features for layer in layers)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected = {"train": (len(images.train), size), "val": (len(images.val), size)}
        if shapes != expected or not all(t.is_floating_point() for t in tensors.values()):
            raise ArtefactError(
                f"{path} holds features of shapes {shapes}, expected {expected}: delete it and run "
                "again"
            )
        say(f"{path} is there already")
        return tensors["train"].to(device), tensors["val"].to(device)
    tensors, inputs = {}, {}

    def take(layer: nn.Module, given: tuple[Tensor]) -> None:
        inputs[layer] = given[0].float()

    hooks = [layer.register_forward_pre_hook(take) for layer in layers]
    module.to(device)
    with (
        Meter("features", len(images.train) + len(images.val), unit="images") as meter,
        torch.no_grad(),
        training_precision(settings, device),
    ):
        for name, part in {"train": images.train, "val": images.val}.items():
            found: list[Tensor] = []
            for start in range(0, len(part), _BATCH_SIZE):
                rows = np.arange(start, min(start + _BATCH_SIZE, len(part)))
                module(normalise(part.read(rows), preprocessing, device=device))
                found.append(torch.cat([inputs[layer] for layer in layers], dim=1))
                meter.advance(len(rows))
            tensors[name] = torch.cat(found)
    module.cpu()
    for hook in hooks:
        hook.remove()
    write_tensors(path, tensors, {"of": known}, version=_VERSION)
    return tensors["train"], tensors["val"]
