import pytest
import torch
from torch import nn
from vitcut.model.given import NOTHING, Given
from vitcut.model.loading import load_model

import vitcut
from vitcut import cli
from vitcut.errors import ConfigError

ALL = Given(arch="vit", mean=(0.5,), std=(0.1, 0.2), random_weights=True, image_size=32)


@pytest.mark.parametrize("given", [NOTHING, ALL, Given(mean=(0.5,)), Given(image_size=32)])
def test_only_what_is_said_is_written_down_and_comes_back(given):
    assert Given.from_dict({"model": "m", "task": {}, **given.to_dict()}) == given
    assert NOTHING.to_dict() == {}
    assert ALL.to_dict() == {
        "arch": "vit", "mean": [0.5], "std": [0.1, 0.2], "random_weights": True, "image_size": 32
    }  # fmt: skip


def test_what_is_said_goes_over_what_was_said():
    assert NOTHING.over(ALL) == ALL.over(NOTHING) == ALL
    changed = Given(mean=(0.4,), image_size=64).over(ALL)
    assert (changed.arch, changed.mean, changed.std) == ("vit", (0.4,), (0.1, 0.2))
    assert (changed.random_weights, changed.image_size) == (True, 64)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"mean": (0.5, float("inf"))}, "mean must be a finite number, got inf"),
        ({"std": (0.5, -0.1)}, r"std must be a finite number > 0, got -0\.1"),
        ({"std": (float("nan"),)}, "std must be a finite number > 0, got nan"),
        ({"image_size": 0}, "image-size must be >= 1, got 0"),
        ({"image_size": -16}, "image-size must be >= 1, got -16"),
    ],
)
def test_numbers_out_of_range_are_refused(said, match):
    with pytest.raises(ConfigError, match=match):
        Given(**said)


@pytest.mark.parametrize(
    ("said", "spec", "match"),
    [
        ({"arch": "vit"}, "animals", "arch is for a file of bare weights"),
        ({"mean": (0.5,)}, "timm:test_vit", "mean is for a file of bare weights"),
        ({"std": (0.5,)}, "{weights}/..", "std is for a file of bare weights"),
        ({"random_weights": True}, "{weights}", "random-weights is for timm:NAME, got it with"),
        ({"image_size": 32}, "animals", "image-size is for timm:NAME, got it with 'animals', who"),
        ({"image_size": 32}, "hf-hub:o/n", "weights or configuration say the size: leave it out"),
        ({"image_size": 32}, "{weights}", "weights or configuration say the size: leave it out"),
    ],
)
def test_what_is_for_another_kind_of_model_is_refused(tmp_path, said, spec, match):
    path = tmp_path / "weights.pth"
    path.touch()
    with pytest.raises(ConfigError, match=match):
        Given(**said).require_for(spec.format(weights=path))


def test_what_is_for_that_kind_of_model_is_taken(tmp_path):
    random = load_model("timm:test_vit", Given(random_weights=True, image_size=32))
    assert random.image_size == 32
    path = tmp_path / "weights.pth"
    torch.save(random.model.state_dict(), path)
    bare = load_model(str(path), Given(arch="test_vit", mean=(0.4,), std=(0.3,)))
    assert (bare.mean, bare.std) == ((0.4,) * 3, (0.3,) * 3)
    assert bare.weight_hash == random.weight_hash


@pytest.mark.parametrize("said", [{"arch": "vit"}, {"random_weights": True}, {"image_size": 32}])
def test_a_module_is_taken_as_it_was_built(said):
    with pytest.raises(ConfigError, match=f"taken as it was built, got {next(iter(said))}: leave"):
        vitcut.load_model(nn.Identity(), mean=(0.5,), std=(0.5,), **said)


@pytest.mark.parametrize(
    ("typed", "match"),
    [
        (["--model", "animals", "--image-size", "64"], "image-size is for timm:NAME, got it with"),
        (["--model", "timm:resnet18", "--image-size", "64"], "timm's resnet18 takes no image-size"),
        (["--model", "timm:test_vit", "--image-size", "50"], "image-size must be a multiple of 16"),
        (
            ["--model", "timm:test_vit", "--image-size", "8", "--random-weights", "true"],
            "image-size must be a multiple of 16",
        ),
        (["--model", "timm:test_vit", "--image-size", "0"], "image-size must be >= 1, got 0"),
    ],
)
def test_the_command_line_tells_it_in_one_line(capsys, typed, match):
    where = ["--source", "drawn", "--task", "drawn"]
    assert cli.main(["discover", "--tau", "0.1", *where, *typed]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"vitcut: error: {match}")
    assert told.count("\n") == 1
