import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import circuits, vits
from tiny import random_pixels, random_table, random_vit

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.intervention.ablation import fixed_table, mean_table, zero_table
from vitcut.intervention.forward import attend, classify, normalise, project_head, run_mlp
from vitcut.intervention.masking import full_run, masked_logits
from vitcut.names import LETTERS
from vitcut.vits.weights import ViTWeights


def masked_by_hand(weights: ViTWeights, pixels, circuit: Circuit, ablated) -> torch.Tensor:
    """The masked model edge by edge and head by head, from names alone."""
    graph, kept = circuit.graph, circuit.kept
    patches = F.conv2d(pixels, weights.patch_weight, weights.patch_bias, stride=weights.patch_size)
    patches = patches.flatten(2).transpose(1, 2) + weights.positions
    prefix = weights.prefix.expand(len(pixels), -1, -1)
    written = {"embed": torch.cat([prefix, patches], dim=1)}
    biases = torch.zeros(weights.width, dtype=weights.dtype)

    def read(target: str) -> torch.Tensor:
        total = biases.expand_as(written["embed"]).clone()
        for source, value in written.items():
            number = graph.source_numbers[source]
            total += value if kept[number, graph.target_numbers[target]] else ablated[number]
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
                )
                for letter in LETTERS
            )
            z = attend(q, k, block.attn.scale) @ v
            heads[f"attn.{layer}.{head}"] = z @ block.attn.out_weight[head].T
        written |= heads
        biases = biases + block.attn.out_bias
        written[f"mlp.{layer}"] = run_mlp(
            block.mlp, normalise(block.mlp_norm, read(f"mlp.{layer}"))
        )
        biases = biases + block.mlp.out_bias
    return classify(weights, read("classifier")[:, 0])


@given(data=st.data(), weights=vits())
def test_masked_model_is_the_sum_of_kept_and_ablated_sources(data, weights):
    circuit = data.draw(circuits(weights.graph))
    pixels, table = random_pixels(weights, images=2), random_table(weights)
    got = masked_logits(weights, pixels, circuit.kept, table)
    torch.testing.assert_close(
        got, masked_by_hand(weights, pixels, circuit, table), rtol=0, atol=1e-9
    )


@given(weights=vits())
def test_full_circuit_is_the_model_whatever_is_ablated(weights):
    pixels = random_pixels(weights)
    got = masked_logits(weights, pixels, weights.graph.edges, random_table(weights))
    torch.testing.assert_close(got, full_run(weights, pixels).logits, rtol=0, atol=1e-9)


def test_cutting_every_edge_leaves_output_biases_and_ablated_values():
    weights = random_vit()
    pixels, table = random_pixels(weights), random_table(weights)
    got = masked_logits(weights, pixels, np.zeros_like(weights.graph.edges), table)
    readout = table.sum(0)[0]
    for block in weights.blocks:
        readout = readout + block.attn.out_bias + block.mlp.out_bias
    expected = classify(weights, readout[None]).expand(len(pixels), -1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_ablated_values_may_differ_by_image():
    weights = random_vit()
    pixels = random_pixels(weights, images=3)
    kept = weights.graph.edges & (np.arange(len(weights.graph.edges)) % 2 == 0)[:, None]
    tables = torch.stack([random_table(weights, seed=i) for i in range(3)], dim=1)
    together = masked_logits(weights, pixels, kept, tables)
    for i in range(3):
        alone = masked_logits(weights, pixels[i : i + 1], kept, tables[:, i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_kept_of_another_model_is_refused():
    weights, other = random_vit(num_layers=1), random_vit(num_layers=2)
    with pytest.raises(CircuitError, match="do not fit"):
        masked_logits(weights, random_pixels(weights), other.graph.edges, zero_table(other))


def test_mean_table_is_the_mean_over_all_batches():
    weights = random_vit()
    pixels = random_pixels(weights, images=5)
    table = mean_table(weights, pixels.split(2))
    expected = torch.stack([source.mean(0) for source in full_run(weights, pixels).sources])
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-12)


def test_mean_over_no_images_is_refused():
    with pytest.raises(CircuitError, match="at least 1 calibration image"):
        mean_table(random_vit(), [])


def test_resample_has_no_fixed_table():
    with pytest.raises(CircuitError, match="choose mean or zero"):
        fixed_table("resample", random_vit(), [])
