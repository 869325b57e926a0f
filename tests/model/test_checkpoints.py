from functools import partial

import pytest
import timm
import torch
from adapter_laws import expect_load_refusal
from safetensors.torch import save_file
from torch import nn

import vitcut
from vitcut import cli
from vitcut.errors import ConfigError, ModelError
from vitcut.model.checkpoints import timm_sizes
from vitcut.model.load import load
from vitcut.model.model import weight_hash
from vitcut.preprocessing import Framing
from vitcut.runs import Run

ARCH = "test_vit"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCH, num_classes=3).eval()


_expect_refusal = partial(expect_load_refusal, arch=ARCH)


_PATCHES = {"patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)}


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
    loaded = load(path, arch=ARCH)
    assert weight_hash(loaded.module) == weight_hash(model)
    assert not loaded.module.training
    taken = loaded.preprocessing
    assert (taken.image_size, len(taken.mean), loaded.name) == (160, 3, str(path))
    told = capsys.readouterr().err
    assert "under" not in told if said is None else said in told


def test_safetensors_are_read_and_the_head_says_how_many_classes(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    generator = torch.get_rng_state()
    assert load(path, arch=ARCH).module.head.out_features == 3
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
        ({}, r"no weights are in it\): expected those of a ViT"),
        (
            {"fc.weight": torch.zeros(2, 2), "epoch": 3},
            r"\(found fc\.weight\): expected those of a",
        ),
        (
            {"model": {0: torch.zeros(2), ("a", 1): torch.zeros(2)}},
            r"no weights are in it\): expected those of a ViT",
        ),
        (
            {**_PATCHES, "head.weight": torch.zeros(())},
            r"head\.weight of shape \[\]: expected \[cl",
        ),
        (
            {**_PATCHES, "head.weight": torch.zeros(0, 64)},
            r"head\.weight of shape \[0, 64\]: expected",
        ),
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
    _expect_refusal(tmp_path / name, r"cannot read .*copy it again|or is damaged")


def test_weights_need_an_architecture_that_timm_has(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    _expect_refusal(tmp_path / "weights.safetensors", "holds weights only.*--arch", arch=None)
    _expect_refusal(tmp_path / "weights.safetensors", "no architecture 'vit_9'", arch="vit_9")


def test_a_tag_that_timm_lacks_is_told_with_the_architecture(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    told = r"timm cannot build test_vit\.bad with num_classes=3: .* tag .*leave its tag out"
    _expect_refusal(path, told, arch=f"{ARCH}.bad")
    with pytest.raises(ModelError, match=r"timm cannot build test_vit\.bad: .*leave its tag out"):
        load(f"timm:{ARCH}.bad", random_weights=True)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (torch.ones(64, dtype=torch.int8), "int8"),
        (torch.ones(64, dtype=torch.bool), "bool"),
        (torch.ones(64, dtype=torch.complex64), "complex64"),
    ],
)
def test_weights_that_torch_would_bring_to_floats_are_refused_by_name(model, tmp_path, odd, told):
    path = tmp_path / "weights.pth"
    torch.save({**model.state_dict(), "norm.weight": odd}, path)
    _expect_refusal(path, rf"not floating-point numbers: norm\.weight torch\.{told}; .* float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_precision_are_brought_to_float32(model, tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    loaded = load(tmp_path / "weights.pth", arch=ARCH).module
    assert {item.dtype for item in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("arch", ["cait_xxs24_224", "convit_tiny"])
def test_an_architecture_with_other_positions_keeps_its_own_sizes(arch):
    model = timm.create_model(arch, num_classes=2)
    assert timm_sizes(model, model.state_dict()) == {}


def test_an_architecture_belongs_to_a_file_of_weights(tmp_path):
    _expect_refusal("animals", "arch is for a file of bare weights", kind=ConfigError)
    _expect_refusal(tmp_path / "gone.pth", "correct the path", kind=ConfigError)


def test_random_weights_only_on_request_and_the_same_each_time(capsys):
    first = load(f"timm:{ARCH}", random_weights=True)
    torch.rand(3)
    generator = torch.get_rng_state()
    second = load(f"timm:{ARCH}", random_weights=True)
    assert first.weight_hash == second.weight_hash
    assert "has random weights, as was asked for" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(ConfigError, match="random-weights is for timm:NAME, got it"):
        load("animals", random_weights=True)


def test_the_origin_holds_what_was_given_and_no_more(model, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    monkeypatch.chdir(tmp_path)
    bare = vitcut.load_model(path.name, arch=ARCH)
    assert bare.origin == {"model": str(path), "arch": ARCH}
    assert bare.weight_hash == weight_hash(model)
    random = vitcut.load_model(f"timm:{ARCH}", random_weights=True, image_size=32)
    told = {"model": f"timm:{ARCH}", "random_weights": True, "image_size": 32}
    assert random.origin == told
    assert vitcut.load_model(**told).weight_hash == random.weight_hash
    assert vitcut.load_model("animals").origin == {"model": "animals"}


def test_the_command_line_tells_it_in_one_line(model, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    typed = ["discover", "--model", str(path), "--source", "drawn", "--task", "drawn"]
    assert cli.main([*typed, "--tau", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main([*typed, "--arch", ARCH, "--tau", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert "has 3 classes, task 'drawn' has 12" in capsys.readouterr().err


def _saved(tmp_path, **sizes):
    torch.manual_seed(0)
    model = timm.create_model(ARCH, num_classes=3, **sizes).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return model, tmp_path / "weights.pth"


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"img_size": 96}, "test_vit with img_size 96, by its weights"),
        ({"img_size": 64, "patch_size": 8}, "test_vit with patch_size 8, img_size 64, by"),
        ({}, None),
    ],
)
def test_the_weights_say_the_sizes_of_images_and_patches(tmp_path, capsys, sizes, told):
    model, path = _saved(tmp_path, **sizes)
    loaded = load(path, arch=ARCH)
    side = sizes.get("img_size", 160)
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(loaded.module(pixels), model(pixels))
    assert loaded.preprocessing.image_size == side
    assert loaded.preprocessing.framing == Framing(crop_fraction=0.95)
    said = capsys.readouterr().err
    assert said == "" if told is None else told in said


def test_registers_and_positions_without_a_class_token_are_counted_rightly(tmp_path):
    arch = "vit_small_patch14_reg4_dinov2"  # no position for class token and registers
    given = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 2}
    weights = timm.create_model(arch, img_size=56, **given).state_dict()
    assert timm_sizes(timm.create_model(arch, **given), weights) == {"img_size": 56}


def test_one_channel_asks_for_mean_and_std(tmp_path):
    model, path = _saved(tmp_path, in_chans=1)
    _expect_refusal(path, r"takes 1 channels, mean and std are known of 3 and 3: give --mean and")
    loaded = load(path, arch=ARCH, mean=(0.1,), std=(0.3,))
    pixels = torch.randn(2, 1, 160, 160)
    with torch.no_grad():
        assert torch.equal(loaded.module(pixels), model(pixels))
    taken = loaded.preprocessing
    assert (taken.mean, taken.std, taken.framing.channels) == ((0.1,), (0.3,), 1)


def test_channels_that_no_picture_has_are_refused(tmp_path):
    _, path = _saved(tmp_path, in_chans=4)
    with pytest.raises(ModelError, match=r"1 \(grey\) or 3 .* channels, got 4"):
        load(path, arch=ARCH, mean=(0.5,), std=(0.5,))


def test_sizes_that_timm_cannot_build_are_refused(tmp_path):
    _, path = _saved(tmp_path)
    weights = torch.load(path, weights_only=True)
    weights["patch_embed.proj.weight"] = torch.zeros(64, 3, 0, 0)
    torch.save(weights, path)
    _expect_refusal(path, "timm cannot build test_vit with num_classes=3, patch_size=0")


def test_mean_and_std_belong_to_a_file_of_weights(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    assert load(path, arch=ARCH, mean=(0.5,), std=(0.2,)).preprocessing.mean == (0.5,) * 3
    with pytest.raises(ConfigError, match="mean is for a file of bare weights"):
        load("animals", mean=(0.5,))


def test_a_file_beside_a_configuration_points_to_its_folder(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    _expect_refusal(tmp_path / "model.safetensors", "or give the folder .*config.json", arch=None)


def test_a_run_remembers_what_was_given_and_takes_what_is_given_anew(model, tmp_path):
    path, run = tmp_path / "weights.safetensors", tmp_path / "run"
    save_file(model.state_dict(), path)
    first = vitcut.load_model(path, arch=ARCH, mean=0.5, std="0.2")
    Run(run).claim({"model": {**first.origin, "weight_hash": first.weight_hash}})
    again = vitcut.load_model(run)
    assert again.weight_hash == first.weight_hash
    assert (again.origin, again.preprocessing) == (first.origin, first.preprocessing)
    assert again.preprocessing.std == (0.2,) * 3
    changed = vitcut.load_model(run, std=0.3)
    assert (changed.preprocessing.mean, changed.preprocessing.std) == ((0.5,) * 3, (0.3,) * 3)
    assert changed.origin == {**first.origin, "std": [0.3] * 3}


@pytest.mark.parametrize(
    ("flag", "typed", "match"),
    [
        ("mean", "grey", "mean must be a number, or one per channel, got 'grey'"),
        ("std", "0.5,0.5,0", "std must be a finite number > 0, got 0"),
        ("mean", "nan", "mean must be a finite number, got nan"),
    ],
)
def test_numbers_that_are_none_are_refused(capsys, flag, typed, match):
    assert cli.main(["discover", "--tau", "0.1", f"--{flag}", typed]) == 2
    told = capsys.readouterr().err
    assert match in told
    assert told.count("\n") == 1
