from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import REFERENCE, random_vit

from vitcut.circuit import Circuit
from vitcut.compiler import calibrate as module
from vitcut.compiler.calibrate import Measured, calibrate, fit_costs, relative_errors
from vitcut.compiler.cost import CostModel
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import ConfigError
from vitcut.graph import Graph

GRAPH = Graph(num_layers=6, num_heads=8, kinds=("cls", "patch"), readout=("cls",))
MACHINE = CostModel(
    nanoseconds={
        unit: cost * factor
        for (unit, cost), factor in zip(
            CostModel().nanoseconds.items(), np.geomspace(0.4, 2.5, 12), strict=True
        )
    }
)


def parts(seed):
    random = np.random.default_rng(seed)
    share = random.uniform(0.05, 1.0, 2)
    heads = random.random((6, 8, 2)) < share[0]
    neurons = random.random((6, 2, 256)) < share[1]
    heads[:, 0, 0] = True
    return Circuit.of_parts(GRAPH, heads=heads, neurons=neurons, ablation="linear")


def measured(seeds, noise=0.0):
    random = np.random.default_rng(99)
    for seed in seeds:
        plan = plan_circuit(REFERENCE, parts(seed))
        for batch in (1, 64):
            exact = replace(MACHINE, batch=batch).latency_ms(plan)
            factor = 1 + noise * random.standard_normal()
            yield Measured(plan=plan, batch=batch, latency_ms=exact * factor)


def test_fitted_costs_predict_plans_that_were_not_measured():
    unseen = list(measured(range(100, 120)))
    assert np.median(abs(relative_errors(unseen, CostModel()))) > 0.1
    fitted = fit_costs(list(measured(range(15), noise=0.03)), CostModel())
    assert np.median(abs(relative_errors(unseen, fitted))) < 0.03


def test_costs_stay_positive_whatever_is_measured():
    odd = [replace(item, latency_ms=1.0) for item in measured(range(4))]
    assert min(fit_costs(odd, CostModel()).nanoseconds.values()) > 0


def test_costs_are_not_fitted_to_nothing():
    with pytest.raises(ConfigError, match="got none"):
        fit_costs([], CostModel())


SLOW = CostModel(nanoseconds={unit: 3 * cost for unit, cost in CostModel().nanoseconds.items()})
"""A machine on which everything takes three times as long."""


@pytest.fixture
def slow_machine(monkeypatch):
    def measure(models, images, config, *, baselines):
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

    monkeypatch.setattr(module, "measure_latency", measure)


def test_calibration_learns_what_a_machine_takes_and_compares_it_with_other_costs(slow_machine):
    weights = random_vit(num_layers=3)
    found = calibrate(weights.shape, weights.split_graph, models=6, seconds=1)
    assert found.models == 6
    assert found.error_before == pytest.approx(2 / 3)
    assert found.error_after < 0.05
    assert found.costs.origin == "calibrated"
    assert found.costs.nanoseconds["product"] == pytest.approx(
        3 * CostModel().nanoseconds["product"], rel=0.05
    )
    again = calibrate(weights.shape, weights.split_graph, models=6, seconds=1, costs=found.costs)
    assert again.costs == found.costs
    assert again.error_before < 0.05


def test_too_few_models_to_learn_from_are_refused():
    with pytest.raises(ConfigError, match="models must be >= 3, got 2"):
        calibrate(random_vit().shape, random_vit().split_graph, models=2, seconds=1)


@pytest.mark.parametrize("models", [3, 6, 18])
def test_a_model_is_held_out_at_every_batch_size_or_at_none(slow_machine, monkeypatch, models):
    fitted, predicted = [], []
    monkeypatch.setattr(module, "fit_costs", lambda measured, _: fitted.append(measured) or SLOW)
    monkeypatch.setattr(
        module, "relative_errors", lambda measured, _: predicted.append(measured) or np.zeros(1)
    )
    weights = random_vit()
    calibrate(weights.shape, weights.split_graph, models=models, seconds=1)
    some, everything = fitted
    (held_out, _) = predicted
    assert {id(item.plan) for item in some}.isdisjoint(id(item.plan) for item in held_out)
    assert len(some) + len(held_out) == len(everything) == 2 * models
    assert len(held_out) == 2 * len({id(item.plan) for item in held_out}) > 0
