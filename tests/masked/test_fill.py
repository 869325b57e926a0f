from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import split_circuits, vits
from tiny import random_fill, random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError, CircuitError
from vitcut.masked.fill import Fill, zero_fill
from vitcut.masked.masking import masked_run
from vitcut.tensors import write_tensors

TENSORS = ("sources", "neurons", "head_maps", "neuron_maps")
WEIGHTS = random_vit()


def linear_circuit(weights=WEIGHTS) -> Circuit:
    graph = weights.split_graph
    heads = np.ones((graph.num_layers, graph.num_heads, graph.num_kinds), dtype=bool)
    neurons = np.ones((graph.num_layers, graph.num_kinds, weights.num_neurons), dtype=bool)
    heads[0, 0, 1] = neurons[0, 1, 2] = False
    return Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation="linear")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "fill.safetensors"
    random_fill(WEIGHTS, linear_circuit()).save(path)
    return path


def rewrite(path, *, tensors=None, metadata=None) -> None:
    with safe_open(path, framework="pt") as stored:
        known = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        kept = stored.metadata()
    save_file({**known, **(tensors or {})}, path, metadata=kept if metadata is None else metadata)


@given(data=st.data(), weights=vits(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=20)
def test_a_saved_fill_comes_back_the_same(tmp_path_factory, data, weights, dtype):
    path = tmp_path_factory.mktemp("fills") / "fill.safetensors"
    circuit = data.draw(split_circuits(weights))
    fill = random_fill(weights, circuit).like(torch.zeros((), dtype=dtype))
    fill.save(path)
    loaded = Fill.load(path)
    assert loaded.circuit == fill.circuit
    assert loaded.fingerprint == fill.fingerprint
    for name in TENSORS:
        one, other = getattr(fill, name), getattr(loaded, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert other.dtype == dtype
            assert torch.equal(one, other)


def test_equal_fills_are_written_as_equal_bytes(file, tmp_path):
    Fill.load(file).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", TENSORS)
def test_the_fingerprint_depends_on_every_tensor(name):
    fill = random_fill(WEIGHTS, linear_circuit())
    changed = getattr(fill, name).clone()
    changed.view(-1)[0] += 1e-9
    assert replace(fill, **{name: changed}).fingerprint != fill.fingerprint


def test_the_fingerprint_depends_on_the_circuit_and_on_which_tensors_there_are():
    fill = random_fill(WEIGHTS, linear_circuit())
    assert replace(fill, circuit=None).fingerprint != fill.fingerprint
    assert replace(fill, head_maps=None).fingerprint != fill.fingerprint


def test_the_fingerprint_does_not_depend_on_the_layout_in_memory():
    fill = random_fill(WEIGHTS)
    turned = fill.sources.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert replace(fill, sources=turned).fingerprint == fill.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: rewrite(p, tensors={"sources": torch.zeros(3, 4)}), id="a tensor"),
        pytest.param(lambda p: rewrite(p, tensors={"more": torch.zeros(1)}), id="one tensor more"),
        pytest.param(
            lambda p: rewrite(p, metadata=of_another_circuit(p)),
            id="another circuit",
        ),
    ],
)
def test_an_altered_fill_is_refused(file, change):
    change(file)
    with pytest.raises(ArtefactError, match="was altered"):
        Fill.load(file)


def of_another_circuit(path):
    with safe_open(path, framework="pt") as stored:
        return {"vitcut": stored.metadata()["vitcut"].replace('"circuit": "', '"circuit": "0')}


def test_a_fill_without_a_hash_is_refused(file):
    rewrite(file, metadata={})
    with pytest.raises(ArtefactError, match="is not a vitcut fill file: it has no format_version"):
        Fill.load(file)


def test_a_newer_fill_is_refused(file):
    write_tensors(file, load_file(file), {"circuit": None}, version=4)
    with pytest.raises(ArtefactError, match="format_version 4, this vitcut reads up to 3: upgrade"):
        Fill.load(file)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64], ids=["empty", "text", "zeros"])
def test_what_is_no_tensor_file_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match="not a readable fill"):
        Fill.load(file)


def test_a_truncated_fill_is_refused(file):
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match="not a readable fill"):
        Fill.load(file)


def test_a_missing_fill_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "fill.safetensors", tmp_path):
        with pytest.raises(ArtefactError, match="not a readable fill"):
            Fill.load(path)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"more": torch.zeros(1)}, {"circuit": None}),
        ({"sources": torch.zeros(1)}, {"circuit": None}),
        ({"sources": torch.zeros(1, 1, 1, dtype=torch.int64)}, {"circuit": None}),
        ({"head_bias": torch.zeros(2)}, {"circuit": None}),
        ({}, {"circuit": 3}),
        ({}, {}),
        ({}, {"circuit": None, "more": 1}),
    ],
)
def test_what_is_no_fill_is_refused_even_under_its_own_hash(file, change, facts):
    write_tensors(file, load_file(file) | change, facts, version=3)
    with pytest.raises(ArtefactError, match="is not a fill: it holds head_"):
        Fill.load(file)


def test_a_fill_fits_the_circuit_that_it_was_made_for_alone():
    circuit = linear_circuit()
    fill = random_fill(WEIGHTS, circuit)
    fill.require_fit(circuit)
    neurons = circuit.neurons.copy()
    neurons[0, 1, 2] = True
    with pytest.raises(CircuitError, match="fit it again"):
        fill.require_fit(replace(circuit, neurons=neurons))


def test_means_fit_every_circuit_under_mean_and_linear_ablation():
    fill, circuit = random_fill(WEIGHTS), linear_circuit()
    pixels = random_pixels(WEIGHTS)
    linear = masked_run(WEIGHTS, pixels, circuit, fill).logits
    mean = masked_run(WEIGHTS, pixels, circuit.with_ablation("mean"), fill).logits
    assert torch.equal(linear, mean)


def test_maps_are_refused_where_the_ablation_is_not_linear():
    circuit = linear_circuit()
    maps = replace(random_fill(WEIGHTS, circuit), circuit=None)
    for only in (replace(maps, head_maps=None), replace(maps, neuron_maps=None)):
        only.require_fit(circuit)
        with pytest.raises(CircuitError, match=r"circuit\.with_ablation\('linear'\)"):
            only.require_fit(circuit.with_ablation("mean"))


@pytest.mark.parametrize("name", ["sources", "neurons"])
def test_values_are_refused_under_zero_ablation(name):
    circuit, zeros = linear_circuit().with_ablation("zero"), zero_fill(WEIGHTS)
    zeros.require_fit(circuit)
    values = getattr(zeros, name).clone()
    values[-1, -1, -1] = 1e-30
    with pytest.raises(CircuitError, match="not all zero"):
        replace(zeros, **{name: values}).require_fit(circuit)


def test_a_fill_without_neurons_is_refused_where_neurons_are_cut():
    circuit = linear_circuit()
    fill = replace(random_fill(WEIGHTS), neurons=None)
    with pytest.raises(CircuitError, match="has no values for them"):
        fill.require_fit(circuit)
    fill.require_fit(replace(circuit, neurons=None))
