import onnxruntime
import pytest
import torch
from tiny import random_vit

from vitcut.circuit import Circuit
from vitcut.compact.info import ModelInfo
from vitcut.compiler.emit import compile_circuit
from vitcut.errors import ExactnessError
from vitcut.exports import watched
from vitcut.exports.watched import WatchedModel, write_watched
from vitcut.graph import Graph
from vitcut.masked.fill import zero_fill
from vitcut.model import forward
from vitcut.names import LETTERS
from vitcut.preprocessing import Preprocessing

INFO = ModelInfo(preprocessing=Preprocessing(image_size=4)).complete(4)
PICTURE = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8, generator=torch.manual_seed(0))


def without_constants(weights):
    """No head writes the same to every token: the compiler moves that into tables."""
    for block in weights.blocks:
        block.attn_norm.bias.zero_()
        block.attn.v_bias.zero_()
    return weights


def written_by_definition(weights, pixels):
    """The norm of what each head and MLP writes to each token, by part."""
    stream, found = forward.embed(weights, pixels), {}
    for layer, block in enumerate(weights.blocks):
        attn, normed = block.attn, forward.normalise(block.attn_norm, stream)[None]
        q, k, v = (forward.project(attn, letter, normed) for letter in LETTERS)
        wrote = forward.write(attn, forward.attend(q, k, attn.scale) @ v)
        found |= {f"attn.{layer}.{head}": one[0].norm(dim=-1) for head, one in enumerate(wrote)}
        stream = stream + wrote.sum(0) + attn.out_bias
        wrote = forward.run_mlp(block.mlp, forward.normalise(block.mlp_norm, stream))
        found[f"mlp.{layer}"] = wrote[0].norm(dim=-1)
        stream = stream + wrote + block.mlp.out_bias
    return found


@pytest.mark.parametrize("kinds", [(), ("cls", "patch")])
def test_what_parts_write_is_what_they_add_to_the_stream(kinds):
    weights = without_constants(random_vit())
    graph = Graph(num_layers=2, num_heads=2, kinds=kinds, readout=("cls",)[: len(kinds)])
    model = compile_circuit(weights, Circuit.full(graph), zero_fill(weights)).float()
    module = WatchedModel(model, INFO, by_kind=bool(kinds)).eval()
    with torch.inference_mode():
        _, written = module(PICTURE)
        pixels = (module.pictures.scaled(PICTURE) - module.pictures.shift) / module.pictures.scale
        expected = written_by_definition(weights, pixels.double())
    assert len(module.parts) == (6 if not kinds else 9)  # the last block writes the class token's
    for part, got in zip(module.parts, written.tolist(), strict=True):
        name, _, kind = part.rpartition(".") if kinds else (part, "", "")
        # Of the last block only what the classifier reads is computed.
        last = name.split(".")[1] == "1"
        tokens = slice(0, 1) if kind == "cls" or (last and not kinds) else slice(0, None)
        tokens = slice(1, None) if kind == "patch" else tokens
        assert got == pytest.approx(float(expected[name][tokens].mean()), rel=1e-4), part


@pytest.mark.graph
def test_the_file_answers_as_the_model_does(tmp_path, monkeypatch):
    weights = random_vit()
    graph = Graph(num_layers=2, num_heads=2)
    kept = graph.edges.copy()
    kept[1] = False  # nobody reads head 0 of block 0
    circuit = Circuit(graph=graph, kept=kept, ablation="zero", method="acdc")
    model = compile_circuit(weights, circuit, zero_fill(weights)).float()
    parts = write_watched(model, INFO, tmp_path / "model.onnx", by_kind=False)
    assert set(parts) == {"attn.0.1", "mlp.0", "attn.1.0", "attn.1.1", "mlp.1"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    got, written = session.run(None, {"pictures": PICTURE.numpy()})
    alone = watched.PictureModel(model, INFO).eval()
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(got), alone(PICTURE), atol=1e-5, rtol=0)
    assert len(written) == len(parts)
    monkeypatch.setattr(watched, "_FARTHEST", -1.0)
    with pytest.raises(ExactnessError, match="leave out with-model"):
        write_watched(model, INFO, tmp_path / "model.onnx", by_kind=False)
