import importlib.util
import inspect
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vitcut
from vitcut.benchmark.evaluation import evaluate
from vitcut.benchmark.points import evaluate_points
from vitcut.benchmark.settings import BenchSettings
from vitcut.cli import VERBS
from vitcut.compact.operations import count_macs, dense_macs
from vitcut.compiler.cut import class_only
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ArtefactError, CircuitError, ConfigError, ModelError, TaskError
from vitcut.labels import Labels
from vitcut.masked.oracle import Oracle
from vitcut.model.model import Model, weight_hash
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings
from vitcut.preprocessing import Preprocessing
from vitcut.results import CLASS_ONLY, DENSE
from vitcut.selection.settings import Budget
from vitcut.training.settings import FinetuneSettings, TrainSettings

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
def model() -> Model:
    return vitcut.load_model(build_module(), mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def whole(model, images):
    """What cutting nothing gives."""
    circuit = vitcut.Circuit.full(model.weights.graph, ablation="zero")
    return vitcut.cut(model, images, circuit, settings=CutSettings(images=12), bench=None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    task = vitcut.load_task("drawn")
    folder = tmp_path_factory.mktemp("api") / "dense"
    taken = Preprocessing(image_size=SIDE, mean=MEAN, std=STD)
    labels = Labels(owner="task", ids=task.class_ids, names=task.class_names)
    Model.of(build_module(), "tiny", taken, labels).save(folder)
    return folder


def test_the_public_names_are_these():
    settings = ["Bench", "Cut", "Discover", "Export", "Finetune", "Run", "Train", "Transfer", "Vit"]
    values = ["Budget", "Circuit", "CompactViT", "Task", "VitcutError", "__version__"]
    functions = ["evaluate", "load_images", "load_model", "load_task", "register_adapter"]
    verbs = [
        *("bench", "checks", "cut", "demo", "discover", "finetune", "prepare", "run", "show"),
        *("export", "info", "label", "predict", "report", "suggest", "train"),
    ]
    expected = [*values, *functions, *verbs, *(f"{name}Settings" for name in settings)]
    assert sorted(vitcut.__all__) == sorted(expected)
    assert dir(vitcut) == sorted(vitcut.__all__)
    # The command eval is the function evaluate: eval is a builtin of Python.
    assert set(VERBS) == {*verbs, "eval"}
    assert VERBS["eval"].call is vitcut.evaluate


def test_every_public_name_is_there():
    for name in vitcut.__all__:
        assert getattr(vitcut, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'discovr'"):
        vitcut.discovr  # noqa: B018


def test_importing_vitcut_loads_no_torch():
    code = "import sys, vitcut; vitcut.Task; vitcut.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FEW = CutSettings(images=48, verify_images=8)
SEARCH = DiscoverSettings(tau=0.01, images=24, ablation="resample")
REPAIR = FinetuneSettings(
    epochs=1, warmup_epochs=0, batch_size=64, device="cpu", precision="float32"
)
ALONE = {"repair_dense": False, "bench": None}


def test_the_way_from_a_model_to_a_saved_cut(model_folder, images, tmp_path):
    model = vitcut.load_model(str(model_folder))
    circuit = vitcut.discover(model, images, settings=SEARCH)
    assert 0 < circuit.num_kept < circuit.graph.num_edges

    cut = vitcut.cut(model, images, circuit, settings=FEW, bench=None)
    assert cut.exactness.max_abs_diff <= cut.exactness.tolerance
    assert cut.circuit.ablation == "mean"

    cut.model.save_pretrained(tmp_path / "cut")
    loaded = vitcut.CompactViT.from_pretrained(tmp_path / "cut")
    found, again = vitcut.evaluate(cut, images), vitcut.evaluate(loaded, images)
    assert 0 <= found.accuracy_coarse <= 1
    torch.testing.assert_close(again.log_probs, found.log_probs)


def test_the_uncut_circuit_evaluates_like_the_dense_model(model, images):
    circuit = vitcut.Circuit.full(model.weights.graph)
    cut = vitcut.cut(model, images, circuit, settings=FEW, bench=None)
    dense, compact = vitcut.evaluate(model, images), vitcut.evaluate(cut.model, images)
    np.testing.assert_array_equal(compact.correct_coarse, dense.correct_coarse)
    torch.testing.assert_close(compact.log_probs, dense.log_probs, atol=1e-4, rtol=0)


def test_paths_may_be_texts_and_every_verb_takes_what_the_one_before_wrote(model, images, tmp_path):
    found, cut, fine = (f"{tmp_path}/{name}" for name in ("found", "cut", "fine"))
    circuit = vitcut.discover(model, images, settings=SEARCH, out=found)
    assert vitcut.Circuit.load(f"{found}/points/acdc-resample-0.01/circuit.json") == circuit
    made = vitcut.cut(model, images, found, settings=FEW, bench=None, out=cut)
    assert vitcut.Circuit.load(f"{cut}/model/circuit.json") == made.circuit
    done = vitcut.finetune(cut, model, images, settings=REPAIR, out=fine, **ALONE)
    again = vitcut.CompactViT.from_pretrained(f"{fine}/model")
    assert weight_hash(again) == weight_hash(done.cut.model)


BUDGET = Budget(target_macs=0.4, rounds=1, score_images=12)
LINEAR = CutSettings(ablation="linear", images=24, verify_images=8)


def test_a_model_is_cut_to_a_budget_and_a_killed_search_goes_on(model, images, tmp_path):
    before = weight_hash(model.module)
    cut = vitcut.cut(model, images, budget=BUDGET, settings=LINEAR, bench=None)
    dense = dense_macs(cut.model.plan.shape)
    assert count_macs(cut.model.plan) <= 0.4 * dense
    assert cut.exactness.max_abs_diff <= cut.exactness.tolerance
    assert cut.fill.circuit == cut.circuit.fingerprint
    assert weight_hash(model.module) == before
    told = {"budget": BUDGET, "bench": None, "out": tmp_path / "cut"}
    for _ in range(2):
        again = vitcut.cut(model, images, settings=LINEAR, **told)
        assert again.circuit == cut.circuit
        (tmp_path / "cut" / "path.json").unlink()
        shutil.rmtree(tmp_path / "cut" / "model")
    with pytest.raises(ArtefactError, match=r"cut\.ablation was 'linear', now 'mean'"):
        vitcut.cut(model, images, settings=replace(LINEAR, ablation="mean"), **told)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({}, ConfigError, r"needs a circuit \(.* vitcut\.discover .* budget: target-macs 0\.2"),
        (
            {"budget": BUDGET, "settings": CutSettings(merge=True)},
            ConfigError,
            r"cut to the budget first, then cut its circuit with merge",
        ),
        ({"budget": Budget(target_macs=0.001)}, CircuitError, "cannot be met: the smallest model"),
        ({"budget": Budget(target_macs=0.999)}, CircuitError, "leaves nothing to cut"),
    ],
)
def test_a_cut_needs_a_budget_that_can_be_met(model, images, tmp_path, given, kind, message):
    with pytest.raises(kind, match=message):
        vitcut.cut(model, images, out=tmp_path / "cut", **given)
    assert not (tmp_path / "cut").exists()


def test_a_cut_takes_a_circuit_or_a_budget(model, images):
    circuit = vitcut.Circuit.full(model.weights.graph)
    with pytest.raises(ConfigError, match="a circuit or a budget, got both"):
        vitcut.cut(model, images, circuit, budget=BUDGET)


def test_a_repair_changes_neither_the_cut_nor_the_model(model, images, whole):
    before = [weight_hash(item) for item in (whole.model, model.module)]
    for start in (whole, whole.model):
        done = vitcut.finetune(start, model, images, settings=REPAIR, **ALONE)
        assert [weight_hash(item) for item in (whole.model, model.module)] == before
        assert weight_hash(done.cut.model) != before[0]
        assert done.cut.model.info == whole.model.info


def test_a_cut_is_measured_beside_the_dense_model_unless_it_is_not_wanted(model, images, whole):
    assert whole.results is None
    timing = vitcut.BenchSettings(runtimes=("torch",), batches=(1,), seconds=0.02, min_rounds=3)
    circuit = vitcut.Circuit.full(model.weights.graph)
    cut = vitcut.cut(model, images, circuit, settings=FEW, bench=timing)
    names = [point.name for point in cut.results.all_points()]
    assert names == ["dense", "class-only", "manual-mean"]
    assert cut.results.dense.accuracy_coarse == vitcut.evaluate(model, images).accuracy_coarse


def test_a_repaired_dense_model_is_read_anew(model_folder, images, whole, tmp_path):
    settings = FinetuneSettings(epochs=1, warmup_epochs=0, precision="float32", device="cpu")
    given = [whole, vitcut.load_model(model_folder), images]
    found = [
        vitcut.finetune(*given, settings=settings, bench=None, out=tmp_path / "fine").dense
        for _ in range(2)
    ]
    for dense in found:
        assert dense.weight_hash == weight_hash(dense.module) != given[1].weight_hash
    assert found[0].weight_hash == found[1].weight_hash
    pixels = torch.rand(2, 3, SIDE, SIDE)
    circuit = vitcut.Circuit.full(found[0].weights.graph, ablation="zero")
    cut = vitcut.cut(found[0], images, circuit, bench=None)
    assert (cut.model(pixels) - found[0].module(pixels)).abs().max() < 1e-4


def test_what_a_temporary_run_made_names_no_folder(model, images, whole, tmp_path):
    assert whole.folder is None
    settings = FinetuneSettings(epochs=1, warmup_epochs=0, precision="float32", device="cpu")
    timing = BenchSettings(runtimes=("torch",), batches=(1,), seconds=0.05, min_rounds=3)
    done = vitcut.finetune(
        whole, model, images, settings=settings, repair_dense=False, bench=timing
    )
    assert done.cut.folder is None
    assert {point.model for point in done.results.points} == {None}


def test_a_trained_model_is_the_same_when_the_call_is_repeated(images, tmp_path):
    given = {"vit": VitSettings(width=16, depth=1, num_heads=2)}
    given["settings"] = TrainSettings(
        epochs=1, warmup_epochs=0, precision="float32", device="cpu", augmentation="none"
    )
    first, second = (vitcut.train(images, out=tmp_path / "run", **given) for _ in range(2))
    for one in (second, vitcut.load_model(tmp_path / "run")):
        facts = ("name", "origin", "run", "weight_hash")
        assert [getattr(one, fact) for fact in facts] == [getattr(first, fact) for fact in facts]
    assert vitcut.load_images(model=first).fingerprint == images.fingerprint


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean must be one number, or three for .*, got 2"),
        ({"std": 0.0}, "std must be a finite number > 0"),
        ({"mean": 0.5, "model": "model"}, "the model says its own mean and std"),
    ],
)
def test_numbers_of_pixels_are_checked_before_images_are_read(model, given, message):
    if "model" in given:
        given = given | {"model": model}
    with pytest.raises(ConfigError, match=message):
        vitcut.load_images("nowhere", task="drawn", image_size=SIDE, **given)


def test_one_number_is_that_of_three_channels():
    images = vitcut.load_images("drawn", task="drawn", image_size=SIDE, mean=0.5)
    assert images.preprocessing.mean == (0.5, 0.5, 0.5)


def test_changes_are_for_recipes_that_are_read(tmp_path):
    with pytest.raises(ConfigError, match="changes are for a recipe's name or file"):
        vitcut.run(vitcut.RunSettings(), changes={"taus": [0.1]}, out=tmp_path / "run")


def test_a_module_is_copied_and_left_as_it_was():
    module = build_module().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loaded = vitcut.load_model(module, mean=MEAN, std=STD)
    loaded.module.get_parameter("head.weight").data.zero_()
    assert module.training
    assert not loaded.module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (build_module(), {}, "needs mean and std"),
        (build_module(), {"mean": MEAN, "std": (1.0, 0.0, 1.0)}, "std must be .* got 0"),
        (
            build_module(),
            {"mean": (0.5, 0.5), "std": 0.5},
            "mean must be one number, or three for .*, got 2",
        ),
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
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == (MEAN, STD)


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
        (vitcut.evaluate, ["compact", []], IMAGES + r"list: vitcut\.load_images\("),
        (vitcut.discover, ["model", []], IMAGES + "list"),
        (vitcut.cut, ["model", "images", 7], r"vitcut\.discover gives, got int: .*Circuit\.load"),
        (vitcut.cut, ["model", "images", "cut"], "got Cut: give its circuit"),
        (vitcut.finetune, [MODULE, "model", "images"], r"what vitcut\.cut gives, got VisionTr"),
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


def test_a_search_that_does_not_fit_is_refused_before_it_measures(model, images, monkeypatch):
    def measured(*_args, **_settings):
        raise AssertionError("the full model was measured")

    monkeypatch.setattr(Oracle, "__init__", measured)
    with pytest.raises(ConfigError, match=r"a search over 12 pairs need.*memory-gib allows 1e-06"):
        vitcut.discover(model, images, settings=DiscoverSettings(images=12, memory_gib=1e-6))


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
    renamed = replace(named, labels=Labels(owner="model", ids=others, names=others))
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


def test_the_class_only_model_has_the_answers_of_the_dense_one(model, images):
    taken = model.for_task(images.task, images.labels)
    point, module = class_only(taken, images, CutSettings())
    found = evaluate_points(taken, images, {CLASS_ONLY: (point, module)})
    own = evaluate(module, images.test, images.task, taken.preprocessing, reference=found[DENSE])
    told = found[CLASS_ONLY]
    assert (told.accuracy_coarse, told.confusion) == (own.accuracy_coarse, own.confusion)
    assert own.kl == pytest.approx(told.kl, abs=1e-6)
