"""Task distributions and KL divergence; running models is left to the stages."""

import torch

from vitcut.shapes import Float, Int, Tensor


def coarse_log_probs(
    logits: Float[Tensor, "*images classes"],
    group_of_class: Int[Tensor, "classes"],
    num_groups: int,
) -> Float[Tensor, "*images groups"]:
    """The task distribution: the log of the summed fine probabilities of each group.

    Args:
        logits: Of the fine classes.
        group_of_class: The group number of each fine class; every group has one at least.
        num_groups: How many groups there are.
    """
    fine = logits.log_softmax(dim=-1)
    members = [group_of_class == group for group in range(num_groups)]
    return torch.stack([fine[..., chosen].logsumexp(dim=-1) for chosen in members], dim=-1)


def kl_divergence(
    full_log_probs: Float[Tensor, "*images classes"],
    circuit_log_probs: Float[Tensor, "*images classes"],
) -> Float[Tensor, "*images"]:
    """KL(full || circuit) of each image in nats, in the inputs' precision, nothing clamped.

    What the full model holds impossible adds nothing, whatever the circuit says.
    """
    terms = full_log_probs.exp() * (full_log_probs - circuit_log_probs)
    return terms.masked_fill(full_log_probs == -torch.inf, 0).sum(dim=-1)
