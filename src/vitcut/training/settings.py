"""Settings of the training stage. Loads no torch."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from vitcut.errors import ConfigError
from vitcut.settings import require_at_least, require_bounds, require_fraction, require_positive

Augmentation = Literal["light", "reference", "none"]
"""How training images are augmented: cheaply, whole batches at once (light), as in the reference
recipe, or not at all."""

Freeze = Literal["none", "backbone"]
"""Which weights of a pretrained model stay as they are."""

Precision = Literal["auto", "float32", "bfloat16"]
"""Precision of the training forward pass; weights and evaluation stay in float32."""

_REPAIR_RATE, _REPAIR_WIDTH = 2e-3, 64
"""The learning rate of a repair, and the width of the models that it was chosen on."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is trained; the defaults are the light recipe."""

    epochs: int = 24
    """Passes over the training images, warm-up included."""
    batch_size: int = 256
    """Images per step; images that do not fill the last batch of an epoch are left out of it."""
    learning_rate: float | None = 1.2e-3
    """AdamW's peak learning rate, reached after warm-up; a cosine takes it to zero."""
    weight_decay: float = 0.05
    """AdamW's weight decay, for weight matrices; biases, norms and embeddings have none."""
    warmup_epochs: float | None = 3
    """Epochs of linear warm-up; None: one, or a fifth of all epochs if that is less."""
    patience: int | None = None
    """Stop after this many epochs without a better val accuracy; None never stops early."""
    seed: int = 0
    """Seed for the data order, augmentation and dropout, and for the weights of a new model."""
    augmentation: Augmentation = "light"
    """How training images are augmented."""
    label_smoothing: float = 0.05
    """Fraction of each target that is spread over all classes."""
    cutmix_fraction: float = 0.4
    """Fraction of batches with CutMix (light only)."""
    max_shift_px: int | None = 6
    """Largest shift along each axis, in pixels (light only); None: 24 of 224, and as much of other
    sizes."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is then evaluated and kept; None: no
    averaging."""
    compile: bool | None = None
    """Use torch.compile for the training steps; None: on a GPU only."""
    precision: Precision = "auto"
    """Precision of the training forward pass; auto: bfloat16 where the hardware computes in it,
    else float32."""
    device: str = "auto"
    """auto, cpu, or cuda."""
    threads: int | None = None
    """CPU threads; None: one per core that this process may use, as torch chooses."""
    workers: int = 0
    """Processes that augment images (reference only); the result does not depend on it."""

    def __post_init__(self) -> None:
        require_at_least("epochs", self.epochs, 1)
        require_at_least("weight_decay", self.weight_decay, 0)
        require_at_least("warmup_epochs", self.warmup, 0)
        for name in ("batch_size", "max_shift_px", "seed"):
            if getattr(self, name) is not None:
                require_bounds(name, getattr(self, name))
        require_at_least("workers", self.workers, 0)
        for name in ("label_smoothing", "cutmix_fraction"):
            require_fraction(name, getattr(self, name))
        if self.learning_rate is not None:
            require_positive("learning_rate", self.learning_rate)
        if self.patience is not None:
            require_at_least("patience", self.patience, 1)
        if self.threads is not None:
            require_at_least("threads", self.threads, 1)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be between 0 and 1, got {self.ema_decay}")
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"warmup_epochs must be below epochs ({self.epochs}), got {self.warmup:g}"
            )
        if self.augmentation == "reference" and self.batch_size % 2:
            raise ConfigError(
                f"batch_size must be even with augmentation 'reference' (Mixup pairs images), "
                f"got {self.batch_size}"
            )

    def shift_px(self, image_size: int) -> int:
        """The largest shift of images of this height and width, in pixels."""
        return round(image_size * 24 / 224) if self.max_shift_px is None else self.max_shift_px

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up."""
        return min(1.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """How a pretrained model is given new classes."""

    freeze: Freeze = "none"
    """With a pretrained model: none trains all weights; backbone fits the new classifier alone, to
    features that are computed once."""
    layer_decay: float = 0.75
    """With a pretrained model: the learning rate of a block, as a fraction of the next one's; 1
    gives all the same."""

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay must be > 0 and <= 1, got {self.layer_decay}")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainSettings):
    """How a cut model is repaired: a few epochs with the dense model as teacher."""

    epochs: int = 6
    """Passes over the training images, warm-up included."""
    batch_size: int = 128
    """Images per step; images that do not fill the last batch of an epoch are left out of it."""
    learning_rate: float | None = None
    """AdamW's peak learning rate, reached after warm-up; a cosine takes it to zero. None: 2e-3 at a
    width of 64, falling with the square of the width: 2.2e-4 at 192."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up; None: one, or a fifth of all epochs if that is less."""
    patience: int | None = 3
    """Stop after this many epochs without a better val accuracy; None never stops early."""
    compile: bool | None = False
    """Use torch.compile for the training steps; for a few epochs, compiling takes longer than it
    saves."""
    coarse_weight: float = 1.0
    """Weight of the KL divergence from the dense model on the task distribution."""
    fine_weight: float = 1.0
    """Weight of the KL divergence from the dense model on the fine classes."""
    label_weight: float = 0.5
    """Weight of the cross-entropy with the labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {
            name: getattr(self, name) for name in ("coarse_weight", "fine_weight", "label_weight")
        }
        for name, value in weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a finite number >= 0, got {value}")
        if not any(weights.values()):
            raise ConfigError(f"one of {', '.join(weights)} must be > 0, got 0 for each")

    def for_width(self, width: int) -> "FinetuneSettings":
        """These settings with a learning rate for a model of this width, if they leave it open.

        2e-3 has served every repair of width 64. At 192, a cut of vit_tiny to 30 % of its MACs came
        to 44, 74, 77 and 76 % coarse after 32 steps of 1e-3, 5e-4, 2e-4 and 6e-5.
        """
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=_REPAIR_RATE * (_REPAIR_WIDTH / width) ** 2)


def reference_recipe() -> TrainSettings:
    """The published recipe; use it with ``VitSettings(dropout=0.2)``."""
    return TrainSettings(
        epochs=300,
        learning_rate=3e-4,
        warmup_epochs=20,
        patience=50,
        augmentation="reference",
        label_smoothing=0.1,
    )
