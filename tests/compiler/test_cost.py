from dataclasses import replace

import numpy as np
import pytest
from forging import forge
from strategies import parts_per_kind
from tiny import REFERENCE, random_vit

from vitcut.circuit import Circuit
from vitcut.compiler import cost
from vitcut.compiler.cost import CostModel
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import ArtefactError
from vitcut.graph import Graph

GRAPH = Graph(num_layers=6, num_heads=8, kinds=("cls", "patch"), readout=("cls",))
FULL = Circuit.full(GRAPH, ablation="linear")


def only_class_heads():
    """A circuit in which the class token alone is computed."""
    kept = GRAPH.edges.copy()
    for layer in range(GRAPH.num_layers):
        kept[GRAPH.mlp_source(layer, 1)] = False
        for head in range(GRAPH.num_heads):
            kept[GRAPH.head_source(layer, head, 1)] = False
    return Circuit(graph=GRAPH, kept=kept, ablation="linear")


def merged(plan):
    groups = [group for block in plan.blocks for group in block.attention.head_sets]
    return {bool(group.queries) for group in groups if group.keys and "q" not in group.constant}


def test_one_image_merges_weights_and_many_images_do_not():
    circuit = only_class_heads()
    assert merged(plan_circuit(REFERENCE, circuit, CostModel(batch=1))) == {True}
    assert merged(plan_circuit(REFERENCE, circuit, CostModel(batch=64))) == {False}


def test_a_wide_model_does_not_merge_even_for_one_image():
    wide = replace(REFERENCE, width=768, head_dim=96)
    assert merged(plan_circuit(wide, only_class_heads(), CostModel(batch=1))) == {False}


def test_the_elements_of_a_plan_grow_with_the_batch_and_its_operations_do_not():
    plan = plan_circuit(REFERENCE, FULL)
    one, many = (CostModel(batch=batch).count(plan) for batch in (1, 64))
    assert one["operation"] == many["operation"]
    for unit in ("product", "small_mac", "added", "normalised", "exponential", "activated"):
        assert many[unit] == pytest.approx(64 * one[unit])


def test_a_product_pays_for_whole_panels():
    weights = random_vit(hidden=20, width=32, num_heads=4, head_dim=8, num_layers=3)
    plan = plan_circuit(weights.shape, parts_per_kind(weights))
    whole, spread = (
        CostModel(batch=1, smooth=smooth).count(plan)["product"] for smooth in (False, True)
    )
    assert whole > spread


@pytest.mark.parametrize("batch", [1, 64])
def test_smooth_costs_price_every_neuron_under_a_norm_alike(batch):
    weights = random_vit(hidden=8, neuron_norm=True, num_layers=2)
    costs = CostModel(batch=batch, smooth=True)

    def latency(cut):
        neurons = np.ones((2, 2, 8), dtype=bool)
        neurons[0, 1, :cut] = False
        circuit = Circuit(
            graph=weights.split_graph,
            kept=weights.split_graph.edges,
            ablation="linear",
            neurons=neurons,
        )
        return costs.latency_ms(plan_circuit(weights.shape, circuit))

    first, second = latency(0) - latency(1), latency(1) - latency(2)
    assert first == pytest.approx(second)
    assert first > 0
    # The whole MLP saves what its norm kept computed, too.
    assert latency(7) - latency(8) > 2 * first


def test_less_is_predicted_to_be_faster():
    costs = CostModel()
    full, less = (costs.latency_ms(plan_circuit(REFERENCE, c)) for c in (FULL, only_class_heads()))
    assert 0 < less < 0.3 * full


def test_the_parts_of_a_plan_add_up_to_its_latency():
    costs, plan = CostModel(batch=64), plan_circuit(REFERENCE, FULL)
    parts = costs.latency_by_part(plan)
    assert list(parts) == ["embed", *(f"block {number}" for number in range(6)), "classifier"]
    call = costs.nanoseconds["call"] / 1e6
    assert sum(parts.values()) + call == pytest.approx(costs.latency_ms(plan))


MEASURED = CostModel(
    nanoseconds={unit: 3 * cost for unit, cost in CostModel().nanoseconds.items()},
    batch=1,
    origin="calibrated",
)


def test_saved_costs_come_back_for_any_batch_size(tmp_path, capsys):
    MEASURED.save(tmp_path / "costs.json")
    assert CostModel.load(tmp_path / "costs.json", batch=1) == MEASURED
    loaded = CostModel.load(tmp_path / "costs.json")
    assert loaded == replace(MEASURED, batch=64)
    assert loaded.fingerprint == MEASURED.fingerprint
    assert capsys.readouterr().err == ""


def test_saved_costs_change_no_default(tmp_path):
    before = CostModel()
    MEASURED.save(tmp_path / "costs.json")
    assert CostModel() == before
    assert before.origin == "shipped"


def test_costs_of_another_machine_are_read_with_a_note(tmp_path, monkeypatch, capsys):
    MEASURED.save(tmp_path / "costs.json")
    another = {"cpu": "another", "cpu_flags": [], "versions": {"onnxruntime": "1.0"}}
    monkeypatch.setattr(cost, "describe_machine", lambda: another)
    assert CostModel.load(tmp_path / "costs.json", batch=1) == MEASURED
    assert "costs.json was measured on another machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["nanoseconds"].pop("product"), r"must hold nanoseconds for .*product"),
        (lambda c: c["nanoseconds"].update(typo=1.0), r"got .*typo: calibrate again"),
        (lambda c: c.update(nanoseconds=None), "got None: calibrate again"),
        (lambda c: c.pop("nanoseconds"), "got None: calibrate again"),
        (
            lambda c: c["nanoseconds"].update(call=0.0),
            r"call must be a finite number > 0, got 0\.0",
        ),
        (lambda c: c["nanoseconds"].update(call=-1), "got -1"),
        (lambda c: c["nanoseconds"].update(call=float("nan")), "was altered"),
        (lambda c: c["nanoseconds"].update(call="3"), "got '3'"),
        (lambda c: c["nanoseconds"].update(call=True), "got True"),
        (lambda c: c.update(format_version=3), "format_version 3, this vitcut reads up to 2"),
    ],
)
def test_damaged_costs_are_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "costs.json"
    MEASURED.save(path)
    forge(path, change)
    with pytest.raises(ArtefactError, match=message) as caught:
        CostModel.load(path)
    assert "\n" not in str(caught.value)


def test_missing_costs_are_named(tmp_path):
    with pytest.raises(ArtefactError, match=r"no costs file at .*nowhere"):
        CostModel.load(tmp_path / "nowhere")
