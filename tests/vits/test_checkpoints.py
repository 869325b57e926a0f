import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vitcut import cli
from vitcut.data.settings import DataConfig
from vitcut.errors import ConfigError, ModelError
from vitcut.pipeline.commands import resolve_origin
from vitcut.pipeline.subject import Origin
from vitcut.vits.loading import load_model, weight_hash

ARCH = "test_vit"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCH, num_classes=3).eval()


def _expect_refusal(path, match, arch=ARCH, kind=ModelError):
    with pytest.raises(kind, match=match) as caught:
        load_model(str(path), arch=arch)
    assert "\n" not in str(caught.value)


def _bare(state):
    return state


def _in_wrapper(state):
    return {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}


def _averaged(state):
    return {"state_dict": {key: value * 0 for key, value in state.items()}, "state_dict_ema": state}


def _parallel(state):
    return {"model": {f"module.{key}": value for key, value in state.items()}}


def _compiled(state):
    return {f"_orig_mod.{key}": value for key, value in state.items()}


def _lightning(state):
    return {"state_dict": {f"model.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (_bare, None),
        (_in_wrapper, "under state_dict"),
        (_averaged, "under state_dict_ema"),
        (_parallel, "under model > module."),
        (_compiled, "under _orig_mod."),
        (_lightning, "under state_dict > model."),
    ],
)
def test_bare_weights_are_found_and_what_was_taken_off_is_said(model, tmp_path, capsys, pack, said):
    path = tmp_path / "weights.pth"
    torch.save(pack(model.state_dict()), path)
    loaded = load_model(str(path), arch=ARCH)
    assert weight_hash(loaded.model) == weight_hash(model)
    assert not loaded.model.training
    assert (loaded.image_size, len(loaded.mean), loaded.name) == (160, 3, str(path))
    told = capsys.readouterr().err
    assert "under" not in told if said is None else said in told


def test_safetensors_are_read_and_the_head_says_how_many_classes(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    generator = torch.get_rng_state()
    assert load_model(str(path), arch=ARCH).model.head.out_features == 3
    assert torch.equal(torch.get_rng_state(), generator)


def test_names_and_shapes_that_do_not_fit_are_told_in_one_line(model, tmp_path):
    state = dict(model.state_dict())
    del state["norm.weight"]
    state["neck.weight"] = torch.zeros(2)
    state["cls_token"] = torch.zeros(1, 1, 7)
    torch.save(state, tmp_path / "weights.pth")
    _expect_refusal(
        tmp_path / "weights.pth",
        r"does not fit test_vit: 1 missing \(norm\.weight\); 1 unexpected \(neck\.weight\); "
        r"1 of another shape \(cls_token \[1, 1, 7\] instead of \[1, 1, 64\]\)",
    )


def test_weights_of_another_architecture_name_the_first_few(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    _expect_refusal(tmp_path / "weights.safetensors", r"missing \(.*, \.\.\.\)", arch="test_vit2")


class _Code:
    def __reduce__(self):
        return (print, ("code of the file was run",))


def test_a_pickle_that_needs_more_than_weights_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "args": _Code()}, tmp_path / "weights.pth")
    _expect_refusal(tmp_path / "weights.pth", r"could run code.*save model\.state_dict\(\) alone")
    assert "code of the file was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "holds no weights; expected a state dict"),
        ({"head.weight": torch.zeros(2, 2), "epoch": 3}, r"no tensors: epoch; expected a state"),
        ({"fc.weight": torch.zeros(2, 2)}, r"has no head\.weight.*found fc\.weight"),
        ([torch.zeros(2)], "holds a list, expected a state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "weights.pth")
    _expect_refusal(tmp_path / "weights.pth", match)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"something else", b"PK not a zip"])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    _expect_refusal(tmp_path / name, r"cannot read .*get it again|or is damaged")


def test_weights_need_an_architecture_that_timm_has(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    _expect_refusal(tmp_path / "weights.safetensors", "holds weights only.*--arch", arch=None)
    _expect_refusal(tmp_path / "weights.safetensors", "no architecture 'vit_9'", arch="vit_9")


def test_an_architecture_belongs_to_a_file_of_weights(tmp_path):
    _expect_refusal("animals", "arch is for a file of bare weights", kind=ConfigError)
    _expect_refusal(tmp_path / "gone.pth", "correct the path", kind=ConfigError)


def test_random_weights_only_on_request_and_the_same_each_time(capsys):
    first = load_model(f"timm:{ARCH}", random_weights=True)
    torch.rand(3)
    generator = torch.get_rng_state()
    second = load_model(f"timm:{ARCH}", random_weights=True)
    assert first.weight_hash == second.weight_hash
    assert "has random weights, as was asked for" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(ConfigError, match="random-weights is for timm:NAME, got it"):
        load_model("animals", random_weights=True)


def test_an_origin_remembers_the_architecture(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    origin = resolve_origin(str(path), "drawn", DataConfig(source="drawn"), arch=ARCH)
    assert origin.settings()["arch"] == ARCH
    assert origin.load_model().weight_hash == weight_hash(model)
    moved = resolve_origin("animals", None, DataConfig(), base=origin)
    assert (moved.arch, moved.random_weights) == (None, False)
    assert resolve_origin(None, None, DataConfig(), base=origin).arch == ARCH
    assert "arch" not in Origin(model="x", task=origin.task, data=origin.data).settings()


def test_the_command_line_tells_it_in_one_line(model, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    typed = ["discover", "--model", str(path), "--source", "drawn", "--task", "drawn"]
    assert cli.main([*typed, "--tau", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main([*typed, "--arch", ARCH, "--tau", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert "has 3 classes, task 'drawn' has 12" in capsys.readouterr().err
