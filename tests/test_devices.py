"""Every stage computes where the model's weights are; `fake_device` stands in for a GPU."""

from dataclasses import replace

import pytest
import torch
from fake_device import ELSEWHERE, FakeDevice
from tiny import random_pixels, random_vit

import vitcut
from vitcut.benchmark.settings import BenchSettings
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError
from vitcut.model.forward import forward
from vitcut.model.model import Model
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.runtime import choose_device
from vitcut.selection.settings import Budget

SETTINGS = CutSettings(images=16, verify_images=4)
TIMING = BenchSettings(runtimes=("torch",), batches=(2,), seconds=0.02, min_rounds=3)


@pytest.fixture(scope="module")
def images():
    return vitcut.load_images("drawn", task="drawn", image_size=16)


@pytest.fixture(scope="module")
def model() -> Model:
    settings = VitSettings(width=16, depth=2, num_heads=2, mlp_ratio=2.0)
    module = build_reference(settings, num_classes=12, image_size=16)
    draw = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return vitcut.load_model(module, mean=0.5, std=0.5)


@pytest.fixture
def elsewhere():
    with FakeDevice():
        yield ELSEWHERE


def test_tensors_of_two_devices_do_not_mix(elsewhere):
    one = torch.ones(3, device=elsewhere)
    assert (one.device, (one + 1).device, (one + 1).cpu().device.type) == (ELSEWHERE,) * 2 + (
        "cpu",
    )
    for mixed in (lambda: one + torch.ones(3), lambda: torch.ones(3)[one.long()], one.numpy):
        with pytest.raises((RuntimeError, TypeError), match=r"device|elsewhere"):
            mixed()


def test_a_model_moves_as_a_whole_and_leaves_the_old_one_where_it_is(model, elsewhere):
    there = model.to(elsewhere)
    assert there.weights.device == ELSEWHERE
    assert {value.device for value in there.module.state_dict().values()} == {ELSEWHERE}
    assert {value.device.type for value in model.module.state_dict().values()} == {"cpu"}
    assert model.weights.device.type == "cpu"
    assert there.weight_hash == model.weight_hash
    assert model.to("cpu") is model


def test_accuracy_and_discovery_are_the_same_elsewhere(model, images, elsewhere):
    there = model.to(elsewhere)
    here, found = vitcut.evaluate(model, images), vitcut.evaluate(there, images, against=model)
    assert found.confusion == here.confusion
    assert found.kl == pytest.approx(0, abs=1e-9)
    settings = DiscoverSettings(tau=0.02, images=4)
    circuits = [vitcut.discover(each, images, settings=settings) for each in (model, there)]
    assert circuits[0].fingerprint == circuits[1].fingerprint


@pytest.mark.parametrize(
    ("ablation", "tokens"), [("linear", "split"), ("mean", "all"), ("zero", "split")]
)
def test_a_budget_is_met_by_the_same_cut_elsewhere(ablation, tokens, model, images, elsewhere):
    budget = Budget(target_macs=0.5, score_images=12, rounds=1, tokens=tokens)
    settings = replace(SETTINGS, ablation=ablation)
    here, there = (
        vitcut.cut(each, images, budget=budget, settings=settings, bench=None)
        for each in (model, model.to(elsewhere))
    )
    assert there.circuit.fingerprint == here.circuit.fingerprint
    assert there.exactness.max_abs_diff < 1e-5


def test_latencies_say_the_device_and_every_model_is_timed_on_it(model, images, elsewhere):
    circuit = vitcut.Circuit.full(model.weights.graph, ablation="mean")
    there = vitcut.cut(model.to(elsewhere), images, circuit, settings=SETTINGS, bench=TIMING)
    points = there.results.all_points()
    assert {each.device for point in points for each in point.latency} == {str(ELSEWHERE)}


@pytest.mark.parametrize(
    "shape",
    [
        {"gated": True, "head_norm": True, "rotary": True, "head_dim": 4},
        {"patch_readout": "mean", "num_prefix": 3, "embed_norm": True, "neuron_norm": True},
    ],
)
def test_the_forward_pass_of_every_kind_of_weights_is_the_same_elsewhere(shape, elsewhere):
    weights = random_vit(**shape)
    pixels = random_pixels(weights)
    there = weights.to(device=elsewhere)
    expected = forward(weights, pixels)
    assert torch.equal(forward(there, pixels.to(elsewhere)).cpu(), expected)


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    message = "sees cpu" if name == "cuda:99" else "must be auto, cpu, cuda or cuda:N"
    with pytest.raises(ConfigError, match=message):
        choose_device(name)
    with pytest.raises(ConfigError, match=message):
        vitcut.load_model("animals", device=name)
