import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.graph import Graph
from vitcut.reports.show import show_circuit


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def _shown(path, capsys):
    capsys.readouterr()
    assert main(["show", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_circuit_is_shown_by_block(finished, capsys):
    path = finished / "points" / "acdc-resample-0.03" / "circuit.json"
    circuit, out = Circuit.load(path), _shown(path, capsys)
    assert "circuit by acdc, tau 0.03, resample ablation, task shapes" in out
    assert f"edges kept {circuit.num_kept} of 46" in out
    assert f"heads kept {circuit.num_heads_kept} of 4" in out
    assert f"{int(circuit.kept[:, -1].sum())} / 7" in out


def test_a_model_is_shown_with_its_plan(finished, capsys):
    model = finished / "points" / "acdc-resample-0.03" / "model"
    out = _shown(model, capsys)
    assert "counts x tokens" in out
    assert "% of dense" in out
    assert f"edges kept {Circuit.load(model / 'circuit.json').num_kept} of 46" in out
    assert "mean ablation" in out
    assert "searched under resample ablation" in out


def test_a_run_is_shown_with_all_circuits_and_results(finished, capsys):
    out = _shown(finished, capsys)
    assert out.count("circuit by acdc") == 2
    for name in ("dense", "class-only", "acdc-resample-0.03", "acdc-resample-0.001"):
        assert name in out


def test_the_plan_of_a_point_is_shown_and_points_are_listed(finished, tmp_path, capsys):
    points = sorted(finished.glob("points/*"))
    assert main(["show", "--plan", str(finished)]) == 2
    assert f"give one of {points[0]}, {points[1]}\n" in capsys.readouterr().err
    assert main(["show", "--plan", str(points[0])]) == 0
    of_point = capsys.readouterr().out
    assert "classifier" in of_point
    shutil.copytree(points[0] / "model", tmp_path / "points" / "only" / "model")
    assert main(["show", "--plan", str(tmp_path)]) == 0
    assert capsys.readouterr().out == of_point


def test_a_dense_model_is_told_from_a_compact_one(finished, capsys):
    assert main(["show", str(finished / "dense")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


GRAPH = Graph(num_layers=2, num_heads=2, kinds=("cls", "patch"), readout=("cls",))


def _cells(capsys):
    """The rows of a printed table."""
    lines = capsys.readouterr().out.splitlines()
    return [
        [cell.strip() for cell in line.strip("│").split("│")] for line in lines if line[:1] == "│"
    ]


def _parts():
    heads, neurons = np.ones((2, 2, 2), dtype=bool), np.ones((2, 2, 3), dtype=bool)
    heads[0, 1, 1] = neurons[0, 1, :2] = neurons[1, 0] = False
    found = Circuit.of_parts(GRAPH, heads=heads, neurons=neurons, ablation="linear")
    return replace(found, method="fisher", task="shapes")


def test_a_circuit_of_parts_is_shown_by_block_and_token_kind(capsys):
    show_circuit(_parts())
    out = capsys.readouterr().out
    assert "circuit by fisher, linear ablation, task shapes" in out
    assert "heads kept 4 of 4 (in any token kind), neurons kept 44.4%" in out
    assert "edges kept" not in out
    show_circuit(_parts())
    assert _cells(capsys) == [
        ["0", "cls", "2 / 2", "0 1", "3 / 3"],
        ["", "patch", "1 / 2", "0", "1 / 3"],
        ["1", "cls", "2 / 2", "0 1", "0 / 3"],
        ["", "patch", "-", "", "-"],
    ]


def test_edges_are_shown_by_token_kind_where_they_were_cut(capsys):
    full = Circuit.full(GRAPH)
    kept = full.kept.copy()
    kept[GRAPH.source_numbers["embed.cls"], GRAPH.mlp_target(1, 0)] = False
    show_circuit(replace(full, kept=kept))
    rows = _cells(capsys)
    assert rows[2] == ["1", "cls", "2 / 2", "8 / 8", "8 / 8", "8 / 8", "5 / 6"]
    assert rows[3] == ["", "patch", "-", "-", "8 / 8", "8 / 8", "-"]
    assert rows[4] == ["classifier", "cls", "", "", "", "", "7 / 7"]


def test_a_plan_alone_is_shown_with_predicted_times(finished, capsys):
    model = finished / "points" / "acdc-resample-0.03" / "model"
    assert main(["show", str(model), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "circuit by" not in out
    assert "us, 1" in out
    assert "us, 64" in out
    assert main(["show", str(finished / "dense"), "--plan"]) == 2
    assert "is not a vitcut compact model" in capsys.readouterr().err


@pytest.mark.parametrize("width", [44, 50, 60])
def test_tables_fit_into_a_narrow_terminal_with_every_cell_whole(
    width, finished, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    model = finished / "points" / "acdc-resample-0.03" / "model"
    for words in (["show", str(model)], ["show", "--plan", str(model)], ["show", str(finished)]):
        assert main(words) == 0
        out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        table = [line for line in out.splitlines() if line[:1] in {*"┏┃┡│└├ "}]
        assert table
        assert max(map(len, table)) <= width
        assert "…" not in out


def test_a_finished_run_is_shown_with_the_verdict_first(finished, capsys):
    first = _shown(finished, capsys).splitlines()[0]
    assert re.match(r"acdc-resample-0.\d+: \d+ % of the MACs, .* points of coarse accuracy", first)
