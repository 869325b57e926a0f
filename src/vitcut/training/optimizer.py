"""The optimiser and its learning rates over the steps of a training, out of timm's pieces."""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vitcut.errors import ConfigError
from vitcut.training.settings import TrainSettings


def create_optimizer(model: nn.Module, config: TrainSettings) -> torch.optim.Optimizer:
    """AdamW with weight decay on weight matrices only."""
    return create_optimizer_v2(
        model, "adamw", lr=config.learning_rate, weight_decay=config.weight_decay
    )


def create_schedule(
    optimizer: torch.optim.Optimizer, config: TrainSettings, steps_per_epoch: int
) -> Scheduler:
    """Linear warm-up to the learning rate, then a cosine to zero; set by ``step_update(step)``."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=config.epochs - config.warmup_epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.learning_rate / 100,
        warmup_prefix=True,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    if schedule is None:
        raise ConfigError("timm built no cosine schedule: expected timm 1.0.20 or later")
    return schedule
