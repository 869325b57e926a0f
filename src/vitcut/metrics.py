"""Task distributions and the KL divergence between them."""

import torch

from vitcut.shapes import Float, Int, Tensor


def coarse_log_probs(
    logits: Float[Tensor, "*images classes"],
    group_of_class: Int[Tensor, "classes"],
    num_groups: int,
) -> Float[Tensor, "*images groups"]:
    """The task distribution: log of the summed fine probabilities of each group.

    Args:
        logits: Logits of the fine classes.
        group_of_class: The group number of each fine class; every group has at least one class.
        num_groups: The number of groups.
    """
    fine = logits.log_softmax(dim=-1)
    if num_groups == len(group_of_class):
        return fine[..., group_of_class.argsort()]  # Each class is a group of its own.
    members = [group_of_class == group for group in range(num_groups)]
    return torch.stack([fine[..., chosen].logsumexp(dim=-1) for chosen in members], dim=-1)


def kl_divergence(
    full_log_probs: Float[Tensor, "*images classes"],
    circuit_log_probs: Float[Tensor, "*images classes"],
) -> Float[Tensor, "*images"]:
    """KL(full || circuit) of each image in nats, in the inputs' precision, never clamped.

    Classes that the full model gives probability 0 add nothing, whatever the circuit gives them.
    """
    terms = full_log_probs.exp() * (full_log_probs - circuit_log_probs)
    # 0 log 0 := 0; as computed it is NaN.
    return terms.masked_fill(full_log_probs == -torch.inf, 0).sum(dim=-1)
