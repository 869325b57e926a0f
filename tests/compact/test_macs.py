from dataclasses import replace

from test_plan import PLAN, STREAM
from tiny import REFERENCE

from vitcut.compact.macs import count_macs, dense_macs
from vitcut.compact.plan import (
    AttentionPlan,
    BlockPlan,
    HeadGroupPlan,
    OutputPlan,
    ProjectionPlan,
)


def test_the_reference_model_has_23_2_million_macs():
    assert dense_macs(REFERENCE) == 23_204_224


def test_a_small_plan_is_counted_by_hand():
    patches, mlp, classifier = 4 * 6 * 12, 2 * 5 * 6 * 7, 6 * 4
    assert count_macs(PLAN) == patches + mlp + classifier


def test_a_fixed_pattern_is_one_product_and_a_readout_one_query():
    attention = AttentionPlan(
        streams=(STREAM,),
        projections=(ProjectionPlan(stream=0, rows="all", q=(), k=(), v=(0, 1)),),
        groups=(
            HeadGroupPlan(heads=(0,), rows="all", constant=("q", "k")),
            HeadGroupPlan(heads=(1,), rows="readout", constant=("k",)),
        ),
        outputs=(OutputPlan(name="out.0.0", group=0, heads=(0,), rows="readout"),),
    )
    plan = replace(PLAN, blocks=(BlockPlan(attention=attention, mlp=None),), embeds=False)
    values, fixed, attended, output = 5 * 6 * 2 * 3, 5 * 5 * 3, 2 * 5 * 3, 3 * 6
    assert count_macs(plan) == values + fixed + attended + output + 6 * 4
