import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import DENSITIES, undisturbed, vits
from tiny import random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError, ConfigError
from vitcut.masked import fitting
from vitcut.masked.fitting import (
    Fitter,
    add_ridge,
    fit_fill,
    fixed_fill,
    mean_fill,
    regress,
    site_statistics,
)
from vitcut.masked.masking import full_run, masked_run
from vitcut.model.forward import (
    activate,
    attend,
    embed,
    normalise,
    project,
    read_out,
    readout_features,
)
from vitcut.model.weights import ViTWeights, map_tensors
from vitcut.names import LETTERS


@st.composite
@undisturbed
def parts(draw: st.DrawFn, weights: ViTWeights) -> Circuit:
    """Circuits that cut whole heads and neurons, under linear ablation."""
    graph = weights.graph_of(draw(st.sampled_from(["all", "split"])))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    density = draw(st.sampled_from(DENSITIES))
    return circuit_of(
        weights,
        random.random((graph.num_layers, graph.num_heads, graph.num_kinds)) < density,
        random.random((graph.num_layers, graph.num_kinds, weights.num_neurons)) < density,
    )


def circuit_of(weights, heads=None, neurons=None) -> Circuit:
    graph = weights.split_graph
    if heads is not None and heads.shape[2] == 1:
        graph = weights.graph
    if heads is None:
        heads = np.ones((graph.num_layers, graph.num_heads, graph.num_kinds), dtype=bool)
    if neurons is None:
        neurons = np.ones((graph.num_layers, graph.num_kinds, weights.num_neurons), dtype=bool)
    return Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation="linear")


def cut_literally(weights: ViTWeights, circuit: Circuit, pixels, ridge: float) -> torch.Tensor:
    """Logits with a_cut[t] := R a_kept[t] + c[t] put into the activations, block by block.

    What they miss of the full model's logits is predicted from the classifier's features.
    """
    graph, rows = circuit.graph, weights.rows_of(circuit.graph)
    shape = (graph.num_layers, graph.num_heads + 1, graph.num_kinds)
    heads = circuit.kept[graph.num_kinds :].any(1).reshape(shape)[:, :-1]
    # What reaches nothing counts as cut; nothing can tell.
    stream = embed(weights, pixels)
    for layer, block in enumerate(weights.blocks):
        normed = normalise(block.attn_norm, stream)[None]
        q, k, v = (project(block.attn, letter, normed) for letter in LETTERS)
        z = (attend(q, k, block.attn.scale) @ v).permute(1, 2, 0, 3)
        flat, size = z.flatten(2).numpy().copy(), z.shape[3]
        for kind, span in enumerate(rows):
            kept = heads[layer, :, kind].repeat(size)
            flat[:, span] = predict(flat[:, span], kept, ridge)
        z = torch.from_numpy(flat).view_as(z)
        stream = stream + torch.einsum("nthd,hwd->ntw", z, block.attn.out_weight)
        stream = stream + block.attn.out_bias
        hidden = activate(block.mlp, normalise(block.mlp_norm, stream)).numpy().copy()
        for kind, span in enumerate(rows):
            hidden[:, span] = predict(hidden[:, span], circuit.neurons[layer, kind], ridge)
        stream = stream + torch.from_numpy(hidden) @ block.mlp.out_weight.T + block.mlp.out_bias
    features = readout_features(weights, read_out(weights, stream)).numpy()
    own = features @ weights.head_weight.numpy().T + weights.head_bias.numpy()
    missed = full_run(weights, pixels).logits.numpy() - own
    slope = least_squares(
        features - features.mean(0), missed - missed.mean(0), ridge, 1e-10 * (features**2).mean()
    )
    return torch.from_numpy(own + missed.mean(0) + (features - features.mean(0)) @ slope)


def least_squares(
    known: NDArray[np.float64], wanted: NDArray[np.float64], ridge: float, floor: float
):
    """Ridge regression without an intercept; the ridge as rows of a least-squares problem."""
    size = known.shape[1]
    if not np.isfinite(ridge):
        return np.zeros((size, wanted.shape[1]))
    added = np.sqrt(len(known) * (ridge * known.var(0).mean() + floor)) * np.eye(size)
    known = np.concatenate([known, added])
    return np.linalg.lstsq(known, np.concatenate([wanted, np.zeros((size, wanted.shape[1]))]))[0]


def predict(site: NDArray[np.float64], kept: NDArray[np.bool_], ridge: float):
    """The site with its cut features predicted; the ridge as rows of a least-squares problem."""
    means, size = site.mean(0), site.shape[2]
    centred = (site - means).reshape(-1, size)
    found = np.tile(means, (len(site), 1, 1))
    if kept.any() and np.isfinite(ridge):
        added = np.sqrt(len(centred) * ridge * centred.var(0).mean()) * np.eye(kept.sum())
        known = np.concatenate([centred[:, kept], added])
        wanted = np.concatenate([centred[:, ~kept], np.zeros((kept.sum(), (~kept).sum()))])
        R = np.linalg.lstsq(known, wanted, rcond=None)[0]
        found[..., ~kept] += (centred[:, kept] @ R).reshape(*site.shape[:2], -1)
    found[..., kept] = site[..., kept]
    return found


def fitted(weights, circuit, pixels, ridge=None):
    return fit_fill(weights, circuit, pixels, mean_fill(weights, [pixels]), ridge=ridge)


def test_mean_fill_is_the_mean_over_all_batches():
    weights = random_vit()
    pixels = random_pixels(weights, images=5)
    fill, run = mean_fill(weights, pixels.split(2)), full_run(weights, pixels)
    expected = torch.stack([source.mean(0) for source in run.sources])
    torch.testing.assert_close(fill.sources, expected, rtol=0, atol=1e-12)
    expected = torch.stack([hidden.mean(0) for hidden in run.neurons])
    torch.testing.assert_close(fill.neurons, expected, rtol=0, atol=1e-12)


def test_mean_over_no_images_is_refused():
    with pytest.raises(CircuitError, match="at least 1 calibration image"):
        mean_fill(random_vit(), [])


@pytest.mark.parametrize("ablation", ["resample", "linear"])
def test_what_differs_by_image_or_circuit_has_no_fixed_fill(ablation):
    with pytest.raises(CircuitError, match="choose mean or zero"):
        fixed_fill(ablation, random_vit(), [])


@given(data=st.data(), weights=vits(), ridge=st.sampled_from([1e-3, 0.1, 10.0]))
@settings(max_examples=60)
def test_the_fill_is_a_regression_in_the_already_cut_model(data, weights, ridge):
    circuit, pixels = data.draw(parts(weights)), random_pixels(weights, images=6)
    fill = fitted(weights, circuit, pixels, ridge).fill
    got = masked_run(weights, pixels, circuit, fill).logits
    expected = cut_literally(weights, circuit, pixels, ridge)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@given(data=st.data(), weights=vits())
@settings(max_examples=20)
def test_a_very_large_ridge_leaves_the_means_of_the_cut_model(data, weights):
    circuit, pixels = data.draw(parts(weights)), random_pixels(weights, images=6)
    fill = fitted(weights, circuit, pixels, 1e30).fill
    got = masked_run(weights, pixels, circuit, fill).logits
    expected = cut_literally(weights, circuit, pixels, np.inf)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def with_twins(weights: ViTWeights) -> ViTWeights:
    """The last head of every block and the last neuron of every MLP repeat the first."""

    def twin(tensor, dim=0):
        first, rest = tensor.narrow(dim, 0, 1), tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        return torch.cat([rest, first], dim=dim)

    weights = map_tensors(weights, torch.clone)
    for block in weights.blocks:
        for letter in LETTERS:
            for name in (f"{letter}_weight", f"{letter}_bias"):
                object.__setattr__(block.attn, name, twin(getattr(block.attn, name)))
        for name in ("in_weight", "in_bias"):
            object.__setattr__(block.mlp, name, twin(getattr(block.mlp, name)))
    return weights


def test_twins_of_kept_heads_and_neurons_cost_nothing():
    weights = with_twins(random_vit(num_heads=3, hidden=6))
    circuit = circuit_of(weights)
    heads, neurons = np.ones((2, 3, 2), dtype=bool), circuit.neurons.copy()
    heads[:, -1] = neurons[..., -1] = False
    circuit = circuit_of(weights, heads, neurons)
    pixels, unseen = (random_pixels(weights, images=40, seed=seed) for seed in (1, 2))
    fill = fitted(weights, circuit, pixels, 1e-12).fill
    got = masked_run(weights, unseen, circuit, fill).logits
    torch.testing.assert_close(got, full_run(weights, unseen).logits, rtol=0, atol=1e-7)


def test_the_fill_is_bound_to_the_circuit_and_as_precise_as_the_weights():
    weights = random_vit().to(torch.float32)
    circuit, pixels = circuit_of(weights), random_pixels(weights, images=5)
    fit = fitted(weights, circuit, pixels)
    assert fit.fill.circuit == circuit.fingerprint
    for tensor in (fit.fill.sources, fit.fill.neurons, fit.fill.head_maps, fit.fill.neuron_maps):
        assert tensor.dtype == torch.float32
    assert {site.covariance.dtype for site in fit.statistics.values()} == {torch.float64}


def test_an_edge_that_is_cut_while_its_head_lives_carries_means_of_all_that_it_writes():
    weights = random_vit()
    pixels, heads = random_pixels(weights, images=6), np.ones((2, 2, 2), dtype=bool)
    heads[0, 1, 1] = False
    circuit, means = circuit_of(weights, heads), mean_fill(weights, [pixels])
    fit = fit_fill(weights, circuit, pixels, means, ridge=0.1)
    patches = weights.kind_rows["patch"]
    mapped = fit.statistics[0, "heads", 1].means[:, :3] @ fit.fill.head_maps[0, 1, 0].T
    assert mapped.abs().max() > 0.01
    torch.testing.assert_close(fit.fill.sources[1, patches], means.sources[1, patches] + mapped)
    untouched = fit.fill.sources[1:3, weights.kind_rows["cls"]]
    torch.testing.assert_close(untouched, means.sources[1:3, weights.kind_rows["cls"]])


def ridge_of(features: torch.Tensor) -> float:
    """Which ridge was chosen, told from the diagonal."""
    found = site_statistics([features], None).covariance
    plain = site_statistics([features], 0.0).covariance
    return float((found - plain).diagonal().mean() / plain.diagonal().mean())


def features(images: int, noise: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(images, 2, 3, generator=draw, dtype=torch.float64)
    mixed = common @ torch.randn(3, 12, generator=draw, dtype=torch.float64)
    return mixed + noise * torch.randn(images, 2, 12, generator=draw, dtype=torch.float64)


def test_the_cross_validated_ridge_is_one_of_the_list_and_smaller_for_more_images():
    chosen = [ridge_of(features(images, noise=1.0)) for images in (6, 50, 1000)]
    assert chosen == pytest.approx([1.0, 0.1, 0.01], rel=1e-9)


def test_noise_alone_takes_the_largest_ridge():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 2, 10, generator=draw, dtype=torch.float64)
    assert ridge_of(noise) == pytest.approx(1.0)


@pytest.mark.parametrize("images", [2, 3])
def test_too_few_images_to_validate_on_take_the_largest_ridge(images):
    assert ridge_of(features(images, noise=0)) == pytest.approx(1.0)


def test_the_ridge_is_a_fraction_of_the_mean_variance():
    covariance = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    torch.testing.assert_close(
        add_ridge(covariance, 0.1), torch.tensor([[1.2, 0.5], [0.5, 3.2]]), rtol=1e-6, atol=0
    )


def test_statistics_of_many_tokens_are_of_several_images():
    draw = torch.Generator().manual_seed(0)
    site = torch.randn(8, 3000, 2, generator=draw, dtype=torch.float64)
    found = site_statistics([site], 0.0).covariance
    torch.testing.assert_close(found, torch.eye(2, dtype=found.dtype), rtol=0, atol=0.3)


def test_a_site_where_nothing_varies_can_be_inverted():
    found = site_statistics([torch.ones(6, 2, 3)], None)
    assert torch.isfinite(torch.linalg.inv(found.covariance)).all()
    regression = regress(found.covariance, torch.tensor([True, False, True]))
    assert torch.equal(regression, torch.zeros(3, 3, dtype=torch.float64))


def test_dead_neurons_do_not_disturb_the_others():
    weights = random_vit(activation="relu", num_layers=1, hidden=6)
    weights.blocks[0].mlp.in_bias[:3] = -1e3
    neurons = np.ones((1, 2, 6), dtype=bool)
    neurons[..., [0, 3]] = False
    circuit, pixels = circuit_of(weights, neurons=neurons), random_pixels(weights, images=8)
    fill = fitted(weights, circuit, pixels).fill
    assert torch.isfinite(fill.neuron_maps).all()
    assert (fill.neuron_maps[..., :3].abs() < 1e-12).all()
    assert torch.isfinite(masked_run(weights, pixels, circuit, fill).logits).all()


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_a_circuit_under_another_ablation_is_refused(ablation):
    weights = random_vit()
    with pytest.raises(CircuitError, match=f"under linear ablation, got {ablation}"):
        fitted(weights, circuit_of(weights).with_ablation(ablation), random_pixels(weights))


def test_a_single_image_is_refused():
    weights = random_vit()
    with pytest.raises(CircuitError, match="at least 2 calibration images, got 1"):
        fitted(weights, circuit_of(weights), random_pixels(weights, images=1))


def fitter_of(weights, pixels, **settings) -> tuple[Fitter, list[int]]:
    """A fitter, and how often it has asked for its images."""
    asked: list[int] = []

    def read() -> torch.Tensor:
        asked.append(len(pixels))
        return pixels

    return Fitter(weights, read, **{"ridge": 0.1, "memory_gib": 64.0, **settings}), asked


def test_a_fitter_reads_its_images_when_a_fill_needs_them():
    weights = random_vit()
    pixels = random_pixels(weights, images=6)
    fitter, asked = fitter_of(weights, pixels)
    circuit = circuit_of(weights)
    zeros = fitter.fit(circuit.with_ablation("zero"))
    assert not zeros.fill.sources.any()
    assert not asked
    means = fitter.fit(circuit.with_ablation("mean"))
    assert means.statistics is None
    assert means.fill is fitter.means
    assert asked == [6]
    fitter.fit(circuit)
    fitter.fit(circuit)
    assert asked == [6, 6]


def test_a_fitter_fits_as_fit_fill_does_and_keeps_the_last_fit():
    weights, heads = random_vit(), np.ones((2, 2, 2), dtype=bool)
    pixels = random_pixels(weights, images=6)
    fitter, _ = fitter_of(weights, pixels)
    heads[0, 1, 1] = False
    circuit, other = circuit_of(weights, heads), circuit_of(weights)
    fit, alone = fitter.fit(circuit), fit_fill(weights, circuit, pixels, ridge=0.1)
    assert fit.fill.fingerprint == alone.fill.fingerprint
    assert fit.statistics.keys() == alone.statistics.keys()
    assert fitter.fit(circuit) is fit
    assert fitter.fit(other).fill.circuit == other.fingerprint
    assert fitter.fit(circuit) is not fit


def test_a_fitter_refuses_a_fit_that_takes_too_much_memory():
    weights = random_vit()
    fitter, _ = fitter_of(weights, random_pixels(weights, images=6), memory_gib=1e-6)
    fitter.fit(circuit_of(weights).with_ablation("zero"))
    with pytest.raises(ConfigError, match=r"means over 6 images needs about"):
        fitter.fit(circuit_of(weights).with_ablation("mean"))
    with pytest.raises(ConfigError, match=r"a fit to 6 images needs about .* memory-gib allows"):
        fitter.fit(circuit_of(weights))


def test_a_fit_does_not_write_into_the_means():
    weights, pixels = random_vit(), random_pixels(random_vit(), images=6)
    means = mean_fill(weights, [pixels])
    before = means.fingerprint
    heads = np.zeros((2, 2, 2), dtype=bool)
    fit = fit_fill(weights, circuit_of(weights, heads), pixels, means)
    assert fit.fill.fingerprint != before
    assert means.fingerprint == before


@given(weights=vits(), data=st.data(), batch=st.integers(1, 5))
@settings(max_examples=15)
def test_batches_of_images_change_no_fit(weights, data, batch):
    circuit, pixels = data.draw(parts(weights)), random_pixels(weights, images=9)
    whole = fitted(weights, circuit, pixels, 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_BATCH", batch)
        split = fitted(weights, circuit, pixels, 0.1)
    for name in ("sources", "neurons", "head_maps", "neuron_maps"):
        torch.testing.assert_close(
            getattr(split.fill, name), getattr(whole.fill, name), rtol=1e-7, atol=1e-9
        )


def test_a_circuit_of_whole_parts_needs_no_means():
    weights = random_vit()
    heads = np.ones((2, 2, 2), dtype=bool)
    heads[1, 0, 0] = False
    circuit, pixels = circuit_of(weights, heads), random_pixels(weights, images=8)
    with_means = fitted(weights, circuit, pixels, 0.1).fill
    without = fit_fill(weights, circuit, pixels, ridge=0.1).fill
    expected = masked_run(weights, pixels, circuit, with_means).logits
    assert torch.equal(masked_run(weights, pixels, circuit, without).logits, expected)


def test_a_circuit_that_cuts_edges_needs_the_means():
    weights = random_vit()
    kept = weights.graph.edges.copy()
    kept[0, 3] = False
    circuit = Circuit(graph=weights.graph, kept=kept, ablation="linear")
    pixels = random_pixels(weights, images=8)
    with pytest.raises(CircuitError, match="cuts single edges: give the means"):
        fit_fill(weights, circuit, pixels, ridge=0.1)
    assert fitted(weights, circuit, pixels, 0.1).fill.circuit == circuit.fingerprint
