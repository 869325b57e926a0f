from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from strategies import parts_per_kind, skipping_a_head
from tiny import random_fill, random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.compiler.emit import compile_circuit
from vitcut.runtimes.onnx_runtime import export_onnx, load_session

pytestmark = pytest.mark.graph


def compiled(density, *, letters_cut=""):
    weights = random_vit(num_layers=2, num_heads=3, width=8).to(torch.float32)
    graph = weights.graph
    kept = graph.edges & (np.random.default_rng(0).random(graph.edges.shape) < density)
    kept[:, [t.role in letters_cut and t.layer == 1 and t.head < 2 for t in graph.targets]] = False
    circuit = Circuit(graph=graph, kept=kept, ablation="mean")
    return compile_circuit(weights, circuit, random_fill(weights)), weights


def with_gaps():
    weights = random_vit(num_layers=2, num_heads=3, width=8).to(torch.float32)
    compact = compile_circuit(weights, skipping_a_head(weights.graph), random_fill(weights))
    assert any(getattr(module, "has_gaps", False) for module in compact.modules())
    return compact, weights


def with_tables(density, letters_cut):
    compact, weights = compiled(density, letters_cut=letters_cut)
    assert any(".tables." in name for name in compact.state_dict())
    return compact, weights


def per_kind():
    """Block 0 keeps parts of both kinds, block 1 of the class token alone."""
    weights = random_vit(num_layers=2, num_heads=3, width=16, hidden=9).to(torch.float32)
    circuit = parts_per_kind(weights)
    compact = compile_circuit(weights, circuit, random_fill(weights, circuit))
    head_sets = [item for block in compact.plan.blocks for item in block.attention.head_sets]
    assert any(item.keys for item in head_sets)
    assert any(not item.keys for item in head_sets)
    return compact, weights


def with_every_kind_of_block():
    """Gates, norms over neurons, of queries and keys, rotary positions; two of four patches."""
    kinds = {"gated": True, "neuron_norm": True, "head_norm": True, "rotary": True}
    weights = random_vit(num_layers=2, num_heads=3, width=16, head_dim=4, hidden=9, **kinds)
    weights = weights.to(torch.float32)
    circuit = replace(parts_per_kind(weights), positions=np.array([True, False, False, True]))
    compact = compile_circuit(weights, circuit, random_fill(weights, circuit))
    assert compact.patch_embed.chosen.tolist() == [0, 3]
    assert any(0 < mlp.hidden < 9 for block in compact.plan.blocks for mlp in block.mlps)
    return compact, weights


def of_constants():
    """The empty circuit: the same logits for every image."""
    compact, weights = compiled(0.0)
    assert [name for name, _ in compact.named_parameters()] == ["logits"]
    return compact, weights


CASES = {
    "constants": of_constants,
    "token kinds and neurons": per_kind,
    "every kind of block": with_every_kind_of_block,
    "head gaps": with_gaps,
    "a table of keys": lambda: with_tables(0.5, "k"),
    "a table of queries": lambda: with_tables(0.7, "q"),
    "a fixed pattern": lambda: with_tables(0.7, "qk"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_onnx_file_of_a_compact_model_gives_its_logits_at_any_batch_size(case, tmp_path):
    compact, weights = CASES[case]()
    path = tmp_path / "model.onnx"
    export_onnx(compact, path, example=random_pixels(weights, 2))
    for batch in (1, 5):
        pixels = random_pixels(weights, batch)
        got = load_session(path, batch=batch, threads=1).run(pixels)
        torch.testing.assert_close(got, compact(pixels).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [per_kind, lambda: compiled(0.6)])
def test_it_exports_with_a_dynamic_batch(make):
    compact, weights = make()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(
        compact, (random_pixels(weights, 2),), dynamic_shapes=shapes
    ).module()
    pixels = random_pixels(weights, 5)
    torch.testing.assert_close(exported(pixels), compact(pixels))


@pytest.mark.parametrize("make", [per_kind, lambda: compiled(0.6)])
def test_it_compiles_as_one_graph(make):
    compact, weights = make()
    pixels = random_pixels(weights)
    whole = torch.compile(compact, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(pixels), compact(pixels))


def test_the_onnx_file_looks_for_no_means_and_the_module_keeps_its_own(tmp_path):
    compact, weights = per_kind()
    before = {name: tensor.clone() for name, tensor in compact.state_dict().items()}
    export_onnx(compact, tmp_path / "model.onnx", example=random_pixels(weights, 2))
    operations = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "RMSNormalization" in operations
    assert "LayerNormalization" not in operations
    assert all(torch.equal(tensor, before[name]) for name, tensor in compact.state_dict().items())
