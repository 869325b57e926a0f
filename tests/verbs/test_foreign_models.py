"""Models that other libraries wrote: cut, repaired, saved and measured again."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from pretrained import fake_pretrained
from safetensors.torch import save_file
from tiny import random_pixels
from torchvision.models import ViT_B_16_Weights, _api
from torchvision.models.vision_transformer import VisionTransformer

import vitcut
from vitcut import cli
from vitcut.benchmark.settings import BenchSettings
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compiler.settings import CutSettings
from vitcut.errors import ConfigError, ModelError, TaskError
from vitcut.model import saving
from vitcut.model.adapters import as_classifier
from vitcut.model.tracing import read_model
from vitcut.preprocessing import Framing
from vitcut.runs import read_settings
from vitcut.runtimes.onnx_runtime import export_onnx
from vitcut.task import load_task
from vitcut.training.settings import FinetuneSettings

TIMING = [
    *("--runtimes", "torch", "--batches", "1", "--seconds", "0.05", "--min-rounds", "3"),
    *("--min-sample-ms", "0.1"),
]
BENCH = BenchSettings(
    runtimes=("torch",), batches=(1,), seconds=0.05, min_rounds=3, min_sample_ms=0.1
)
FINETUNE = FinetuneSettings(
    epochs=1,
    warmup_epochs=0,
    batch_size=64,
    augmentation="light",
    precision="float32",
    device="cpu",
)
LABELS = load_task("drawn").class_ids


def _hf(folder, labels=LABELS, size=16):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=size, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder / "hf")
    transformers.ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.4] * 3
    ).save_pretrained(folder / "hf")
    return {"model": str(folder / "hf")}


def vit_tiny_8(*, weights: ViT_B_16_Weights | None = None, image_size=224, **given):
    sizes = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    return VisionTransformer(image_size=image_size, **sizes, **given)


def _torchvision(folder):
    model = vit_tiny_8(image_size=16, num_classes=12)
    torch.nn.init.normal_(model.heads.head.weight)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return {"model": str(folder / "weights.safetensors"), "arch": "torchvision:vit_tiny_8"}


def _grey(folder):
    model = timm.create_model("test_vit", num_classes=12, img_size=32, in_chans=1)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), folder / "weights.pth")
    path = str(folder / "weights.pth")
    return {"model": path, "arch": "test_vit", "mean": (0.4,), "std": (0.2,)}


TURNED = Framing(fit="squash", interpolation="bilinear", orientation="apply")
KINDS = {
    "hf": (_hf, TURNED, ((0.4,) * 3, (0.5,) * 3)),
    "torchvision": (
        _torchvision,
        Framing(crop_fraction=0.875, interpolation="bilinear"),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    "grey": (_grey, Framing(channels=1, crop_fraction=0.95), ((0.4,), (0.2,))),
}


@pytest.fixture
def sized(tmp_path, monkeypatch):
    """A circuit for ``timm:test_vit``, whose weights are for images of 160 pixels."""
    own = fake_pretrained(monkeypatch, "test_vit", tmp_path / "weights.pth", num_classes=12)
    circuit = Circuit.full(read_model(own).graph, ablation="mean")
    circuit = replace(circuit, kept=circuit.kept & ~_first_head(circuit.graph))
    circuit.save(tmp_path / "circuit.json")
    return tmp_path / "circuit.json"


def test_a_cut_for_images_of_another_size_is_measured_and_repaired_in_that_size(sized, tmp_path):
    cut, fine = tmp_path / "cut", tmp_path / "fine"
    words = ["cut", str(sized), "--model", "timm:test_vit", "--image-size", "32"]
    words += ["--source", "drawn", "--task", "drawn", "--images", "24", "--verify-images", "12"]
    assert cli.main([*words, *TIMING, "--out", str(cut)]) == 0
    assert CompactViT.from_pretrained(cut / "model").plan.shape.image_size == 32
    vitcut.bench(cut, settings=BENCH, out=tmp_path / "bench")
    words = ["finetune", str(cut), "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "64"]
    words += ["--precision", "float32", "--augmentation", "light", "--device", "cpu"]
    assert cli.main([*words, *TIMING, "--out", str(fine)]) == 0
    dense = vitcut.load_model(fine / "dense-repaired" / "dense")
    assert dense.preprocessing.image_size == 32
    for folder in (cut, fine, tmp_path / "bench"):
        assert read_settings(folder)["model"]["image_size"] == 32


@pytest.fixture(scope="module", params=KINDS)
def cut(request, tmp_path_factory):
    """The run directory of a cut of a model that another library wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(_api.BUILTIN_MODELS, "vit_tiny_8", vit_tiny_8)
        given = KINDS[request.param][0](folder)
        model = vitcut.load_model(**given)
        images = vitcut.load_images("drawn", model=model)
        graph = model.weights.graph
        circuit = Circuit.full(graph, ablation="mean")
        circuit = replace(circuit, kept=circuit.kept & ~_first_head(graph))
        settings = CutSettings(images=24, verify_images=12)
        out = folder / "cut"
        vitcut.cut(model, images, circuit, settings=settings, bench=BENCH, out=out)
        yield request.param, folder / "cut"


def _first_head(graph):
    gone = np.zeros_like(graph.edges)
    gone[1] = True
    return gone


def test_what_images_are_made_into_travels_with_the_compact_model(cut):
    kind, folder = cut
    info = CompactViT.from_pretrained(folder / "model").info
    taken = info.preprocessing
    assert taken.framing == KINDS[kind][1]
    assert (taken.mean, taken.std) == KINDS[kind][2]


def test_the_dense_model_is_repaired_saved_and_read_again(cut, tmp_path):
    _, folder = cut
    before = vitcut.load_model(folder)
    images = vitcut.load_images(model=before)
    told = {"settings": FINETUNE, "bench": BENCH, "out": tmp_path / "fine"}
    results = vitcut.finetune(folder, before, images, **told).results
    dense = vitcut.load_model(tmp_path / "fine" / "dense-repaired" / "dense")
    assert dense.weight_hash != before.weight_hash
    assert dense.preprocessing == before.preprocessing
    assert dense.labels.ids == LABELS
    again = vitcut.bench(tmp_path / "fine", settings=BENCH, out=tmp_path / "bench")
    assert [p.accuracy_fine for p in again.points] == [p.accuracy_fine for p in results.points]
    assert [p.kl for p in again.points] == pytest.approx([p.kl for p in results.points])


@pytest.mark.graph
def test_the_compact_model_is_exported(cut, tmp_path):
    kind, folder = cut
    model = CompactViT.from_pretrained(folder / "model")
    shape = model.plan.shape
    pixels = torch.randn(2, KINDS[kind][1].channels, shape.image_size, shape.image_size)
    export_onnx(model, tmp_path / "model.onnx", example=pixels)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    [logits] = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    np.testing.assert_allclose(logits, model(pixels).detach(), atol=1e-4)


def test_what_cannot_be_saved_is_refused_before_anything_is_trained(cut, tmp_path, monkeypatch):
    _, folder = cut

    def refuse(model):
        raise ModelError("cannot be saved")

    monkeypatch.setattr(saving, "require_savable", refuse)
    model = vitcut.load_model(folder)
    images = vitcut.load_images(model=model)
    with pytest.raises(ModelError, match="cannot be saved"):
        vitcut.finetune(folder, model, images, settings=FINETUNE, out=tmp_path / "fine")
    assert not (tmp_path / "fine").exists()


def test_labels_may_be_what_a_person_calls_the_classes(tmp_path):
    """Hugging Face knows one text per class: an id, or a name."""
    task = load_task("drawn")
    named = replace(task, classes=tuple(replace(c, name=f"a {c.id}") for c in task.classes))
    model = vitcut.load_model(**_hf(tmp_path, [f"a {i}" for i in LABELS]))
    images = vitcut.load_images("drawn", task=named, model=model)
    assert model.for_task(images.task, images.labels).labels.names == named.class_names
    with pytest.raises(TaskError, match=r"names 12 classes that model .* lacks: crescent"):
        vitcut.load_images("drawn", task=task, model=model)


def test_labels_in_another_order_are_brought_into_the_tasks(tmp_path):
    full = vitcut.load_model(**_hf(tmp_path, LABELS[::-1]))
    images = vitcut.load_images("drawn", model=full)
    model = full.for_task(images.task, images.labels)
    assert model.labels.ids == images.task.class_ids == tuple(LABELS)
    pixels = random_pixels(model.weights)
    with torch.no_grad():
        own, theirs = (as_classifier(item.module)(pixels) for item in (model, full))
    torch.testing.assert_close(own, theirs.flip(1))


def test_images_of_another_framing_are_refused_in_python(tmp_path):
    model = vitcut.load_model(**_hf(tmp_path))
    images = vitcut.load_images("drawn", task="drawn", image_size=16)
    with pytest.raises(ConfigError, match="takes images with fit squash, got crop: give load_"):
        vitcut.evaluate(model, images)
    vitcut.evaluate(model, vitcut.load_images("drawn", task="drawn", model=model))
    with pytest.raises(ConfigError, match="takes images of 16 pixels, got image_size=64"):
        vitcut.load_images("drawn", task="drawn", model=model, image_size=64)


def test_a_module_of_one_channel_gets_grey_images_in_python():
    module = timm.create_model("test_vit", num_classes=12, img_size=32, in_chans=1)
    model = vitcut.load_model(module, mean=(0.5,), std=(0.5,))
    images = vitcut.load_images("drawn", task="drawn", model=model)
    assert vitcut.evaluate(model, images).images == len(images.test)
    colours = vitcut.load_images("drawn", task="drawn", image_size=32)
    with pytest.raises(ConfigError, match="takes images with channels 1, got 3"):
        vitcut.evaluate(model, colours)


def test_a_compact_model_is_no_dense_one(cut):
    with pytest.raises(ModelError, match="is a compact model, expected a dense one"):
        vitcut.load_model(cut[1] / "model")
    assert "plan" in json.loads((cut[1] / "model" / "config.json").read_text())
