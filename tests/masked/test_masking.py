import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import circuits, split_circuits, vits
from tiny import random_fill, random_pixels, random_table, random_vit

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.masked.fill import Fill, zero_fill
from vitcut.masked.masking import full_run, masked_logits, masked_run
from vitcut.model.forward import (
    activate,
    classify,
    normalise,
    project_head,
    read_out,
)
from vitcut.model.weights import ViTWeights
from vitcut.names import LETTERS


def masked_by_hand(weights: ViTWeights, pixels, circuit: Circuit, fill: Fill) -> torch.Tensor:
    """The masked model edge by edge, head by head and token by token, from names alone."""
    graph, kept = circuit.graph, circuit.kept
    whole = weights.graph.source_numbers
    spans = dict(zip(graph.kinds or ("all",), weights.rows_of(graph), strict=True))
    patches = F.conv2d(pixels, weights.patch_weight, weights.patch_bias, stride=weights.patch_size)
    patches = patches.flatten(2).transpose(1, 2) + weights.positions
    if weights.patch_norm is not None:
        patches = normalise(weights.patch_norm, patches)
    prefix = weights.prefix.expand(len(pixels), -1, -1)
    written = {"embed": torch.cat([prefix, patches], dim=1)}
    biases = torch.zeros(weights.width, dtype=weights.dtype)
    # A position that is cut is computed here like any other, but no query sees it.
    there = np.ones(weights.num_tokens, dtype=bool)
    if circuit.positions is not None:
        there[weights.num_prefix :] = circuit.positions
    absent = torch.zeros(weights.num_tokens, dtype=weights.dtype)
    absent[torch.from_numpy(~there)] = -torch.inf

    def read(target: str) -> torch.Tensor:
        total = biases.expand_as(written["embed"]).clone()
        for source, value in written.items():
            for kind, span in spans.items():
                suffix = f".{kind}" if graph.kinds else ""
                if (number := graph.target_numbers.get(target + suffix)) is None:
                    continue
                alive = kept[graph.source_numbers[source + suffix], number]
                table = fill.sources[whole[source]]
                total[:, span] += value[:, span] if alive else table[span]
        return total

    for layer, block in enumerate(weights.blocks):
        heads = {}
        for head in range(graph.num_heads):
            q, k, v = (
                project_head(
                    block.attn,
                    letter,
                    head,
                    normalise(block.attn_norm, read(f"attn.{layer}.{head}.{letter}")),
                    slice(None),
                )
                for letter in LETTERS
            )
            z = torch.softmax(q @ k.mT * block.attn.scale + absent, -1) @ v
            value = z @ block.attn.out_weight[head].T
            if fill.head_maps is not None:
                for kind, span in enumerate(spans.values()):
                    value[:, span] += z[:, span] @ fill.head_maps[layer, kind, head].T
            heads[f"attn.{layer}.{head}"] = value
        written |= heads
        biases = biases + block.attn.out_bias
        normed = normalise(block.mlp_norm, read(f"mlp.{layer}"))
        written[f"mlp.{layer}"] = mlp_by_hand(block.mlp, normed, circuit, fill, (layer, spans))
        biases = biases + block.mlp.out_bias
    return classify(weights, read_out(weights, read("classifier")[:, torch.from_numpy(there)]))


def mlp_by_hand(mlp, normed, circuit: Circuit, fill: Fill, place) -> torch.Tensor:
    layer, spans = place
    hidden = activate(mlp, normed)
    value = torch.zeros_like(normed)
    for kind, span in enumerate(spans.values()):
        for neuron in range(hidden.shape[-1]):
            alive = circuit.neurons is None or circuit.neurons[layer, kind, neuron]
            now = hidden[:, span, neuron] if alive else fill.neurons[layer, span, neuron]
            value[:, span] += now[..., None] * mlp.out_weight[:, neuron]
            if alive and circuit.neurons is not None and fill.neuron_maps is not None:
                value[:, span] += now[..., None] * fill.neuron_maps[layer, kind, :, neuron]
    return value


@given(data=st.data(), weights=vits())
def test_masked_model_is_the_sum_of_kept_and_ablated_parts(data, weights):
    circuit = data.draw(split_circuits(weights))
    pixels, fill = random_pixels(weights, images=2), random_fill(weights, circuit)
    got = masked_run(weights, pixels, circuit, fill).logits
    torch.testing.assert_close(
        got, masked_by_hand(weights, pixels, circuit, fill), rtol=0, atol=1e-9
    )


@given(data=st.data(), weights=vits())
def test_a_split_circuit_computes_what_it_was_split_from(data, weights):
    circuit = data.draw(circuits(weights.graph))
    split = circuit.split(weights.split_graph.kinds, weights.split_graph.readout)
    pixels, fill = random_pixels(weights, images=2), random_fill(weights, circuit)
    torch.testing.assert_close(
        masked_run(weights, pixels, split, fill).logits,
        masked_run(weights, pixels, circuit, fill).logits,
        rtol=0,
        atol=1e-9,
    )


@given(weights=vits(), tokens=st.sampled_from(["all", "split"]))
def test_full_circuit_is_the_model_whatever_is_ablated(weights, tokens):
    pixels, circuit = random_pixels(weights), Circuit.full(weights.graph_of(tokens))
    got = masked_run(weights, pixels, circuit, random_fill(weights)).logits
    torch.testing.assert_close(got, full_run(weights, pixels).logits, rtol=0, atol=1e-9)


def test_cutting_every_edge_leaves_output_biases_and_ablated_values():
    weights = random_vit()
    pixels, table = random_pixels(weights), random_table(weights)
    got = masked_logits(weights, pixels, np.zeros_like(weights.graph.edges), Fill(sources=table))
    readout = table.sum(0)[0]
    for block in weights.blocks:
        readout = readout + block.attn.out_bias + block.mlp.out_bias
    expected = classify(weights, readout[None, None]).expand(len(pixels), -1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_ablated_values_may_differ_by_image():
    weights = random_vit()
    pixels = random_pixels(weights, images=3)
    kept = weights.graph.edges & (np.arange(len(weights.graph.edges)) % 2 == 0)[:, None]
    tables = torch.stack([random_table(weights, seed=i) for i in range(3)], dim=1)
    together = masked_logits(weights, pixels, kept, Fill(sources=tables))
    for i in range(3):
        alone = masked_logits(weights, pixels[i : i + 1], kept, Fill(sources=tables[:, i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_kept_of_another_model_is_refused():
    weights, other = random_vit(num_layers=1), random_vit(num_layers=2)
    with pytest.raises(CircuitError, match="do not fit"):
        masked_logits(weights, random_pixels(weights), other.graph.edges, zero_fill(other))


def test_neurons_of_another_model_are_refused():
    weights = random_vit(hidden=5)
    with pytest.raises(CircuitError, match=r"shape \(2, 1, 4\), this model needs \(2, 1, 5\)"):
        masked_logits(
            weights,
            random_pixels(weights),
            weights.graph.edges,
            zero_fill(weights),
            neurons=np.ones((2, 1, 4), dtype=bool),
        )


def test_neurons_are_not_cut_in_silence_without_values_for_them():
    weights = random_vit(hidden=5)
    with pytest.raises(CircuitError, match="the fill has no values for them"):
        masked_logits(
            weights,
            random_pixels(weights),
            weights.graph.edges,
            Fill(sources=random_table(weights)),
            neurons=np.zeros((2, 1, 5), dtype=bool),
        )


def test_positions_of_another_model_are_refused():
    weights = random_vit()
    circuit = Circuit(
        graph=weights.graph,
        kept=weights.graph.edges,
        positions=np.array([True, False]),
        ablation="mean",
    )
    with pytest.raises(CircuitError, match="2 patches per image, this one has 4"):
        masked_run(weights, random_pixels(weights), circuit, random_fill(weights))


def test_a_fill_of_other_tokens_is_refused():
    weights, larger = random_vit(), random_vit(patches_per_side=3)
    circuit = Circuit.full(weights.graph)
    with pytest.raises(CircuitError, match="a model with 10 tokens, got one with 5"):
        masked_run(weights, random_pixels(weights), circuit, random_fill(larger))
