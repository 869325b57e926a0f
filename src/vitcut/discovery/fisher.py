"""Gradients of the task's log-probabilities, from which Fisher attribution is made.

At the uncut model the gradient of the KL is zero and its curvature is the Fisher information of the
task distribution, so cutting part u, which changes an activation by d_u, costs to second order

    score_u = 1/2 mean_x sum_y p(y|x) < grad log p(y|x), d_u(x) >^2    [nats]

(after arXiv:1801.05787, eq. 5, and arXiv:2204.09656, eq. 7; there for the loss on labels, here for
KL(full || cut) on the task distribution, all y summed instead of sampled).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vitcut.circuit import Circuit
from vitcut.masked.fill import Fill
from vitcut.masked.masking import Trace, full_run, masked_run
from vitcut.metrics import coarse_log_probs
from vitcut.model.weights import ViTWeights
from vitcut.shapes import Float, Int, Tensor


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of log q(y|x) for one y, where q is the task distribution of a model."""

    log_prob: Float[Tensor, "images"]
    """log q(y|x)."""
    by: tuple[Float[Tensor, "..."], ...]
    """One per tensor that was asked for, of its shape."""


def trace_gradients(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    group_of_class: Int[Tensor, "classes"],
    choose: Callable[[Trace], Sequence[Tensor]],
    *,
    masked: tuple[Circuit, Fill] | None = None,
    per_head: bool = False,
) -> tuple[Trace, Iterator[Gradients]]:
    """Trace a model once, then make one backward pass per coarse class.

    Args:
        weights: The model.
        pixels: Normalised images.
        group_of_class: The group number of each class of the model.
        choose: Picks the tensors of the forward pass whose gradients are wanted.
        masked: The circuit and fill of the masked model; the uncut model if None.
        per_head: Give each head of the uncut model its own inputs.

    Returns:
        The forward pass, and the gradients for y = 0, 1, ... in turn, computed as they are asked
        for.
    """
    with torch.enable_grad():
        # The pixels are the only leaf; without one autograd would not record the pass.
        leaf = pixels.detach().requires_grad_()
        if masked is None:
            run = full_run(weights, leaf, per_head=per_head)
        else:
            run = masked_run(weights, leaf, *masked)
        log_probs = coarse_log_probs(run.logits, group_of_class, int(group_of_class.max()) + 1)
        # Images do not see each other: the gradient of the sum holds that of every image.
        sums = log_probs.sum(0).unbind()
    wanted, values = list(choose(run)), log_probs.detach()

    def backward() -> Iterator[Gradients]:
        for y, total in enumerate(sums):
            found = torch.autograd.grad(
                total,
                wanted,
                retain_graph=y < len(sums) - 1,
                allow_unused=True,
                materialize_grads=True,
            )
            yield Gradients(log_prob=values[:, y], by=found)

    return run, backward()
