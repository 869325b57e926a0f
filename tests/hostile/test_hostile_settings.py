"""Label files, recipes and model configurations that are larger than they look."""

import json
from pathlib import Path

import pytest
import yaml

from vitcut import cli
from vitcut.errors import ConfigError, ModelError, TaskError
from vitcut.model.foreign import read_config
from vitcut.model.load import load
from vitcut.recipes import read_recipe
from vitcut.store import parse_yaml
from vitcut.task import load_task

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
TEXTS = {
    "an alias bomb": BOMB,
    "deep lists": "[" * 5000,
    "deep maps": "a: " + "{a: " * 3000 + "1" + "}" * 3000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(500)),
    "a loop": "a: &a [*a]",
    "an alias of nothing": "a: *b",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_yaml_that_is_larger_than_it_looks_is_refused_in_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for read, kind in ((load_task, TaskError), (read_recipe, ConfigError)):
        with pytest.raises(kind, match=r"a\.yaml") as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    for words in (["--config", str(path)], [f"--config={path}"]):
        assert cli.main(["discover", "--tau", "0.1", *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"vitcut: error: {path} is not a readable config: ")
        assert (told.count("\n"), len(told) < 500) == (1, True)


def test_a_config_without_flags_is_told_as_such(tmp_path, capsys) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert cli.main(["discover", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "a.yaml is no config: expected a line 'flag: value'" in capsys.readouterr().err


def test_aliases_may_be_used() -> None:
    text = "a: &a [1, 2]\nb: [*a, *a]\nc: &c {d: *a}\ne: *c\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_deep_json_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ModelError, match=r"config\.json is not readable JSON: .*recursion"):
        read_config(tmp_path / "config.json")


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)
    save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    config = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=2,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


HUGE = {
    "timm": ["depth", "embed_dim", "num_classes", "img_size", "mlp_ratio"],
    "hf": ["num_hidden_layers", "hidden_size", "num_labels", "image_size", "intermediate_size"],
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in HUGE for key in HUGE[kind]])
def test_a_configuration_of_a_billion_is_refused_before_it_is_built(
    request: pytest.FixtureRequest, kind: str, key: str
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    load(folder)
    path = folder / "config.json"
    before = path.read_text()
    config = json.loads(before)
    inner = (
        config["model_args"]
        if key in config.get("model_args", {}) or key == "mlp_ratio"
        else config
    )
    inner[key] = 10**9
    path.write_text(json.dumps(config))
    try:
        with pytest.raises(ModelError, match=f"has {key} 1e\\+09, which a model with .* cannot"):
            load(folder)
    finally:
        path.write_text(before)
