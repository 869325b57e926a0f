import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vitcut
from vitcut.compact.macs import count_macs, dense_macs
from vitcut.errors import ArtefactError, CircuitError, ConfigError, ModelError, TaskError
from vitcut.masked.fill import Fill
from vitcut.masked.oracle import Oracle
from vitcut.model.loading import DenseCard, LoadedModel, save_dense, weight_hash
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.model.tracing import read_model

MEAN = STD = (0.5, 0.5, 0.5)
SIDE = 16


def build_module(num_classes: int = 12, *, std: float = 0.3) -> torch.nn.Module:
    """A tiny ViT whose weights are large enough that some of its edges matter."""
    model = build_reference(
        VitSettings(width=16, depth=2, num_heads=2, mlp_ratio=2.0),
        num_classes=num_classes,
        image_size=SIDE,
    )
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=draw) * std
    return model


@pytest.fixture(scope="module")
def images():
    return vitcut.load_images("drawn", task="drawn", image_size=SIDE)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return vitcut.load_model(build_module(), mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def whole(model, images):
    """What cutting nothing gives."""
    circuit = vitcut.Circuit.full(read_model(model.model).graph, ablation="zero")
    return vitcut.cut(model, images, circuit, images=12)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    task = vitcut.load_task("drawn")
    folder = tmp_path_factory.mktemp("api") / "dense"
    card = DenseCard(
        task_name=task.name,
        class_ids=task.class_ids,
        class_names=task.class_names,
        group_names=task.groups,
        image_size=SIDE,
        mean=MEAN,
        std=STD,
        text="A model card.",
    )
    save_dense(build_module(), folder, card=card)
    return folder


def test_the_public_names_are_these():
    assert vitcut.__all__ == [
        "Circuit",
        "CompactViT",
        "Task",
        "VitcutError",
        "__version__",
        "cut",
        "discover",
        "evaluate",
        "finetune",
        "load_images",
        "load_model",
        "load_task",
        "register_adapter",
    ]
    assert dir(vitcut) == sorted(vitcut.__all__)


def test_every_public_name_is_there():
    for name in vitcut.__all__:
        assert getattr(vitcut, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'discovr'"):
        vitcut.discovr  # noqa: B018


def test_importing_vitcut_loads_no_torch():
    code = "import sys, vitcut; vitcut.Task; vitcut.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_way_from_a_model_to_a_saved_cut(model_folder, images, tmp_path):
    model = vitcut.load_model(str(model_folder))
    circuit = vitcut.discover(model, images, tau=0.01, images=24)
    assert 0 < circuit.num_kept < circuit.graph.num_edges

    cut = vitcut.cut(model, images, circuit, images=48)
    assert cut.exactness.max_abs_diff <= cut.exactness.tolerance
    assert cut.circuit.ablation == "mean"

    cut.model.save_pretrained(tmp_path / "cut")
    loaded = vitcut.CompactViT.from_pretrained(tmp_path / "cut")
    found, again = vitcut.evaluate(cut.model, images), vitcut.evaluate(loaded, images)
    assert 0 <= found.accuracy_coarse <= 1
    torch.testing.assert_close(again.log_probs, found.log_probs)


def test_the_uncut_circuit_evaluates_like_the_dense_model(model, images):
    graph = vitcut.discover(model, images, tau=9.0, images=12).graph
    cut = vitcut.cut(model, images, vitcut.Circuit.full(graph), images=12)
    dense, compact = vitcut.evaluate(model, images), vitcut.evaluate(cut.model, images)
    np.testing.assert_array_equal(compact.correct_coarse, dense.correct_coarse)
    torch.testing.assert_close(compact.log_probs, dense.log_probs, atol=1e-4, rtol=0)


def test_paths_may_be_texts(model, images, tmp_path):
    circuit = vitcut.discover(model, images, tau=9.0, images=12, log=f"{tmp_path}/log.jsonl")
    assert (tmp_path / "log.jsonl").is_file()
    circuit.save(f"{tmp_path}/circuit.json")
    assert vitcut.Circuit.load(f"{tmp_path}/circuit.json") == circuit
    cut = vitcut.cut(model, images, out=f"{tmp_path}/cut", **BUDGET)
    assert (tmp_path / "cut" / "path.json").is_file()
    cut.fill.save(f"{tmp_path}/fill")
    assert Fill.load(f"{tmp_path}/fill").fingerprint == cut.fill.fingerprint
    beside = {"circuit": f"{tmp_path}/circuit.json", "fill": f"{tmp_path}/fill"}
    cut.model.save_pretrained(f"{tmp_path}/model", **beside)
    assert vitcut.Circuit.load(tmp_path / "model" / "circuit.json") == circuit
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 64, "device": "cpu"}
    vitcut.finetune(cut.model, model, images, out=f"{tmp_path}/repair", **settings)
    assert any((tmp_path / "repair").iterdir())


BUDGET = {"target_macs": 0.4, "rounds": 1, "images": 24, "score_images": 12, "verify_images": 8}


def test_a_model_is_cut_to_a_budget_and_a_killed_search_goes_on(model, images, tmp_path):
    before = weight_hash(model.model)
    cut = vitcut.cut(model, images, ablation="linear", **BUDGET)
    dense = dense_macs(cut.model.plan.shape)
    assert count_macs(cut.model.plan) <= 0.4 * dense
    assert cut.exactness.max_abs_diff <= cut.exactness.tolerance
    assert cut.fill.circuit == cut.circuit.fingerprint
    assert weight_hash(model.model) == before
    again = vitcut.cut(model, images, ablation="linear", out=tmp_path / "cut", **BUDGET)
    assert again.circuit == cut.circuit
    (tmp_path / "cut" / "path.json").unlink()
    assert (
        vitcut.cut(model, images, ablation="linear", out=tmp_path / "cut", **BUDGET).circuit
        == cut.circuit
    )
    with pytest.raises(ArtefactError, match=r"cut\.ablation was 'linear', now 'mean'"):
        vitcut.cut(model, images, ablation="mean", out=tmp_path / "cut", **BUDGET)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({}, ConfigError, r"needs a circuit \(what vitcut\.discover .* budget: target_macs=0\.2"),
        (
            {"target_macs": 0.4, "merge": True},
            ConfigError,
            r"first, then vitcut\.cut\(model, images, cut\.circuit, merge=True\)",
        ),
        ({"target_mac": 0.2}, ConfigError, "no setting 'target_mac': did you mean target_macs"),
        ({"target_macs": 0.001}, CircuitError, "cannot be met: the smallest model"),
        ({"target_macs": 0.999}, CircuitError, "leaves nothing to cut"),
    ],
)
def test_a_cut_needs_a_budget_that_can_be_met(model, images, tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        vitcut.cut(model, images, out=tmp_path / "cut", **settings)
    assert not (tmp_path / "cut").exists()


def test_a_cut_takes_a_circuit_or_a_budget(model, images):
    circuit = vitcut.Circuit.full(read_model(model.model).graph)
    with pytest.raises(ConfigError, match="a circuit or a budget, got both"):
        vitcut.cut(model, images, circuit, target_macs=0.2)


def test_a_repair_changes_neither_the_cut_nor_the_model(model, images):
    graph = read_model(model.model).graph
    cut = vitcut.cut(model, images, vitcut.Circuit.full(graph, ablation="zero"), images=12)
    before = [weight_hash(item) for item in (cut.model, model.model)]
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 64, "device": "cpu"}
    repaired = vitcut.finetune(cut.model, model, images, learning_rate=1e-4, **settings)
    assert [weight_hash(item) for item in (cut.model, model.model)] == before
    assert weight_hash(repaired) != before[0]
    assert repaired.info == cut.model.info
    with pytest.raises(ConfigError, match="no setting 'epoch': did you mean epochs"):
        vitcut.finetune(cut.model, model, images, epoch=1)


def test_a_module_is_copied_and_left_as_it_was():
    module = build_module().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loaded = vitcut.load_model(module, mean=MEAN, std=STD)
    loaded.model.get_parameter("head.weight").data.zero_()
    assert module.training
    assert not loaded.model.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (build_module(), {}, "needs mean and std"),
        (build_module(), {"mean": MEAN, "std": (1.0, 0.0, 1.0)}, "std must be .* got 0"),
        (build_module(), {"mean": (0.5, 0.5), "std": 0.5}, "or 3, one per channel, got 2 and 1"),
        (
            build_module(),
            {"mean": "grey", "std": 0.5},
            "mean must be a number, or one per .*'grey'",
        ),
        ("animals", {"mean": MEAN, "std": STD}, "mean is for a file of bare weights"),
    ],
)
def test_mean_and_std_belong_to_a_module_and_fit_it(model, given, message):
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(vitcut.load_model)(model, **given)


@pytest.mark.parametrize("one", [0.5, (0.5,), [0.5] * 3, np.full(3, 0.5)], ids=repr)
def test_one_number_is_that_of_all_channels(one):
    loaded = inspect.unwrap(vitcut.load_model)(build_module(), mean=one, std=one)
    assert (loaded.mean, loaded.std) == (MEAN, STD)


def test_a_model_that_is_not_understood_is_refused_by_name():
    with pytest.raises(ModelError, match="ResNet"):
        vitcut.load_model(timm.create_model("resnet10t", num_classes=12), mean=MEAN, std=STD)
    with pytest.raises(ModelError, match=r"not supported: .*Swin"):
        vitcut.load_model("timm:swin_tiny_patch4_window7_224", random_weights=True)


MODULE = timm.create_model("test_vit")
LOADED = r"expected what vitcut\.load_model gives, got "
IMAGES = r"expected what vitcut\.load_images gives, got "


@pytest.mark.parametrize(
    ("use", "given", "message"),
    [
        (
            vitcut.cut,
            [MODULE, "images"],
            LOADED + r"VisionTransformer: vitcut\.load_model\(module,",
        ),
        (vitcut.discover, [MODULE, "images"], LOADED + "VisionTransformer"),
        (vitcut.evaluate, [MODULE, "images"], LOADED + "VisionTransformer"),
        (vitcut.finetune, ["compact", MODULE, "images"], LOADED + "VisionTransformer"),
        (vitcut.discover, ["animals", "images"], LOADED + r"str: vitcut\.load_model\(\.\.\.\)"),
        (vitcut.evaluate, ["cut", "images"], LOADED + "Cut: give its model"),
        (vitcut.evaluate, ["compact", []], IMAGES + r"list: vitcut\.load_images\("),
        (vitcut.discover, ["model", []], IMAGES + "list"),
        (vitcut.cut, ["model", "images", "x"], r"vitcut\.discover gives, got str: .*Circuit\.load"),
        (vitcut.cut, ["model", "images", "cut"], "got Cut: give its circuit"),
        (vitcut.finetune, ["cut", "model", "images"], "a CompactViT, got Cut: give its model"),
    ],
)
def test_what_nothing_here_gives_is_refused_with_what_does(
    model, images, whole, use, given, message
):
    known = {"model": model, "images": images, "cut": whole, "compact": whole.model}
    arguments = [known.get(item, item) if isinstance(item, str) else item for item in given]
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(use)(*arguments)  # types are checked before it, in tests alone


def test_images_are_prepared_for_what_load_model_gives():
    with pytest.raises(ConfigError, match=LOADED + "VisionTransformer"):
        inspect.unwrap(vitcut.load_images)("drawn", task="drawn", model=MODULE)


def test_a_misspelt_setting_is_refused_with_a_hint(model, images):
    circuit = vitcut.Circuit.full(read_model(model.model).graph)
    with pytest.raises(ConfigError, match="no setting 'tua': did you mean tau"):
        vitcut.discover(model, images, tua=0.1)
    with pytest.raises(ConfigError, match="no setting 'frobnicate': expected one of ablation"):
        vitcut.cut(model, images, circuit, frobnicate=1)


def test_a_search_that_does_not_fit_is_refused_before_it_measures(model, images, monkeypatch):
    def measured(*_args, **_settings):
        raise AssertionError("the full model was measured")

    monkeypatch.setattr(Oracle, "__init__", measured)
    with pytest.raises(ConfigError, match=r"a search over 12 pairs need.*memory-gib allows 1e-06"):
        vitcut.discover(model, images, images=12, memory_gib=1e-6)


def test_images_of_another_size_are_refused(model):
    small = vitcut.load_images("drawn", task="drawn", image_size=8)
    for use in (vitcut.discover, vitcut.evaluate):
        with pytest.raises(
            ConfigError, match=r"16 pixels, got 8: give load_images model=\.\.\., or image"
        ):
            use(model, small)


def test_a_model_of_another_task_is_refused(model_folder, images):
    other = vitcut.load_model(build_module(num_classes=5), mean=MEAN, std=STD)
    with pytest.raises(TaskError, match="5 classes"):
        vitcut.evaluate(other, images)
    named = vitcut.load_model(model_folder)
    others = tuple(f"cat {i}" for i in range(12))
    renamed = LoadedModel(**{**vars(named), "class_ids": others})
    with pytest.raises(TaskError, match=r"names 12 classes that model .* lacks: crescent, "):
        vitcut.evaluate(renamed, images)


def test_the_example_runs(model_folder, tmp_path, capsys):
    path = Path(__file__).parents[1] / "examples" / "cut_animals.py"
    spec = importlib.util.spec_from_file_location("cut_animals", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = tmp_path / "cut"
    where = ["--model", str(model_folder), "--source", "drawn", "--task", "drawn"]
    example.main([*where, "--tau", "0.1", "--images", "12", "--out", str(out)])
    assert f"saved: {out}" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
