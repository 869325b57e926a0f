import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import random_vit

from vitcut.cli import main
from vitcut.compiler.calibrate import Measured
from vitcut.compiler.cost import CostModel
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import ArtefactError
from vitcut.pipeline import checks, costs
from vitcut.pipeline.costs import cost_model, save_costs

SLOW = CostModel(nanoseconds={unit: 3 * cost for unit, cost in CostModel().nanoseconds.items()})
"""A machine on which everything takes three times as long."""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "costs_path", lambda: tmp_path / "costs.json")


def _slow_machine(models, images, config, *, baselines):
    del images, baselines
    return SimpleNamespace(
        latencies={
            name: tuple(
                SimpleNamespace(
                    batch=batch, median_ms=replace(SLOW, batch=batch).latency_ms(model.plan)
                )
                for batch in config.batches
            )
            for name, model in models.items()
        }
    )


def test_checks_learns_what_this_machine_takes_and_cuts_use_it(monkeypatch, capsys):
    monkeypatch.setattr(checks, "measure_latency", _slow_machine)
    assert cost_model(64).origin == "shipped"
    assert main(["checks", "--models", "6"]) == 0
    out = capsys.readouterr().out
    after, before = (int(number) for number in re.findall(r"(\d+)%", out))
    assert after < 5
    assert before == 67
    learnt = cost_model(64)
    assert (learnt.origin, learnt.batch) == ("calibrated", 64)
    assert learnt.nanoseconds["product"] == pytest.approx(
        3 * CostModel().nanoseconds["product"], rel=0.05
    )


def test_what_another_machine_took_is_not_used(monkeypatch):
    save_costs(SLOW)
    assert cost_model(1).nanoseconds == SLOW.nanoseconds
    monkeypatch.setattr(costs, "_machine", lambda: {"cpu": "another", "onnxruntime": "1.0"})
    assert cost_model(1).nanoseconds == CostModel().nanoseconds


def test_a_calibration_that_lacks_costs_is_refused():
    save_costs(SLOW)
    content = json.loads(costs.costs_path().read_text())
    del content["nanoseconds"]["product"]
    costs.costs_path().write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="delete it, or run `vitcut checks`"):
        cost_model(1)


def test_too_few_models_to_learn_from_are_refused(capsys):
    assert main(["checks", "--models", "2"]) == 2
    assert "models must be at least 3, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("models", [3, 6, 18])
def test_a_model_is_held_out_at_every_batch_size_or_at_none(models):
    weights = random_vit()
    shape = weights.shape
    circuits = checks.random_circuits(weights.split_graph, shape, models, 0)
    plans = [plan_circuit(shape, circuit) for circuit in circuits]
    measured = [
        Measured(plan=plan, batch=batch, latency_ms=1.0) for batch in (1, 64) for plan in plans
    ]
    fitted, held_out = checks.divide(measured, models)
    assert {id(item.plan) for item in fitted}.isdisjoint(id(item.plan) for item in held_out)
    assert len(fitted) + len(held_out) == 2 * models
    assert len(held_out) == 2 * len({id(item.plan) for item in held_out}) > 0
