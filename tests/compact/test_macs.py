from test_plan import PLAN

from vitcut.compact.macs import count_macs, dense_macs
from vitcut.compact.plan import ViTShape

REFERENCE = ViTShape(
    image_size=64,
    channels=3,
    patch_size=8,
    num_prefix=1,
    width=64,
    num_layers=6,
    num_heads=8,
    head_dim=8,
    hidden=256,
    activation="gelu",
    eps=1e-6,
    num_classes=58,
)


def test_the_reference_model_has_23_2_million_macs():
    assert dense_macs(REFERENCE) == 23_204_224


def test_a_class_only_last_block_leaves_20_0_million():
    assert dense_macs(REFERENCE, class_only_last_block=True) == 20_050_304


def test_a_small_plan_is_counted_by_hand():
    patches, mlp, classifier = 4 * 6 * 12, 2 * 5 * 6 * 7, 6 * 4
    assert count_macs(PLAN) == patches + mlp + classifier
