import pytest

from vitcut.circuit import Circuit
from vitcut.cli import main


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
    assert "query rows" in out
    assert "% of dense" in out
    assert f"edges kept {Circuit.load(model / 'circuit.json').num_kept} of 46" in out
    assert "mean ablation" in out
    assert "searched under resample ablation" in out


def test_a_run_is_shown_with_all_circuits_and_results(finished, capsys):
    out = _shown(finished, capsys)
    assert out.count("circuit by acdc") == 2
    for name in ("dense", "class-only", "acdc-resample-0.03", "acdc-resample-0.001"):
        assert name in out


def test_a_dense_model_is_told_from_a_compact_one(finished, capsys):
    assert main(["show", str(finished / "dense")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
