import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import vits
from tiny import random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.masked.fitting import fit_fill, fixed_fill
from vitcut.masked.masking import masked_run
from vitcut.masked.part_model import PartModel


def random_parts(weights, ablation, *, seed, tokens="split", density=0.7) -> Circuit:
    graph, random = weights.graph_of(tokens), np.random.default_rng(seed)
    heads = random.random((graph.num_layers, graph.num_heads, graph.num_kinds)) < density
    neurons = random.random((graph.num_layers, graph.num_kinds, weights.num_neurons)) < density
    positions = random.random(len(weights.positions)) < density
    positions[0] = True
    return Circuit.of_parts(
        graph, heads=heads, neurons=neurons, positions=positions, ablation=ablation
    )


def fill_of(weights, circuit, pixels):
    if circuit.ablation == "linear":
        return fit_fill(weights, circuit, pixels, ridge=0.1).fill
    return fixed_fill(circuit.ablation, weights, [pixels])


@given(
    weights=vits(),
    ablation=st.sampled_from(["zero", "mean", "linear"]),
    tokens=st.sampled_from(["all", "split"]),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_the_part_model_computes_the_masked_model(weights, ablation, tokens, density, seed):
    circuit = random_parts(weights, ablation, seed=seed, tokens=tokens, density=density)
    fill = fill_of(weights, circuit, random_pixels(weights, 8, seed=8))
    pixels = random_pixels(weights, 3, seed=9)
    expected = masked_run(weights, pixels, circuit, fill).logits
    got = PartModel(weights, circuit, fill).run(pixels)
    assert not got.writes
    torch.testing.assert_close(got.logits, expected, rtol=1e-9, atol=1e-9)


def test_a_token_kind_whose_embedding_is_cut_starts_from_its_fill():
    weights = random_vit()
    circuit = random_parts(weights, "mean", seed=0)
    kept = circuit.kept.copy()
    kept[1] = False  # The embedding of the patches.
    circuit = Circuit(graph=circuit.graph, kept=kept, neurons=circuit.neurons, ablation="linear")
    fill = fill_of(weights, circuit, random_pixels(weights, 8, seed=8))
    pixels = random_pixels(weights, 3, seed=9)
    expected = masked_run(weights, pixels, circuit, fill).logits
    got = PartModel(weights, circuit, fill).run(pixels).logits
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_trace_holds_what_kept_parts_are():
    weights, pixels = random_vit(), random_pixels(random_vit(), 3)
    circuit = random_parts(weights, "mean", seed=3)
    fill = fill_of(weights, circuit, pixels)
    masked = masked_run(weights, pixels, circuit, fill)
    model = PartModel(weights, circuit, fill)
    run = model.run(pixels, trace=True)
    assert run.writes.keys() == {key for key, site in model.sites.items() if len(site.features)}
    for (layer, parts, kind), write in run.writes.items():
        rows = weights.rows_of(circuit.graph)[kind]
        if parts == "heads":
            whole = masked.heads[layer].permute(1, 2, 0, 3).flatten(2)
        else:
            whole = masked.neurons[layer]
        chosen = model.sites[layer, parts, kind].features
        torch.testing.assert_close(write.features, whole[:, rows][..., chosen])
        if parts == "heads":
            [after] = masked.inputs[4 * layer + 3]
            torch.testing.assert_close(write.stream, after[:, rows])


def test_a_circuit_that_cuts_edges_is_refused():
    weights = random_vit()
    kept = weights.graph.edges.copy()
    kept[0, 3] = False
    circuit = Circuit(graph=weights.graph, kept=kept, ablation="mean")
    with pytest.raises(CircuitError, match="whole heads and neurons, not edges"):
        PartModel(weights, circuit, fixed_fill("mean", weights, [random_pixels(weights)]))
