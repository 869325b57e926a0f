"""What training minimises: the loss is given to the loop, so that fine-tuning brings its own."""

from typing import Protocol, runtime_checkable

import torch.nn.functional as F

from vitcut.shapes import Float, Tensor
from vitcut.training.batches import Batch


@runtime_checkable
class Loss(Protocol):
    """A loss of one batch."""

    @property
    def identity(self) -> str:
        """Names the loss and all that it depends on; a training is resumed under the same only."""
        ...

    def __call__(self, batch: Batch, logits: Float[Tensor, "images classes"]) -> Float[Tensor, ""]:
        """The mean loss over the images of a batch."""
        ...


class SoftCrossEntropy:
    """Cross-entropy with soft targets; timm's ``SoftTargetCrossEntropy`` computes the same."""

    identity = "soft cross-entropy"

    def __call__(self, batch: Batch, logits: Float[Tensor, "images classes"]) -> Float[Tensor, ""]:
        """The mean over the images, in nats."""
        return F.cross_entropy(logits, batch.targets)
