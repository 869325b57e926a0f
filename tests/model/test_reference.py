import pytest
import torch

from vitcut.errors import ConfigError
from vitcut.model.model import weight_hash
from vitcut.model.reference import build_reference
from vitcut.model.settings import VitSettings


def test_the_reference_model_is_the_published_one():
    model = build_reference(VitSettings(), num_classes=58)
    assert sum(part.numel() for part in model.parameters()) == 320_378
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 58)


def test_the_seed_decides_the_weights_and_other_generators_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hashes = [
        weight_hash(build_reference(VitSettings(depth=1), num_classes=3, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_image_of_broken_patches_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of patch_size \(8\), got 60"):
        build_reference(VitSettings(), num_classes=3, image_size=60)


@pytest.mark.parametrize(
    "setting", [{"depth": 0}, {"num_heads": 7}, {"dropout": 1.0}, {"mlp_ratio": float("inf")}]
)
def test_an_impossible_architecture_is_refused(setting):
    with pytest.raises(ConfigError, match="got"):
        VitSettings(**setting)
