"""Masked models in which some parts are cut by a small fraction, computed from the activations."""

from collections.abc import Mapping

import numpy as np
import torch

from vitcut.circuit import Circuit
from vitcut.graph import SiteKey
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import SiteStatistics, fit_fill, fixed_fill, mean_fill, regress
from vitcut.masked.masking import PartMask, circuit_stream, full_run, run_parts
from vitcut.metrics import coarse_log_probs, kl_divergence
from vitcut.model.weights import ViTWeights
from vitcut.selection.greedy import Alive

GROUPS = torch.tensor([0, 1, 1, 2])


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return coarse_log_probs(logits, GROUPS, 3)


def circuit_of(weights: ViTWeights, heads, neurons, ablation) -> Circuit:
    graph = weights.graph if heads.shape[2] == 1 else weights.split_graph
    return Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation=ablation)


def random_parts(
    weights: ViTWeights, ablation, *, seed: int, tokens="split", density: float = 0.7
) -> Circuit:
    graph, random = weights.graph_of(tokens), np.random.default_rng(seed)
    heads = random.random((graph.num_layers, graph.num_heads, graph.num_kinds)) < density
    neurons = random.random((graph.num_layers, graph.num_kinds, weights.num_neurons)) < density
    return circuit_of(weights, heads, neurons, ablation)


def alive_of(circuit: Circuit) -> Alive:
    graph = circuit.graph
    shape = (graph.num_layers, graph.num_heads + 1, graph.num_kinds)
    live = circuit.live_sources[graph.num_kinds :].reshape(shape)
    return Alive(heads=live[:, :-1], neurons=circuit.neurons & live[:, -1, :, None])


def fitted(weights, circuit, pixels, ridge=0.1):
    """The fill of a circuit, and its statistics where it is linear."""
    if circuit.ablation != "linear":
        return fixed_fill(circuit.ablation, weights, [pixels]), None
    fit = fit_fill(weights, circuit, pixels, mean_fill(weights, [pixels]), ridge=ridge)
    return fit.fill, fit.statistics


class Nudged(PartMask):
    """Moves the stream by a fraction of what cutting more parts would do, site by site."""

    def __init__(
        self,
        weights: ViTWeights,
        circuit: Circuit,
        fill: Fill,
        statistics: Mapping[SiteKey, SiteStatistics] | None,
        parts: Mapping[SiteKey, list[int]],
    ) -> None:
        super().__init__(weights, circuit.graph, circuit.neurons, fill)
        self.weights, self.circuit, self.fill = weights, circuit, fill
        self.statistics, self.parts, self.eps = statistics, parts, 0.0
        self.alive = alive_of(circuit)

    def heads(self, layer, z):
        share = super().heads(layer, z) + torch.zeros(1, dtype=z.dtype)
        out, size = self.weights.blocks[layer].attn.out_weight, z.shape[3]
        share = share.expand(*z.shape[:3], len(out[0])).clone()
        for kind, span in enumerate(self.rows):
            for first in self.parts.get((layer, "heads", kind), [])[:1]:
                alive = torch.from_numpy(self.alive.heads[layer, :, kind].copy())
                own = z[:, :, span]
                if self.statistics is None:
                    change = torch.zeros(*own.shape[1:3], len(out[0]), dtype=z.dtype)
                    for head in self.parts[layer, "heads", kind]:
                        table = self.fill.sources[self.weights.graph.head_source(layer, head), span]
                        change = change + table - own[head] @ out[head].T
                else:
                    flat = own.permute(1, 2, 0, 3).flatten(2)
                    moved = self._moved((layer, "heads", kind), flat, alive, size)
                    change = torch.einsum("nthd,hwd->ntw", moved.unflatten(2, (-1, size)), out)
                # Through a head that lives: what cut ones write is replaced.
                share[first, :, span] += self.eps * change
        return share

    def neurons(self, layer, hidden):
        replaced, share = super().neurons(layer, hidden)
        out = self.weights.blocks[layer].mlp.out_weight
        share = (share + torch.zeros(1, dtype=hidden.dtype)).expand(*hidden.shape[:2], len(out))
        share = share.clone()
        for kind, span in enumerate(self.rows):
            parts = self.parts.get((layer, "neurons", kind), [])
            if not parts:
                continue
            own = hidden[:, span]
            if self.statistics is None:
                moved = torch.zeros_like(own)
                moved[..., parts] = (self.fill.neurons[layer, span] - own)[..., parts]
            else:
                alive = torch.from_numpy(self.alive.neurons[layer, kind].copy())
                moved = self._moved((layer, "neurons", kind), own, alive, 1)
            share[:, span] += self.eps * (moved @ out.T)
        return replaced, share

    def _moved(self, place, features, alive, size):
        """The activations with more of them predicted, minus those with fewer."""
        site, fewer = self.statistics[place], alive.clone()
        fewer[self.parts[place]] = False
        centred = features - site.means
        found = []
        for parts in (fewer, alive):
            kept = parts.repeat_interleave(size)
            R = regress(site.covariance, kept)
            found.append(centred * kept + centred @ R.T)
        return found[0] - found[1]

    def log_q(self, pixels, eps: float) -> torch.Tensor:
        self.eps = eps
        read = circuit_stream(self.weights, self.circuit, self.fill.sources)
        run = run_parts(self.fill.refitted(self.weights), pixels, read, self)
        return log_probs(run.logits)

    def slope(self, pixels, step: float = 1e-5) -> torch.Tensor:
        """Of log q along the change, shape [images, classes]."""
        return (self.log_q(pixels, step) - self.log_q(pixels, -step)) / (2 * step)

    def kl(self, pixels, eps: float) -> float:
        full = log_probs(full_run(self.weights, pixels).logits)
        return float(kl_divergence(full, self.log_q(pixels, eps)).mean())
