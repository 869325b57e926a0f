from dataclasses import replace

import numpy as np
import pytest
from tiny import REFERENCE

from vitcut.circuit import Circuit
from vitcut.compiler.calibration import Measured, fit_costs, relative_errors
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
