import pytest

from vitcut.compact.plan import BlockPlan, MlpPlan, Plan, StreamPlan, ViTShape
from vitcut.errors import ArtefactError

STREAM = StreamPlan(name="stream.0", rows="all", terms=("embed",), table_rows=5)
PLAN = Plan(
    shape=ViTShape(
        image_size=4,
        channels=3,
        patch_size=2,
        num_prefix=1,
        width=6,
        num_layers=1,
        num_heads=2,
        head_dim=3,
        hidden=7,
        activation="gelu",
        eps=1e-6,
        num_classes=4,
    ),
    embeds=True,
    blocks=(BlockPlan(attention=None, mlp=MlpPlan(name="mlp.0", stream=STREAM, hidden=7)),),
    classifier=StreamPlan(name="stream.1", rows="readout", terms=("mlp.0",), table_rows=1),
)


def test_a_plan_is_rebuilt_from_its_dictionary():
    assert Plan.from_dict(PLAN.to_dict()) == PLAN


def test_rows_are_counted():
    assert (PLAN.shape.num_rows("all"), PLAN.shape.num_rows("readout")) == (5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("embeds"), "plan must have the keys"),
        (lambda c: c.update(blocks=3), r"plan\.blocks must be"),
        (lambda c: c["shape"].update(width="6"), r"plan\.shape\.width must be"),
        (lambda c: c["classifier"].update(rows="some"), r"plan\.classifier\.rows must be"),
        (lambda c: c["blocks"][0].update(extra=1), r"plan\.blocks\[0\] must have the keys"),
    ],
)
def test_a_malformed_plan_is_refused_with_the_place(change, message):
    content = PLAN.to_dict()
    change(content)
    with pytest.raises(ArtefactError, match=message):
        Plan.from_dict(content)
