import pytest
from tiny import REFERENCE

import vitcut
from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.compact.model import CompactViT
from vitcut.compiler.cost import CostModel
from vitcut.compiler.merging import MERGES, num_streams
from vitcut.compiler.planning import plan_circuit
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ConfigError
from vitcut.graph import Graph
from vitcut.masked.fill import Fill
from vitcut.results import Results
from vitcut.runs import find_circuit

TIMING = [
    *("--runtimes", "torch", "--batches", "1", "--seconds", "0.05", "--min-rounds", "3"),
    *("--min-sample-ms", "0.1"),
]
FEW = ["--images", "32", "--verify-images", "8"]


@pytest.fixture
def scattered(finished, tmp_path):
    """A circuit of the run's model in which each query of a block reads something else."""
    graph = Graph(num_layers=2, num_heads=2)
    kept = graph.edges.copy()
    for head in (0, 1):
        for letter in "qk":
            kept[graph.head_source(0, head), graph.head_target(1, head, letter)] = False
    path = tmp_path / "circuit.json"
    Circuit(graph=graph, kept=kept, ablation="mean").save(path)
    return path


def cut(monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["cut", *map(str, words), *FEW, *TIMING]) == 0


@pytest.mark.parametrize("ablation", ["mean", "linear"])
def test_a_merged_circuit_is_saved_compiled_and_told_of(
    finished, scattered, tmp_path, monkeypatch, capsys, ablation
):
    out = tmp_path / "out"
    words = [scattered, "--merge", "--model", finished, "--ablation", ablation, "--out", out]
    cut(monkeypatch, *words)
    parent = Circuit.load(scattered).with_ablation(ablation)
    circuit = Circuit.load(find_circuit(out, None))
    (entry,) = circuit.provenance[MERGES]
    assert (entry["parent"], entry["edges_restored"]) == (parent.fingerprint, 4)
    assert circuit == Circuit.full(parent.graph, ablation=ablation)
    model = CompactViT.from_pretrained(out / "model")
    assert model.plan == plan_circuit(model.plan.shape, circuit)
    if ablation == "linear":
        assert Fill.load(out / "model" / "fill.safetensors").circuit == circuit.fingerprint

    point = Results.load(out / "results.json").points[-1]
    merged = point.faithfulness["merge"]
    assert (merged["edges_restored"], merged["streams"]) == (4, (7, 5))
    before, after = merged["kl"]
    assert before > after == pytest.approx(0, abs=1e-6)
    assert point.max_abs_diff < 1e-4
    line = f"merged: 4 edges came back, 7 -> 5 streams, KL on val images {before:.3f} -> "
    assert line + "0.000" in capsys.readouterr().out

    assert main(["show", str(out)]) == 0
    assert f"then merged: 4 edges came back to circuit {parent.fingerprint[:12]}, predicted " in (
        capsys.readouterr().out
    )


def test_where_nothing_saves_the_circuit_stays_and_the_line_says_so(
    finished, tmp_path, monkeypatch, capsys
):
    full = tmp_path / "circuit.json"
    Circuit.full(Graph(num_layers=2, num_heads=2)).save(full)
    out = tmp_path / "out"
    cut(monkeypatch, full, "--model", finished, "--out", out, "--merge=true")
    assert dict(Circuit.load(find_circuit(out, None)).provenance) == {}
    assert "nothing merged: with its 5 streams no edge that came back" in capsys.readouterr().out


def test_python_merges_too_and_without_being_asked_nothing_does(finished, scattered):
    model = vitcut.load_model(finished)
    images = vitcut.load_images(model=model)
    circuit, few = Circuit.load(scattered), {"images": 32, "verify_images": 8}
    plain = vitcut.cut(model, images, circuit, settings=CutSettings(**few), bench=None)
    assert (plain.circuit, "merge" in plain.faithfulness) == (circuit, False)
    merging = CutSettings(merge=True, batch=1, **few)
    merged = vitcut.cut(model, images, circuit, settings=merging, bench=None)
    assert merged.circuit == Circuit.full(circuit.graph)
    assert num_streams(merged.model.plan) < num_streams(plain.model.plan)
    with pytest.raises(ConfigError, match="merge brings edges back to a circuit that is there"):
        vitcut.cut(model, images, budget=vitcut.Budget(target_macs=0.5), settings=merging)


def test_streams_and_products_both_cost_and_more_so_for_many_images():
    graph = Graph(num_layers=6, num_heads=8)
    kept = graph.edges.copy()
    kept[graph.mlp_source(2), graph.head_target(3, 0, "q")] = False
    full, more_streams = Circuit.full(graph), Circuit(graph=graph, kept=kept, ablation="mean")
    cut_head = graph.edges.copy()
    cut_head[graph.head_source(2, 0)] = False
    fewer_products = Circuit(graph=graph, kept=cut_head, ablation="mean")

    def latency(circuit: Circuit, batch: int) -> float:
        costs = CostModel(batch=batch)
        return costs.latency_ms(plan_circuit(REFERENCE, circuit, costs))

    for batch in (1, 64):
        fewer, whole, more = (latency(c, batch) for c in (fewer_products, full, more_streams))
        assert fewer < whole < more
    assert latency(full, 64) > 10 * latency(full, 1)
