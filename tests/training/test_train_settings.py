import pytest

from vitcut.errors import ConfigError
from vitcut.training.settings import TrainSettings, reference_recipe


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": 0},
        {"weight_decay": -1},
        {"warmup_epochs": 24},
        {"patience": 0},
        {"label_smoothing": 1.5},
        {"cutmix_fraction": -0.1},
        {"max_shift_px": -1},
        {"ema_decay": 1.0},
        {"threads": 0},
        {"augmentation": "reference", "batch_size": 255},
    ],
)
def test_a_setting_out_of_range_is_named_with_what_was_got(setting):
    name = "batch_size" if "augmentation" in setting else next(iter(setting))
    with pytest.raises(ConfigError, match=f"{name}.*got") as caught:
        TrainSettings(**setting)
    assert "\n" not in str(caught.value)


def test_the_reference_recipe_is_the_published_one():
    recipe = reference_recipe()
    assert recipe.augmentation == "reference"
    assert (recipe.learning_rate, recipe.warmup_epochs, recipe.patience) == (3e-4, 20, 50)


@pytest.mark.parametrize(("size", "most"), [(224, 24), (64, 7), (32, 3)])
def test_a_shift_that_is_left_open_is_a_tenth_of_any_size(size, most):
    assert TrainSettings(max_shift_px=None).shift_px(size) == most
    assert TrainSettings(max_shift_px=6).shift_px(size) == 6
