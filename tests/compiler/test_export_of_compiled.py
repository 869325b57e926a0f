import io

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import random_pixels, random_table, random_vit

from vitcut.circuit import Circuit
from vitcut.compiler.emit import compile_circuit

pytestmark = pytest.mark.graph


def compiled(density, *, letters_cut=""):
    weights = random_vit(num_layers=2, num_heads=3, width=8).to(torch.float32)
    graph = weights.graph
    kept = graph.edges & (np.random.default_rng(0).random(graph.edges.shape) < density)
    kept[:, [t.kind in letters_cut and t.layer == 1 and t.head < 2 for t in graph.targets]] = False
    circuit = Circuit(graph=graph, kept=kept, ablation="mean")
    return compile_circuit(weights, circuit, random_table(weights)), weights


CASES = [(0.5, "k"), (0.7, "qk")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("density", "letters_cut"), CASES)
def test_onnx_runtime_agrees_at_another_batch_size(density, letters_cut):
    compact, weights = compiled(density, letters_cut=letters_cut)
    program = torch.onnx.export(
        compact,
        (random_pixels(weights, 2),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    stream = io.BytesIO()
    program.save(stream)
    session = onnxruntime.InferenceSession(stream.getvalue())
    pixels = random_pixels(weights, 5)
    (got,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    np.testing.assert_allclose(got, compact(pixels).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_it_exports_with_a_dynamic_batch():
    compact, weights = compiled(0.6)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(
        compact, (random_pixels(weights, 2),), dynamic_shapes=shapes
    ).module()
    pixels = random_pixels(weights, 5)
    torch.testing.assert_close(exported(pixels), compact(pixels))


def test_it_compiles_as_one_graph():
    compact, weights = compiled(0.6)
    pixels = random_pixels(weights)
    whole = torch.compile(compact, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(pixels), compact(pixels))
