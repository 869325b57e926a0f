import json
from dataclasses import replace

import pytest

from vitcut.compact.plan import BlockPlan, MlpPlan, Plan, Rows, StreamPlan, TermPlan, ViTShape
from vitcut.errors import ArtefactError

PATCHES = Rows(first=1, end=5)
ALL = Rows(first=0, end=5)
CLS = Rows(first=0, end=1)
STREAM = StreamPlan(
    name="stream.0", rows=ALL, terms=(TermPlan(name="embed", rows=PATCHES),), table_rows=5
)
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
    blocks=(
        BlockPlan(
            attention=None, mlps=(MlpPlan(name="mlp.0", stream=STREAM, hidden=7, bias=True),)
        ),
    ),
    readout=(
        StreamPlan(
            name="stream.1", rows=CLS, terms=(TermPlan(name="mlp.0", rows=ALL),), table_rows=1
        ),
    ),
)


def test_a_plan_is_rebuilt_from_its_dictionary():
    assert Plan.from_dict(PLAN.to_dict()) == PLAN


def test_every_token_belongs_to_one_kind():
    shape = replace(PLAN.shape, num_prefix=3)
    assert list(PLAN.shape.kind_rows.items()) == [("cls", CLS), ("patch", PATCHES)]
    assert [rows.count for rows in shape.kind_rows.values()] == [1, 2, 4]
    assert shape.name_of(shape.all_rows) == "cls + register + patch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("embeds"), "required field `embeds`"),
        (lambda c: c.update(blocks=3), r"got `int` - at `\$\.blocks`"),
        (lambda c: c["shape"].update(width="6"), r"got `str` - at `\$\.shape\.width`"),
        (lambda c: c["shape"].pop("gated"), r"missing field `gated` - at `\$\.shape`"),
        (lambda c: c["readout"][0]["rows"].update(end="5"), r"at `\$\.readout\[0\]\.rows\.end`"),
        (lambda c: c["blocks"][0].update(extra=1), r"unknown field `extra` - at `\$\.blocks\[0\]`"),
    ],
)
def test_a_malformed_plan_is_refused_with_the_place(change, message):
    content = PLAN.to_dict()
    change(content)
    with pytest.raises(ArtefactError, match=message):
        Plan.from_dict(json.loads(json.dumps(content)))
