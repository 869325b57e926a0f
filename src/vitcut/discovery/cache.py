"""Activations that stay fixed during a search and are shared by every tau and token mode."""

from dataclasses import dataclass

import torch

from vitcut.discovery.settings import DiscoverSettings
from vitcut.masked.masking import full_run
from vitcut.masked.oracle import PAIRS_AT_A_TIME, Examples, Oracle
from vitcut.model.weights import ViTWeights
from vitcut.settings import require_memory
from vitcut.shapes import Float, Tensor

_TRACE_CHUNK = 32
"""Pairs per forward pass while tracing."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Clean and ablated values of every source of the unsplit graph, one row per pair.

    They are stored at stream width: a search spends its time on sums over sources. Under ``mean``
    and ``zero`` a pair is an image.
    """

    change: Float[Tensor, "sources pairs tokens width"]
    """Ablated minus clean value of every source."""
    ablated: Float[Tensor, "sources pairs tokens width"]
    """Ablated value of every source; expanded, not copied, under ``mean`` and ``zero``."""
    full_log_probs: Float[Tensor, "pairs groups"]
    """Task distribution of the uncut model, float64."""

    @property
    def precision(self) -> str:
        """``float32`` or ``float64``."""
        return str(self.change.dtype).removeprefix("torch.")

    @classmethod
    @torch.no_grad()
    def build(cls, weights: ViTWeights, oracle: Oracle, config: DiscoverSettings) -> "Cache":
        """Trace the clean and the corrupted images.

        Raises:
            ConfigError: The search would not fit into ``config.memory_gib``.
        """
        examples, dtype = oracle.examples, getattr(torch, config.precision)
        require_room(weights, examples, config)
        shape = (len(weights.graph.sources), len(examples.clean), weights.num_tokens, weights.width)
        change = torch.empty(shape, dtype=dtype, device=weights.device)
        if oracle.fill is None:
            ablated = torch.empty_like(change)
        else:
            ablated = oracle.fill.sources.to(dtype)[:, None].expand(shape)
        pixels = examples.pixels.to(weights.device, dtype)
        low = weights.to(dtype)
        for start in range(0, shape[1], _TRACE_CHUNK):
            span = slice(start, start + _TRACE_CHUNK)
            if oracle.fill is None:
                corrupted = pixels[examples.corrupted[span]]
                ablated[:, span] = torch.stack(full_run(low, corrupted).sources)
            clean = pixels[examples.clean[span]]
            change[:, span] = ablated[:, span] - torch.stack(full_run(low, clean).sources)
        full = oracle.full_log_probs[torch.from_numpy(examples.clean)]
        return cls(change=change, ablated=ablated, full_log_probs=full)


def require_room(weights: ViTWeights, examples: Examples, config: DiscoverSettings) -> None:
    """Check that a search fits into memory: its cache, its state and one call of the oracle.

    Raises:
        ConfigError: It does not.
    """
    graph, pairs = weights.graph, len(examples.for_ablation(config.ablation).clean)
    sources, targets = len(graph.sources), len(graph.targets)
    stream = weights.num_tokens * weights.width / 8 / 2**30
    bits = torch.finfo(getattr(torch, config.precision)).bits
    cached = 2 * (sources + targets) * pairs * stream * bits
    # The oracle in float64: every target's input and, of every source, its value, its change and,
    # where it differs between images, its ablated value.
    values = targets + (3 if config.ablation == "resample" else 2) * sources
    asked = values * min(pairs, PAIRS_AT_A_TIME) * stream * 64
    require_memory(
        f"a search over {pairs} pairs", needed_gib=cached + asked, memory_gib=config.memory_gib
    )
